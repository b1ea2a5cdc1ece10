"""The commands, as a person runs them: real processes."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import subprocess
import sys
from functools import partial
from itertools import takewhile
from pathlib import Path

import msgspec
import pytest

import logto_webhooks
from logto_webhooks.events import BY_NAME
from logto_webhooks.ingest.spool import SpoolDirectory
from logto_webhooks.settings import VARIABLES
from logto_webhooks.signing_keys import sign
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.inbox import fill
from tests.support.marks import need
from tests.support.service import (
    PATH,
    Service,
    clean_environment,
    command,
    one_line,
    wait_until_done,
)
from tests.support.stores import delivery
from tests.support.waiting import until

PACKAGE = Path(logto_webhooks.__file__).parent
KEY = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}


def schema_of(database: sqlite3.Connection) -> list[tuple[str, str]]:
    """All tables and indexes, whatever the spaces."""
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
    return [(name, " ".join(sql.split())) for name, sql in database.execute(query)]


class TestInit:
    def test_it_explains_every_setting(self, tmp_path: Path) -> None:
        """And what it wrote is read by the other commands."""
        made = command("init", folder=tmp_path)
        assert made.returncode == 0
        text = (tmp_path / ".env").read_text()
        for variables in VARIABLES.values():
            assert variables[0] in text
        refused = command("serve", folder=tmp_path)
        assert "No signing key" in one_line(refused.stderr)
        key = "LOGTO_WEBHOOK_SIGNING_KEY="
        (tmp_path / ".env").write_text(text.replace(key, f"{key}a-key-from-the-file"))
        signed = command("sign", str(tmp_path / ".env"), folder=tmp_path)
        assert signed.stdout.strip() == sign(
            (tmp_path / ".env").read_bytes(), "a-key-from-the-file"
        )

    def test_it_never_overwrites(self, tmp_path: Path) -> None:
        """A file that exists is left as it is, also where it can't be written."""
        (tmp_path / ".env").write_text("mine")
        refused = command("init", folder=tmp_path)
        assert refused.returncode == 2
        assert ".env already exists" in one_line(refused.stderr)
        assert (tmp_path / ".env").read_text() == "mine"
        nowhere = command("init", "--file", "missing/folder/.env", folder=tmp_path)
        assert nowhere.returncode == 2
        assert "missing/folder/.env" in one_line(nowhere.stderr)

    def test_a_file_is_taken_as_it_is_written(self, tmp_path: Path) -> None:
        """No variable is put into a key; an empty one of the environment hides nothing."""
        (tmp_path / ".env").write_text("\ufeffLOGTO_WEBHOOK_SIGNING_KEY=a-long-${HOME}-key\n")
        body = tmp_path / "body"
        body.write_text("{}")
        signed = command("sign", "body", folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY="")
        assert signed.stdout.strip() == sign(b"{}", "a-long-${HOME}-key")
        (tmp_path / ".env").write_bytes(b"LOGTO_WEBHOOK_SIGNING_KEY=\xff\n")
        refused = command("sign", "body", folder=tmp_path)
        assert refused.returncode == 2
        assert "UTF-8" in one_line(refused.stderr)

    def test_an_env_file_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        """It was asked for."""
        refused = command("status", "--env-file", "other.env", folder=tmp_path)
        assert refused.returncode == 2
        assert "other.env" in one_line(refused.stderr)


class TestMigrate:
    def test_the_statements_make_the_schema(self, tmp_path: Path) -> None:
        """What `--sql` prints, run by hand, is what `migrate` does."""
        printed = command("migrate", "--sql", folder=tmp_path)
        assert printed.returncode == 0
        assert not (tmp_path / "logto-webhooks.db").exists()
        by_hand = sqlite3.connect(":memory:")
        by_hand.executescript(printed.stdout)
        assert command("migrate", folder=tmp_path).returncode == 0
        migrated = sqlite3.connect(tmp_path / "logto-webhooks.db")
        assert schema_of(by_hand) == schema_of(migrated)
        migrated.close()
        by_hand.close()

    def test_a_second_time_changes_nothing(self, tmp_path: Path) -> None:
        """And says at which version the file is."""
        first = command("migrate", folder=tmp_path)
        fill(tmp_path, 2)
        second = command("migrate", folder=tmp_path)
        assert first.stdout == second.stdout
        assert "is at version 0001" in second.stdout
        assert '"pending":2' in command("status", "--json", folder=tmp_path).stdout


