"""The service on a PostgreSQL that isn't always well: a server of its own, so that it can be."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
import sqlalchemy as sa

from logto_webhooks.database import migrate
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.crash.databases import PostgresVictim
from tests.crash.harness import free_port
from tests.support import postgres
from tests.support.service import PATH, HastyService, Service, command, one_line
from tests.support.waiting import until

SCHEMA = "logto"
SERVICES = b"FROM pg_stat_activity WHERE application_name = 'logto-webhooks'"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresVictim]:
    """A server, with the schema in it."""
    victim = PostgresVictim()
    yield victim
    victim.close()


@pytest.fixture
def options(server: PostgresVictim, tmp_path: Path) -> list[str]:
    """The options that name the database, migrated."""
    named = ["--database-url", server.url, "--schema", SCHEMA]
    assert command("migrate", *named, folder=tmp_path).returncode == 0
    return named


def test_migrate_says_which_schema_it_created(server: PostgresVictim, tmp_path: Path) -> None:
    """Once: it may be misspelled."""
    named = ["--database-url", server.url, "--schema", "mispelled"]
    first, second = (command("migrate", *named, folder=tmp_path) for _ in range(2))
    created, line = first.stdout.splitlines()
    assert created == "Created the schema mispelled."
    assert line.endswith(", schema mispelled, is at version 0001.")
    assert second.stdout == f"{line}\n"


def execute(server: PostgresVictim, *statements: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def count(server: PostgresVictim, table: str) -> int:
    with psycopg.connect(server.url) as connection:
        row = connection.execute(f"SELECT count(*) FROM {SCHEMA}.{table}".encode()).fetchone()
    assert row
    return int(row[0])


def eventually(condition: Callable[[], bool], service: Service) -> None:
    until(condition, lambda: service.log)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def accepted(service: Service) -> bool:
    return service.post(make.user_created()).status_code == 200


def database_up(service: Service) -> str:
    text = service.http.get("/metrics").text
    return text.partition("\nlogto_webhooks_database_up ")[2].partition("\n")[0]


def test_without_its_schema_it_refuses_and_says_what_to_run(
    server: PostgresVictim, tmp_path: Path
) -> None:
    """`serve` and `worker` never migrate a server by themselves."""
    named = ["--database-url", server.url, "--schema", "another"]
    for each in (["serve", *named], ["worker", *named[:4]], ["status", *named[:4]]):
        refused = command(*each, folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=SIGNING_KEY)
        assert refused.returncode == 2
        assert "Run: logto-webhooks migrate" in one_line(refused.stderr)


def test_it_runs_in_a_schema_of_its_own(
    server: PostgresVictim, options: list[str], tmp_path: Path
) -> None:
    """Deliveries, records and rows; NUL is left out where PostgreSQL can't hold it."""
    with Service(tmp_path, *options) as service:
        odd = make.user_created(id="nul", name="a\0b", customData={"k\0": ["\0", 1]})
        assert service.post(odd).status_code == 200
        assert service.http.get("/readyz").json() == {"ready": True}
        eventually(lambda: count(server, "logto_users") > 0, service)
        found = command("users", "nul", "--json", *options, folder=tmp_path)
        assert '"name":"ab"' in found.stdout
        assert '"custom_data":{"k":["",1],"logtoUserId":"nul"}' in found.stdout
        assert "postgres" in service.log
    with psycopg.connect(server.url) as connection:
        in_public = "SELECT to_regclass('public.logto_deliveries')"
        assert connection.execute(in_public.encode()).fetchone() == (None,)


def test_many_may_migrate_at_once(server: PostgresVictim, tmp_path: Path) -> None:
    """One does, the others wait for it."""
    named = ["--database-url", server.url, "--schema", "together"]
    with ThreadPoolExecutor(4) as threads:
        ended = list(threads.map(lambda _: command("migrate", *named, folder=tmp_path), range(4)))
    assert [each.returncode for each in ended] == [0] * 4, [each.stderr for each in ended]


def test_printed_statements_make_the_schema(server: PostgresVictim, tmp_path: Path) -> None:
    """For who lets nobody else change a database."""
    named = ["--database-url", server.url, "--schema", "by_hand"]
    printed = command("migrate", "--sql", *named, folder=tmp_path)
    execute(server, printed.stdout)
    assert '"done":0' in command("status", "--json", *named, folder=tmp_path).stdout


VERSIONS = [("0000", False), ("0002", True), ("9999", True), ("abc", False), ("00002", False)]


