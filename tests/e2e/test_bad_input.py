"""Every kind of bad input, over a real socket to a real process."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.signing_keys import HEADER, sign
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.service import PATH, HastyService, Service, command, one_line, wait_until_done
from tests.support.waiting import until

KEY = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all that can't harm it."""
    with Service(tmp_path_factory.mktemp("service")) as running:
        yield running


def signed_raw(body: bytes) -> SignedRequest:
    return SignedRequest("", body, [(HEADER, sign(body, SIGNING_KEY))])


def head(*lines: str) -> bytes:
    start = [f"POST {PATH} HTTP/1.1", "host: 127.0.0.1", *lines]
    return ("\r\n".join(start) + "\r\n\r\n").encode()


class TestSignature:
    def test_a_wrong_signature_is_a_401_and_the_log_says_why(self, service: Service) -> None:
        """The likely causes are named, the key and the body are not."""
        before = service.stored()
        answer = service.post(make.user_created(email="secret@example.com", key="another"))
        assert (answer.status_code, answer.json()) == (401, {"error": "invalid_signature"})
        line = service.wait_for_log("no known key made this signature")
        assert "another webhook" in line
        assert "proxy that changed the body" in line
        assert SIGNING_KEY not in service.log
        assert "secret@example.com" not in service.log
        assert service.stored() == before

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"0" * 63,
            b"0" * 65,
            b"g" * 64,
            b"0" * 64,
            "é".encode() * 32,
            b"\xff" * 64,
            b"fake, " + b"0" * 64,
            b"sha256=" + b"0" * 64,
            b"0" * 100_00,
        ],
        ids=lambda header: f"{header[:8]!r}-{len(header)}",
    )
    def test_a_malformed_header_is_a_401(self, service: Service, header: bytes) -> None:
        """Whatever its length and characters."""
        delivery = make.user_created()
        answer = service.http.post(PATH, content=delivery.body, headers=[(HEADER.encode(), header)])
        assert answer.status_code == 401

    def test_an_upper_case_signature_is_a_401(self, service: Service) -> None:
        """Logto sends lower case."""
        body = make.user_created().body
        headers = {HEADER: sign(body, SIGNING_KEY).upper()}
        assert service.http.post(PATH, content=body, headers=headers).status_code == 401

    def test_a_header_sent_twice_is_a_401(self, service: Service) -> None:
        """Also when both are right."""
        delivery = make.user_created()
        twice = [delivery.headers[0], delivery.headers[0]]
        answer = service.http.post(PATH, content=delivery.body, headers=twice)
        assert answer.status_code == 401

    def test_no_header_is_a_401(self, service: Service) -> None:
        """Even if the body is nonsense."""
        assert service.http.post(PATH, content=b"{").status_code == 401

    def test_a_changed_body_is_a_401(self, service: Service) -> None:
        """One space is enough."""
        delivery = make.user_created()
        answer = service.http.post(PATH, content=delivery.body + b" ", headers=delivery.headers)
        assert answer.status_code == 401