class TestStatus:
    def test_json_has_its_documented_shape(self, tmp_path: Path) -> None:
        """Scripts rely on it."""
        fill(tmp_path, 3)
        status = msgspec.json.decode(command("status", "--json", folder=tmp_path).stdout)
        assert status.pop("oldest_pending_s") > 0
        assert status == {
            "deliveries": {"pending": 3, "done": 0, "ignored": 0, "dead": 0},
            "doubtful": 0,
            "refetch": 0,
            "recovered": 0,
            "complete_up_to": None,
            "reconciled_at": None,
            "silent_since": None,
            "jobs": {"waiting": 0, "done": 0, "dead": 0, "discarded": 0},
            "unrunnable": {},
            "spooled": 0,
            "memberships_to_end": 0,
            "mappings": [],
            "waiting": [],
        }

    def test_without_a_database_it_says_what_to_run(self, tmp_path: Path) -> None:
        """And makes none."""
        for looking in (["status"], ["users", "x"], ["organizations", "x"], ["worker"]):
            refused = command(*looking, folder=tmp_path)
            assert refused.returncode == 2
            line = one_line(refused.stderr)
            assert "logto-webhooks serve or migrate creates it" in line
            assert f"doesn't exist in {tmp_path}: run the command in the service's folder" in line
        assert list(tmp_path.iterdir()) == []

    def test_without_a_database_it_counts_the_spool(self, tmp_path: Path) -> None:
        """Before it says why there is nothing else."""
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        spool.write([delivery(make.user_created().body) for _ in range(2)])
        options = ("--spool-dir", "spool")
        refused = command("status", *options, folder=tmp_path)
        assert refused.returncode == 2
        assert refused.stdout.split() == ["deliveries", "in", "the", "spool", "2"]
        assert "migrate creates it" in one_line(refused.stderr)
        as_json = command("status", *options, "--json", folder=tmp_path)
        assert (as_json.returncode, as_json.stdout) == (2, '{"spooled":2}\n')


def test_a_command_that_is_misspelled_is_one_sentence(tmp_path: Path) -> None:
    """A question ends with its mark alone."""
    refused = command("serv", folder=tmp_path)
    assert "'users'? See: " in one_line(refused.stderr)


def test_credentials_that_are_missing_are_named(tmp_path: Path) -> None:
    """Those alone."""
    some = {"LOGTO_ENDPOINT": "http://127.0.0.1:1"}
    refused = command("endpoint", "list", folder=tmp_path, **some)
    assert "missing: LOGTO_M2M_APP_ID, LOGTO_M2M_APP_SECRET. In" in one_line(refused.stderr)


def test_a_logto_that_is_not_there_says_what_to_check(tmp_path: Path) -> None:
    """The setting."""
    some = {"LOGTO_ENDPOINT": "http://127.0.0.1:1", "LOGTO_M2M_APP_ID": "id"}
    secret = {"LOGTO_M2M_APP_SECRET": "a-secret-of-an-application"}
    refused = command("endpoint", "list", folder=tmp_path, **some, **secret)
    assert "Check LOGTO_ENDPOINT" in one_line(refused.stderr)


def test_a_folder_that_takes_no_file_is_not_said_to_be_missing(tmp_path: Path) -> None:
    """The system's reason is."""
    refused = command("migrate", "--database-url", "sqlite:////proc/x.db", folder=tmp_path)
    assert "/proc/x.db can't be opened for writing (No such file" in one_line(refused.stderr)
    refused = command("migrate", "--database-url", "sqlite:///missing/x.db", folder=tmp_path)
    assert "the folder missing doesn't exist; create it" in one_line(refused.stderr)