@pytest.mark.parametrize(("version", "starts"), VERSIONS)
def test_an_older_schema_is_refused_and_a_newer_one_is_good(
    server: PostgresVictim, options: list[str], tmp_path: Path, version: str, starts: bool
) -> None:
    """A release can be rolled back, with `migrate` before `serve`, as in every deployment."""
    table = f"{SCHEMA}.logto_schema_version"
    execute(server, f"UPDATE {table} SET version_num = '{version}'")
    try:
        migrated = command("migrate", *options, folder=tmp_path)
        looked = command("status", *options, folder=tmp_path)
        assert migrated.returncode == looked.returncode == (0 if starts else 2)
        if starts:
            assert f"is at version {version}.\nA newer release" in migrated.stdout
            with Service(tmp_path, *options) as service:
                assert accepted(service)
        else:
            assert f"version {version}" in one_line(looked.stderr)
            assert f"No release has version {version}: " in one_line(migrated.stderr)
        with psycopg.connect(server.url) as connection:
            read = connection.execute(f"SELECT version_num FROM {table}".encode())
            assert read.fetchall() == [(version,)]
    finally:
        execute(server, f"UPDATE {table} SET version_num = '{migrate.head()}'")


def test_a_server_that_is_stopped_is_a_503_and_recovers(
    server: PostgresVictim, options: list[str], tmp_path: Path
) -> None:
    """What was answered 200 before is applied after."""
    with HastyService(tmp_path, *options) as service:
        before = count(server, "logto_deliveries")
        stored = sum(accepted(service) for _ in range(20))
        server.crash()
        try:
            answer = service.post(make.user_created())
            assert (answer.status_code, answer.json()) == (503, {"error": "not_stored"})
            assert int(answer.headers["retry-after"]) > 0
            assert service.http.get("/readyz").status_code == 503
            assert service.http.get("/healthz").status_code == 200
            assert database_up(service) == "0.0"
            assert "ERROR" in service.wait_for_log("answered 503")
        finally:
            server.start()
        eventually(lambda: accepted(service), service)
        eventually(lambda: database_up(service) == "1.0", service)
        assert service.http.get("/readyz").status_code == 200
        assert count(server, "logto_deliveries") >= before + stored + 1
        pending = "SELECT count(*) FROM logto.logto_deliveries WHERE state = 'pending'"

        def drained() -> bool:
            with psycopg.connect(server.url) as connection:
                return connection.execute(pending.encode()).fetchone() == (0,)

        eventually(drained, service)


def test_a_server_that_is_read_only_is_a_503_and_recovers(
    server: PostgresVictim, options: list[str], tmp_path: Path
) -> None:
    """As after a failover, until the connections are made anew."""
    with HastyService(tmp_path, *options) as service:
        assert accepted(service)
        read_only = "ALTER SYSTEM SET default_transaction_read_only = "
        execute(server, f"{read_only}on", "SELECT pg_reload_conf()")
        try:
            eventually(lambda: not accepted(service), service)
            service.wait_for_log("read-only")
        finally:
            # In a transaction that says so itself, else this is refused, too.
            execute(server, "SET default_transaction_read_only = off", f"{read_only}off")
            execute(server, "SELECT pg_reload_conf()")
        eventually(lambda: accepted(service), service)


def test_a_server_without_free_connections_is_a_503_and_recovers(
    server: PostgresVictim, options: list[str], tmp_path: Path
) -> None:
    """The service's own are gone, and others took all there are."""
    with HastyService(tmp_path, *options) as service:
        assert accepted(service)
        with contextlib.ExitStack() as others:
            watch = others.enter_context(psycopg.connect(server.url, autocommit=True))

            def take_all() -> bool:
                watch.execute(b"SELECT pg_terminate_backend(pid) " + SERVICES)
                with contextlib.suppress(psycopg.OperationalError):
                    while True:
                        others.enter_context(psycopg.connect(server.url))
                return watch.execute(b"SELECT count(*) " + SERVICES).fetchone() == (0,)

            eventually(take_all, service)
            assert service.post(make.user_created()).status_code == 503
            service.wait_for_log("too many clients")
        eventually(lambda: accepted(service), service)


def test_a_slow_commit_is_a_503_in_time(
    server: PostgresVictim, options: list[str], tmp_path: Path
) -> None:
    """Logto waits 10 s; who holds the table for longer is not waited for."""
    with Service(tmp_path, *options) as service:
        assert accepted(service)
        with psycopg.connect(server.url) as other:
            other.execute(b"LOCK TABLE logto.logto_deliveries")
            started = time.monotonic()
            assert service.post(make.user_created()).status_code == 503
            assert time.monotonic() - started < 10
        eventually(lambda: accepted(service), service)