class TestRequest:
    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
    @pytest.mark.parametrize("path", [PATH, PATH + "/"])
    def test_another_method_is_a_405(self, service: Service, method: str, path: str) -> None:
        """And never a redirect, which Logto would take for a success."""
        answer = service.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        if method != "HEAD":
            assert answer.json() == {"error": "method_not_allowed"}

    @pytest.mark.parametrize(
        "path", ["/", "/api", f"{PATH}/x", f"{PATH}//", "/healthz/", "/nothing/"]
    )
    def test_another_path_is_a_404(self, service: Service, path: str) -> None:
        """And never a redirect."""
        answer = service.http.post(path, content=b"{}")
        assert (answer.status_code, answer.json()) == (404, {"error": "not_found"})
        assert PATH in service.wait_for_log(f"There is no webhook at {path!r}")

    def test_both_slashes_are_the_webhook(self, service: Service) -> None:
        """A trailing slash makes no difference."""
        assert service.post(make.user_created(), PATH + "/").status_code == 200

    @pytest.mark.parametrize(
        "body",
        [
            b'{"event":"\xff"}',
            b'{"event":"X","a":"\\ud800"}',
            b'{"event":"X","a":1e400}',
            b'{"event":"X","a":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
            b'{"event":"X","a":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
            b'{"event":"X","a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        ],
        ids=lambda body: f"{body[:24]!r}-{len(body)}",
    )
    def test_a_signed_body_that_no_strict_parser_reads_is_kept(
        self, service: Service, body: bytes
    ) -> None:
        """It is a delivery: Logto never sends it again."""
        before = service.stored()
        assert service.post(signed_raw(body)).status_code == 200
        assert service.stored() == before + 1

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"User.Created"',
            b"{}",
            b'{"event":null}',
            b'{"event":1}',
            b'{"event":""}',
            b'{"event":"User.Created"}x',
            b"\xef\xbb\xbf" + b'{"event":"User.Created"}',
            b'{"event":"X","a":NaN}',
            b'{"event":"X","a":' + b"[" * 10_000 + b"]" * 9_999 + b"}",
            b"[" * 10_000 + b"]" * 10_000,
        ],
        ids=lambda body: f"{body[:24]!r}-{len(body)}",
    )
    def test_a_signed_body_that_is_no_delivery_is_a_400(
        self, service: Service, body: bytes
    ) -> None:
        """And isn't stored."""
        before = service.stored()
        answer = service.post(signed_raw(body))
        assert (answer.status_code, answer.json()) == (400, {"error": "not_a_delivery"})
        assert service.stored() == before

    def test_a_body_over_8_mib_is_a_413_without_reading_on(self, service: Service) -> None:
        """The answer comes before the body."""
        with service.connect() as client:
            client.sendall(head(f"content-length: {8 * 2**20 + 1}"))
            answer = client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 413")
            assert b"connection: close" in answer

    def test_an_endless_body_is_a_413(self, service: Service) -> None:
        """One that announces no length is cut at the limit."""
        chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
        with service.connect() as client:
            client.sendall(head("transfer-encoding: chunked"))
            for _ in range(129):
                client.sendall(chunk)
            assert client.recv(10_000).startswith(b"HTTP/1.1 413")

    def test_a_body_of_8_mib_is_accepted(self, service: Service) -> None:
        """The limit itself is still good."""
        start, end = b'{"event":"New.Event","x":"', b'"}'
        body = start + b"x" * (8 * 2**20 - len(start) - len(end)) + end
        assert service.post(signed_raw(body)).status_code == 200

    def test_a_client_that_goes_away_midway_leaves_no_trace(self, service: Service) -> None:
        """What is incomplete isn't stored."""
        delivery = make.user_created()
        before = service.stored()
        with service.connect() as client:
            client.sendall(head(f"content-length: {len(delivery.body)}") + delivery.body[:-1])
        assert service.post(make.user_created()).status_code == 200
        assert service.stored() == before + 1
        assert "Traceback" not in service.log

    def test_a_client_that_says_nothing_is_dropped(self, service: Service) -> None:
        """Who connects has something to say; one that was answered may stay."""
        with service.connect() as silent, service.connect() as known:
            assert health(known).startswith(b"HTTP/1.1 200")
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(10_000) == b""
            assert health(known).startswith(b"HTTP/1.1 200")

    def test_a_client_that_never_reads_is_dropped(self, service: Service) -> None:
        """Requests that wait behind another are few: Logto sends none."""
        requests = (head("content-length: 2") + b"{}") * 100_000
        with service.connect() as client, pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(requests)
        assert service.post(make.user_created()).status_code == 200

    def test_deep_or_long_numbers_are_no_500(self, service: Service) -> None:
        """Whatever JSON takes is stored."""
        deep = b"[" * 700 + b'"1234567890123456"' + b"]" * 700
        for value, status in ((deep, 200), (b"1" + b"0" * 320, 200), (b"12345678901234567", 200)):
            body = b'{"event":"New.Event","x":' + value + b"}"
            assert service.post(signed_raw(body)).status_code == status

    def test_a_large_body_holds_back_nobody(self, service: Service) -> None:
        """What takes long is done beside: others are answered meanwhile."""
        body = b'{"event":"New.Event","n":1234567890123456,"x":[' + b"[]," * 2_000_000 + b"[]]}"
        large = threading.Thread(target=service.post, args=[signed_raw(body)])
        large.start()
        answered = 0
        with httpx2.Client(base_url=service.url) as other:
            while large.is_alive():
                assert other.get("/healthz").status_code == 200
                answered += 1
        large.join()
        assert answered > 3

    def test_a_slow_client_is_dropped(self, service: Service) -> None:
        """Whether it is slow with its headers or with its body; and leaves no trace."""
        delivery = make.user_created()
        before = service.stored()
        with service.connect() as headers, service.connect() as body:
            headers.sendall(head("x: y")[:-2])
            body.sendall(
                head(
                    f"content-length: {len(delivery.body)}",
                    f"{HEADER}: {sign(delivery.body, SIGNING_KEY)}",
                )
                + delivery.body[:-1]
            )
            assert body.recv(10_000).startswith(b"HTTP/1.1 408")
            with contextlib.suppress(ConnectionResetError):
                assert headers.recv(10_000) == b""
        assert service.stored() == before