def test_a_worker_drains_the_inbox(tmp_path: Path) -> None:
    """And ends, with everything applied."""
    fill(tmp_path, 700)
    drained = command("worker", "--drain", "--log-format", "json", folder=tmp_path)
    assert drained.returncode == 0
    first, *lines, last = [msgspec.json.decode(line) for line in drained.stderr.splitlines()]
    assert first["message"] == "working on logto-webhooks.db"
    assert last["message"] == "nothing is pending"
    assert len(lines) == 700
    assert {"id", "event", "subject", "outcome", "took_ms"} < lines[0].keys()
    assert {line["outcome"] for line in lines} == {"applied"}
    assert '"done":700' in command("status", "--json", folder=tmp_path).stdout


def test_one_worker_works_on_a_file_and_the_next_takes_over(tmp_path: Path) -> None:
    """The others are spares: `serve` works, `worker` waits until it is gone."""
    with Service(tmp_path) as service:
        spare = subprocess.Popen(
            [sys.executable, "-m", "logto_webhooks", "worker"],
            cwd=tmp_path,
            env=clean_environment({}),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert spare.stderr
        standby = "on standby: another process works on logto-webhooks.db\n"
        assert spare.stderr.readline().endswith(standby)
        for _ in range(20):
            assert service.post(make.user_created()).status_code == 200
        wait_until_done(service)
        until(lambda: service.log.count("outcome=applied") == 20, lambda: service.log)
        service.process.kill()
        service.process.wait()
        fill(tmp_path, 1)
        assert spare.stderr.readline().endswith("working on logto-webhooks.db\n")
        assert "outcome=applied" in spare.stderr.readline()
        spare.terminate()
        assert spare.wait(10) == 0
        spare.stderr.close()


def test_a_second_service_says_that_it_is_on_standby(tmp_path: Path) -> None:
    """And when it takes over."""
    with Service(tmp_path) as first, Service(tmp_path) as second:
        second.wait_for_log("on standby: another process works on logto-webhooks.db")
        assert second.post(make.user_created()).status_code == 200
        first.process.kill()
        second.wait_for_log("working on logto-webhooks.db")
        second.wait_for_log("outcome=applied")
        assert "standby" not in first.log


def test_a_record_that_deliveries_only_refer_to(tmp_path: Path) -> None:
    """It has no row, but a history."""
    delivery = make.organization_membership_updated(id="acme", addedUserIds=["ghost"])
    with Service(tmp_path) as service:
        assert service.post(delivery).status_code == 200
        wait_until_done(service)
    for kind, id in (("user", "ghost"), ("organization", "acme")):
        found = command(f"{kind}s", id, folder=tmp_path)
        assert found.returncode == 1
        assert one_line(found.stderr).endswith(
            f"No {kind} found for '{id}', but deliveries refer to this ID. To see them, run: "
            f"logto-webhooks explain {kind} {id}"
        )
        assert command("explain", kind, id, folder=tmp_path).returncode == 0
    found = command("users", "nobody", folder=tmp_path)
    assert one_line(found.stderr) == "No user found for 'nobody'."


class TestTrigger:
    def test_every_event_is_sent_and_applied(self, tmp_path: Path) -> None:
        """To the local service, signed with the configured key; the rows are there."""
        with Service(tmp_path) as service:
            port = {"LOGTO_WEBHOOKS_PORT": str(service.port)} | KEY
            sent = command("trigger", "User.Created", "--count", "3", folder=tmp_path, **port)
            assert (sent.returncode, sent.stdout.count(" 200 ")) == (0, 3)
            fields = ["--data", "email=ana@example.com", "--data", 'customData={"n":1}']
            sent = command("trigger", "PostSignIn", *fields, "--id", "ana", folder=tmp_path, **port)
            assert sent.returncode == 0
            url = ["--to", f"{service.url}{PATH}/"]
            for name in list(BY_NAME)[:3]:
                assert command("trigger", name, *url, folder=tmp_path, **KEY).returncode == 0
            wait_until_done(service)
            found = command("users", "ana@example.com", "--json", folder=tmp_path)
            [user] = msgspec.json.decode(found.stdout)
            assert user["row"]["logto_user_id"] == "ana"
            assert user["row"]["custom_data"] == {"n": 1, "logtoUserId": "ana"}
            assert "ana@example.com" in command("users", "ana", folder=tmp_path).stdout
            line = service.wait_for_log("user:ana")
            assert re.search(r"id=\d+ event=PostSignIn subject=user:ana outcome=applied took", line)
            assert "ana@example.com" not in service.log

    def test_who_is_not_found_is_exit_code_1(self, tmp_path: Path) -> None:
        """With a line that says so; JSON is an empty list."""
        fill(tmp_path, 1)
        for kind in ("users", "organizations"):
            nobody = command(kind, "nobody", folder=tmp_path)
            assert (nobody.returncode, nobody.stdout) == (1, "")
            assert "found for 'nobody'" in nobody.stderr
            assert command(kind, "nobody", "--json", folder=tmp_path).stdout == "[]\n"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["User.Create"], "Did you mean User.Created?"),
            (["User.Created", "--data", "noequals"], "isn't key=value"),
            (["User.Created", "--data", "name.x=1"], "name has no fields"),
            (["User.Created", "--to", "nonsense"], "--to can't be used: 'nonsense' must look like"),
            (["User.Created", "--to", "http://127.0.0.1:99999"], "must look like http://127.0.0.1"),
            (["User.Created", "--data", "a=\udcff"], "isn't UTF-8"),
            (["User.Created", "--to", "http://127.0.0.1:1/"], "serve` is running there"),
        ],
    )
    def test_what_cannot_be_sent_is_one_line(
        self, tmp_path: Path, arguments: list[str], says: str
    ) -> None:
        """And exit code 2."""
        refused = command("trigger", *arguments, folder=tmp_path, **KEY)
        assert refused.returncode == 2
        assert says in one_line(refused.stderr)

    def test_what_the_sync_will_refuse_is_a_warning(self, tmp_path: Path) -> None:
        """The answer can't tell: it is 200 as soon as the delivery is stored."""
        with Service(tmp_path) as service:
            options = ["--to", f"{service.url}{PATH}", "--data", "isSuspended=yes"]
            sent = command("trigger", "User.Created", *options, folder=tmp_path, **KEY)
            assert sent.returncode == 0
            assert "isSuspended" in one_line(sent.stderr)
            assert "ERROR" in service.wait_for_log("outcome=dead")
            shown = command("status", folder=tmp_path).stdout
            assert "doubtful: dead delivery" in shown

    def test_a_refused_delivery_is_exit_code_1(self, tmp_path: Path) -> None:
        """Signed with another key, or sent elsewhere; it is said what to do."""
        with Service(tmp_path) as service:
            for path, key, status, says in (
                (
                    PATH,
                    "another-key-0123456789",
                    "401",
                    "the service doesn't accept this signing key",
                ),
                ("/wrong", SIGNING_KEY, "404", "the whole URL with --to"),
            ):
                options, keys = ["--to", f"{service.url}{path}"], {"LOGTO_WEBHOOK_SIGNING_KEY": key}
                refused = command("trigger", "User.Created", *options, folder=tmp_path, **keys)
                assert refused.returncode == 1
                assert status in refused.stdout
                assert says in one_line(refused.stderr)