class BriefService(Service):
    """One that lets requests end within 3 s when it stops, not 5."""

    constants: ClassVar = {
        "logto_webhooks.server:GRACE_S": 3,
        "logto_webhooks.server:ANSWER_S": 2.0,
    }


@pytest.mark.parametrize("spools", [False, True])
def test_a_service_that_stops_answers_all_and_tells_what_is_lost(
    server: PostgresVictim, options: list[str], tmp_path: Path, spools: bool
) -> None:
    """Requests wait for a locked table, and one body never ends. None is a 500."""
    count, spool = 30, tmp_path / "spool"
    more = ["--spool-dir", str(spool)] if spools else []
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(BriefService(tmp_path, *options, *more))
        other = stack.enter_context(psycopg.connect(server.url))
        other.execute(b"LOCK TABLE logto.logto_deliveries")
        sent = [make.user_created() for _ in range(count + 1)]
        connections = [stack.enter_context(service.connect()) for _ in sent]
        for connection, request in zip(connections, sent, strict=True):
            connection.sendall(make_head(request))
            assert connection.recv(65_536).startswith(b"HTTP/1.1 100 ")  # it is in hand
        slow = connections.pop()
        for connection, request in zip(connections, sent, strict=False):
            connection.sendall(request.body)
        service.process.terminate()
        answers = [connection.recv(65_536) for connection in connections]
        slowly = slow.recv(65_536)
        assert service.process.wait(timeout=30) == 0
    refusals = answers * (not spools) + [slowly]
    assert {each.partition(b"\r\n")[0] for each in refusals} == {
        b"HTTP/1.1 503 Service Unavailable"
    }
    assert all(b"\r\nretry-after: " in each for each in refusals)
    assert "Traceback" not in service.log
    lost = [line for line in service.log.splitlines() if "deliveries were lost" in line]
    if spools:
        assert all(each.startswith(b"HTTP/1.1 200 ") for each in answers)
        assert (len(list(spool.glob("*.json"))), lost) == (count, [])
    else:
        assert f" count={count} " in one_line("\n".join(lost))


def make_head(request: SignedRequest) -> bytes:
    """Make the head of a request that waits before it sends its body."""
    lines = [f"POST {PATH} HTTP/1.1", "host: x", "expect: 100-continue"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    lines += [f"content-length: {len(request.body)}", "", ""]
    return "\r\n".join(lines).encode()


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer isn't installed")
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_it_runs_through_pgbouncer_in_transaction_mode(
    server: PostgresVictim, options: list[str], tmp_path: Path, driver: str
) -> None:
    """Which gives each transaction another connection."""
    upstream = sa.make_url(server.url)
    port = free_port()
    settings = tmp_path / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\npostgres = host={upstream.query['host']} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 3\nunix_socket_dir =\n"
    )
    settings.chmod(0o644)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    as_other = ["-u", "pgserver"] if os.geteuid() == 0 else []  # who runs the server
    bouncer = subprocess.Popen(
        ["pgbouncer", "-q", *as_other, str(settings)], stderr=subprocess.DEVNULL
    )
    url = f"postgresql+{driver}://postgres@127.0.0.1:{port}/postgres?pgbouncer=true"
    try:
        until(lambda: listens(port))
        with Service(tmp_path, "--database-url", url, "--schema", SCHEMA) as service:
            before = count(server, "logto_users")
            with ThreadPoolExecutor(8) as threads:
                sent = list(threads.map(lambda _: accepted(service), range(200)))
            assert sent == [True] * 200
            eventually(lambda: count(server, "logto_users") >= before + 200, service)
            assert service.http.get("/readyz").status_code == 200
    finally:
        bouncer.terminate()
        bouncer.wait()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"username": "nobody_here", "password": "s-e-c"},
            "correct user and password in --database-url",
        ),
        ({"database": "not_there"}, "/not_there); create it, then run: logto-webhooks migrate"),
    ],
)
def test_a_url_that_leads_nowhere_says_what_to_do(
    tmp_path: Path, driver: str, wrong: dict[str, Any], says: str
) -> None:
    """Whatever the driver, and without the password."""
    url = postgres.server_url().set(drivername=f"postgresql+{driver}", **wrong)
    whole = url.render_as_string(hide_password=False)
    refused = command("status", "--database-url", whole, folder=tmp_path)
    assert refused.returncode == 2
    assert says in one_line(refused.stderr)
    assert "s-e-c" not in refused.stderr