class TestDatabase:
    def test_a_locked_database_is_a_503_and_recovers(self, tmp_path: Path) -> None:
        """With Retry-After and an error line; what comes after the lock is stored and applied."""
        with Service(tmp_path) as service:
            assert service.post(make.user_created()).status_code == 200
            other = sqlite3.connect(service.file, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            answer = service.post(make.user_created())
            assert (answer.status_code, answer.json()) == (503, {"error": "not_stored"})
            assert int(answer.headers["retry-after"]) > 0
            assert "database is locked (sqlite:///logto-webhooks.db)" in service.wait_for_log(
                "answered 503"
            )
            other.execute("ROLLBACK")
            other.close()
            assert service.post(make.user_created(email="after@example.com")).status_code == 200
            wait_until_done(service)
            # What was answered 503 while it still waited for the lock may be stored all the same.
            [(users,)] = service.rows("SELECT count(*) FROM logto_users")
            assert users in (2, 3)
            after = "SELECT 1 FROM logto_users WHERE email = 'after@example.com'"
            assert service.rows(after) == [(1,)]
            assert service.process.poll() is None

    def test_a_full_disk_is_a_503_and_recovers(self, tmp_path: Path) -> None:
        """The file may not grow; once it may, the service goes on by itself."""
        big = "x" * 3_000_000  # more than a try again can make room for in the -wal
        with HastyService(tmp_path) as service:
            assert service.post(make.user_created(id="first")).status_code == 200
            wait_until_done(service)
            size = sum(file.stat().st_size for file in tmp_path.glob("*.db*"))
            unlimited = resource.RLIM_INFINITY
            resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, unlimited))
            answer = service.post(make.user_created(id="refused", customData={"big": big}))
            assert answer.status_code == 503
            service.wait_for_log("answered 503")
            resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
            second = make.user_created(id="second", customData={"big": big})
            assert service.post(second).status_code == 200
            wait_until_done(service)
            rows = service.rows("SELECT logto_user_id FROM logto_users")
            assert {("first",), ("second",)} <= set(rows) <= {("first",), ("second",), ("refused",)}
            until(lambda: service.stored() == 3, lambda: service.log)  # what was answered 503, too

    def test_a_database_that_is_gone_is_a_503_and_recovers(self, tmp_path: Path) -> None:
        """SQLite itself would go on writing to a file that nobody finds again."""
        with HastyService(tmp_path) as service:
            assert service.post(make.user_created()).status_code == 200
            wait_until_done(service)
            assert service.http.get("/readyz").json() == {"ready": True}
            moved = service.file.rename(tmp_path / "moved.db")
            for _ in range(3):
                assert service.post(make.user_created(id="late")).status_code == 503
            assert "ERROR" in service.wait_for_log("answered 503")
            service.wait_for_log("is gone")
            ready = service.http.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
            assert service.http.get("/healthz").status_code == 200
            assert not service.file.exists()
            moved.rename(service.file)
            assert service.post(make.user_created()).status_code == 200
            assert service.http.get("/readyz").status_code == 200
            until(lambda: service.stored() == 5, lambda: service.log)  # those, too
            service.wait_for_log("stored late")

    @pytest.mark.parametrize("end", ["-wal", "-shm"])
    def test_a_file_beside_the_database_that_is_gone_is_a_503_and_recovers(
        self, tmp_path: Path, end: str
    ) -> None:
        """What was answered 200 is still there after kill -9, also with a reader in between."""
        with Service(tmp_path) as service:
            accepted = [service.post(make.user_created()).status_code for _ in range(5)]
            assert accepted == [200] * 5
            Path(f"{service.file}{end}").unlink()
            answers = [service.post(make.user_created()).status_code for _ in range(3)]
            service.wait_for_log(
                f"{end} "
            )  # the receiver, whose next try may store it, or the worker
            assert service.stored() >= 5
            answers += [service.post(make.user_created()).status_code for _ in range(3)]
            assert answers[-1] == 200
            service.process.kill()
            service.process.wait()
            assert service.stored() >= 5 + answers.count(200)

    def test_a_damaged_database_that_is_mended_recovers(self, tmp_path: Path) -> None:
        """Without a restart."""
        with HastyService(tmp_path) as service:
            assert service.post(make.user_created()).status_code == 200
            wait_until_done(service)
            intact = b""

            def damage() -> bool:
                """SQLite may have the page in its cache: then mend it, to damage it again."""
                nonlocal intact
                with closing(sqlite3.connect(service.file)) as other:
                    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                with service.file.open("r+b") as file:
                    intact = file.read(4096)
                    file.seek(0)
                    file.write(b"\xff" * 4096)
                if service.post(make.user_created()).status_code == 503:
                    return True
                mend()
                return False

            def mend() -> None:
                with service.file.open("r+b") as file:
                    file.write(intact)

            until(damage, lambda: service.log)
            assert "not a database" in service.wait_for_log("answered 503")
            mend()
            until(lambda: service.post(make.user_created()).status_code == 200, lambda: service.log)
            assert service.http.get("/readyz").status_code == 200

    def test_another_schema_is_not_ready(self, tmp_path: Path) -> None:
        """And the answer says what to run."""
        with Service(tmp_path) as service:
            other = sqlite3.connect(service.file)
            other.execute("UPDATE logto_schema_version SET version_num = '0000'")
            other.commit()
            other.close()
            ready = service.http.get("/readyz")
            assert ready.status_code == 503
            assert "logto-webhooks migrate" in ready.json()["problem"]