KEYS = f"{SIGNING_KEY},other-key-0123456789"


def test_sign_takes_standard_input(tmp_path: Path) -> None:
    """As Logto signs."""
    signed = subprocess.run(
        [
            sys.executable,
            "-m",
            "logto_webhooks",
            "sign",
            "--signing-key",
            f"{SIGNING_KEY},other-key-0123456789",
        ],
        input=b"body",
        capture_output=True,
        check=True,
        cwd=tmp_path,
    )
    assert signed.stdout.decode().strip() == sign(b"body", SIGNING_KEY)


def test_several_found_are_a_line_each(tmp_path: Path) -> None:
    """And who finds more than the limit is told."""
    fill(tmp_path, 5)
    assert command("worker", "--drain", folder=tmp_path).returncode == 0
    shown = command("users", "", "--limit", "4", folder=tmp_path)
    assert len(shown.stdout.splitlines()) == 5
    assert "more than 4" in shown.stderr
    [first, *_] = msgspec.json.decode(command("users", "", "--json", folder=tmp_path).stdout)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["row"]["created_at"])
    assert first["row"]["deleted_at"] is None
    local_id = first["row"]["id"]
    database = sqlite3.connect(tmp_path / "logto-webhooks.db")
    assert database.execute("SELECT 1 FROM logto_users WHERE id = ?", [local_id]).fetchall()
    database.close()