class TestStart:
    def test_without_a_key_it_refuses_to_start(self, tmp_path: Path) -> None:
        """And says where in Logto's console the key stands."""
        ended = command("serve", folder=tmp_path)
        assert ended.returncode == 2
        assert "LOGTO_WEBHOOK_SIGNING_KEY" in one_line(ended.stderr)
        assert "Webhooks" in ended.stderr
        assert "Signing key" in ended.stderr

    def test_a_port_that_is_taken(self, tmp_path: Path, service: Service) -> None:
        """One line, exit code 2."""
        ended = command("serve", "--port", str(service.port), folder=tmp_path, **KEY)
        assert ended.returncode == 2
        assert f"127.0.0.1:{service.port}" in one_line(ended.stderr)

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("nonsense", "isn't a URL"),
            ("sqlite://", "names no file"),
            ("sqlite:///:memory:", "names no file"),
            ("mysql://127.0.0.1/x", "not mysql"),
            ("sqlite://x.db", "a path begins after three slashes: sqlite:///name.db."),
            (
                "sqlite:///missing/folder/x.db",
                "the folder missing/folder doesn't exist; create it.",
            ),
            ("sqlite:///.", "can't be opened"),
            ("sqlite:///text.db", "not a database (sqlite:///text.db); set"),
            ("postgresql://u:p@127.0.0.1:port/db", "its port isn't a number from 1 to 65535"),
            ("postgresql+pg8000://127.0.0.1/db", "asyncpg or psycopg"),
            (
                "postgresql://u:p@127.0.0.1:1/db",
                "(postgresql://127.0.0.1:1/db); check that the server",
            ),
            (
                "postgresql+psycopg://u:p@127.0.0.1:1/db",
                "(postgresql://127.0.0.1:1/db); check that",
            ),
            ("postgresql://u:p@no.invalid/db", "(postgresql://no.invalid/db); correct the host"),
        ],
    )
    def test_a_database_that_cannot_be(self, tmp_path: Path, url: str, says: str) -> None:
        """One line that says so, exit code 2; for `serve` and for `status`."""
        (tmp_path / "text.db").write_text("This is no database. " * 100)
        options = ("--database-url", url)
        ended = command("serve", *options, folder=tmp_path, **KEY)
        assert ended.returncode == 2
        assert says in one_line(ended.stderr)
        ended = command("status", *options, folder=tmp_path)
        assert ended.returncode == 2
        assert "missing/" not in url or "because the folder missing/folder doesn't; create" in (
            one_line(ended.stderr)
        )

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("LOGTO_WEBHOOKS_PORT", "eighty"),
            ("LOGTO_WEBHOOKS_PORT", "70000"),
            ("LOGTO_WEBHOOKS_PATH", "no-slash"),
            ("LOGTO_WEBHOOKS_PATH", "/a/{b:int}"),
            ("LOGTO_WEBHOOKS_SCHEMA", "a; DROP"),
            ("LOGTO_WEBHOOK_SIGNING_KEY", "key\udcff"),
            ("LOGTO_WEBHOOKS_LOG_FORMAT", "xml"),
            ("LOGTO_WEBHOOKS_MAX_BODY_BYTES", "0"),
            ("LOGTO_WEBHOOKS_SPOOL_DIR", "/dev/null/spool"),
        ],
    )
    def test_a_setting_that_cannot_be(self, tmp_path: Path, variable: str, value: str) -> None:
        """The line names the variable."""
        settings = KEY | {variable: value}
        ended = command("serve", folder=tmp_path, **settings)
        assert ended.returncode == 2
        assert variable in one_line(ended.stderr)