def test_it_tells_its_version(tmp_path: Path) -> None:
    """As installed."""
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", command("--version", folder=tmp_path).stdout)


class TestDemo:
    @pytest.mark.parametrize("name", ["calm", "people"])
    def test_it_ends_without_an_unexplained_difference(self, tmp_path: Path, name: str) -> None:
        """Over real HTTP, shuffled and with duplicates; and leaves nothing behind."""
        options = ["--once", "--port", "0", "--seed", "7", "--history", name]
        shown = command("demo", *options, folder=tmp_path)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert " 0 other records differ." in shown.stdout
        for outcome in ("applied", "duplicate", "test", "stale", "unknown"):
            assert outcome in shown.stdout
        assert shown.stderr == ""
        assert list(tmp_path.iterdir()) == []

    def test_a_port_that_is_taken_is_one_line(self, tmp_path: Path) -> None:
        """And exit code 2."""
        with Service(tmp_path) as service:
            refused = command("demo", "--once", "--port", str(service.port), folder=tmp_path)
        assert refused.returncode == 2
        assert one_line(refused.stderr).endswith("Choose another with --port.")

    def test_it_takes_a_free_port_if_the_usual_one_is_in_use(self, tmp_path: Path) -> None:
        """And says so."""
        with socket.socket() as occupant:
            with contextlib.suppress(OSError):  # something else may listen there already
                occupant.bind(("127.0.0.1", 8787))
                occupant.listen()
            shown = command("demo", "--once", "--history", "people", folder=tmp_path)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert "Port 8787 is in use. Using " in shown.stdout

    @pytest.mark.parametrize("way", ["console script", "module", "relative import path"])
    def test_what_it_suggests_works(self, tmp_path: Path, way: str) -> None:
        """Pasted into a terminal in another folder, however the demo was started."""
        need("process")
        folder = Path(sys.executable).parent
        program = [str(folder / "logto-webhooks")]
        environment = clean_environment({})
        if way != "console script":
            program = [sys.executable, "-m", "logto_webhooks"]
        if way == "relative import path":
            environment["PYTHONPATH"] = os.path.relpath(PACKAGE.parent, tmp_path)
        (tmp_path / "elsewhere").mkdir()
        with subprocess.Popen(
            [*program, "demo", "--port", "0", "--history", "people"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as demo:
            try:
                assert demo.stdout
                printed = list(takewhile(lambda line: "Ctrl-C" not in line, demo.stdout))
                lines = printed[printed.index("Try in another terminal:\n") :]
                pasted = [line.strip() for line in lines if line.startswith("  ")]
                exports = [line for line in pasted if line.startswith("export ")]
                for line in pasted[len(exports) :]:
                    until(partial(runs, "\n".join([*exports, line]), tmp_path / "elsewhere"))
            finally:
                demo.terminate()


def runs(lines: str, folder: Path) -> bool:
    """Whether a shell without the demo's environment runs these lines."""
    environment = clean_environment({})
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(["sh", "-ec", lines], cwd=folder, env=environment, capture_output=True)
    # The user of an earlier line may not be there yet.
    assert not ended.stderr or ended.stderr.startswith(b"No user found"), ended.stderr
    return ended.returncode == 0


def test_an_address_that_is_not_here_is_one_line(tmp_path: Path) -> None:
    """And exit code 2."""
    refused = command("serve", "--host", "192.0.2.1", folder=tmp_path, **KEY)
    assert refused.returncode == 2
    assert refused.stderr.endswith("Choose another with --host.\n")