class TestStop:
    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_it_answers_what_it_has_and_ends(self, tmp_path: Path, how: signal.Signals) -> None:
        """Requests under way are answered, new ones refused, idle connections closed."""
        with Service(tmp_path) as service:
            idle = service.connect()
            delivery = make.user_created()
            with service.connect() as slow:
                signature = f"{HEADER}: {sign(delivery.body, SIGNING_KEY)}"
                slow.sendall(head(f"content-length: {len(delivery.body)}", signature))
                slow.sendall(delivery.body[:100])
                service.http.get("/healthz")
                started = time.monotonic()
                service.process.send_signal(how)
                later = threading.Timer(1, slow.sendall, [delivery.body[100:]])
                later.start()
                assert slow.recv(10_000).startswith(b"HTTP/1.1 200")
                later.join()
            assert service.process.wait(10) == 0
            assert time.monotonic() - started < 10
            idle.close()
            with pytest.raises(ConnectionRefusedError):
                service.connect()
            assert service.stored() == 1

    def test_it_survives_its_terminal_with_nohup(self, tmp_path: Path) -> None:
        """As it was asked to."""
        with Service(tmp_path, prefix="nohup") as service:
            service.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert service.post(make.user_created()).status_code == 200
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(10) == 0


def health(client: socket.socket) -> bytes:
    """Ask whether the service lives, and read the whole answer."""
    client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += client.recv(10_000)
    return answer
