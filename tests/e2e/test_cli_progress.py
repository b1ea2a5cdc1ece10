"""Long work in a terminal: a bar while it goes on; Ctrl-C ends it, and says how to go on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from logto_webhooks.testing.fake import FakeLogto, Faults
from tests.support.fake import credentials
from tests.support.inbox import fill
from tests.support.service import clean_environment, command
from tests.support.waiting import until

TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm"}
MANY = 3_000
PATIENCE_S = 120


class Running:
    """A command in a terminal, as far as it can tell; `interrupt` is Ctrl-C."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self._errors = folder / "errors"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "logto_webhooks", *arguments],
                cwd=folder,
                env=clean_environment(TERMINAL | environment),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def interrupt(self, once: str) -> int:
        """Wait until it said `once`, press Ctrl-C, and return the exit code. What it said is in the
        output of a test that fails."""
        try:
            until(lambda: once in self.errors, lambda: self.errors, seconds=PATIENCE_S)
        except AssertionError:
            self._kill()
            raise
        self._process.send_signal(signal.SIGINT)
        code = self.end()
        print(self.errors)
        return code

    def end(self) -> int:
        try:
            self.printed, _ = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise
        return self._process.returncode

    def _kill(self) -> None:
        """Leave nothing behind: a later test would be blamed for it."""
        self._process.kill()
        self._process.communicate()


@asynccontextmanager
async def slow_logto(folder: Path) -> AsyncIterator[FakeLogto]:
    """One with many users, that takes its time."""
    await asyncio.to_thread(command, "migrate", folder=folder)
    async with FakeLogto() as logto:
        logto.populate(MANY)
        logto.add_hook("http://127.0.0.1:9/api/webhooks/logto")
        logto.create_user()
        await logto.settle()
        logto.faults = Faults(slow_ms=300)
        yield logto


@pytest.mark.parametrize(
    ("arguments", "once", "says"),
    [
        (["backfill"], "/s", "Run it again within a day to continue."),
        (["reconcile", "--dry-run"], "/s", "Nothing was changed."),
        (
            ["recover"],
            "entries of Logto's log",
            "The deliveries recovered so far are stored. Run it again",
        ),
    ],
    ids=["backfill", "reconcile", "recover"],
)
def test_what_asks_logto_can_be_stopped(
    tmp_path: Path, arguments: list[str], once: str, says: str
) -> None:
    """A bar has a rate; Ctrl-C is exit code 130 and a line about how to go on."""

    async def live() -> None:
        async with slow_logto(tmp_path) as logto:
            running = Running(tmp_path, *arguments, **credentials(logto))
            assert await asyncio.to_thread(running.interrupt, once) == 130
            assert f"Stopped. {says}" in running.errors
            assert "Traceback" not in running.errors

    asyncio.run(live())


def test_a_backfill_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """With --json there is no bar, and nothing on standard error."""

    async def live() -> None:
        async with slow_logto(tmp_path) as logto:
            running = Running(tmp_path, "backfill", **credentials(logto))
            assert await asyncio.to_thread(running.interrupt, "/s") == 130
            logto.faults = Faults()
            again = Running(tmp_path, "backfill", "--json", **credentials(logto))
            assert await asyncio.to_thread(again.end) == 0
            assert '"resumed":true' in again.printed
            assert again.errors == ""

    asyncio.run(live())


def test_draining_can_be_stopped(tmp_path: Path) -> None:
    """It isn't taken for done: exit code 130, and how much is left."""
    fill(tmp_path, 5_000)
    running = Running(tmp_path, "worker", "--drain", "--log-level", "warning")
    assert running.interrupt("/s") == 130
    assert "deliveries pending; run it again to continue" in running.errors


def test_handlers_that_are_drained_can_be_stopped(tmp_path: Path) -> None:
    """The job in hand is done, the others wait."""
    (tmp_path / "app.py").write_text(
        "import asyncio\n"
        "from logto_webhooks import LogtoWebhooks\n"
        "logto = LogtoWebhooks(signing_key='k', database_url='sqlite:///logto-webhooks.db')\n"
        "@logto.on('User.Created', concurrency=1)\n"
        "async def slow(event):\n"
        "    await asyncio.sleep(0.2)\n"
    )
    command("migrate", folder=tmp_path)
    fill(tmp_path, 200, at=time.time_ns() // 1_000_000 + 60_000)
    running = Running(tmp_path, "worker", "--drain", "--app", "app:logto")
    assert running.interrupt("a handler finished") == 130
    assert '"waiting"' in command("jobs", "list", "--json", folder=tmp_path).stdout


def test_a_replay_of_many_can_be_stopped(tmp_path: Path) -> None:
    """What was done is told, with the id at which to go on."""
    fill(tmp_path, 3_000)
    ids = [str(number) for number in range(1, 3_001)]
    running = Running(tmp_path, "deliveries", "replay", "--sync-only", *ids)
    assert running.interrupt("/s") == 130
    assert "of 3000. Continue with the ID " in running.errors


def test_a_replay_of_all_that_match_can_be_stopped(tmp_path: Path) -> None:
    """With the id after which to go on."""
    fill(tmp_path, 3_000)
    running = Running(tmp_path, "deliveries", "replay", "--sync-only", "--event", "User.Created")
    assert running.interrupt("/s") == 130
    assert "of 3000. Continue with --after " in running.errors


def test_a_run_for_existing_rows_can_be_stopped(tmp_path: Path) -> None:
    """It goes on when it is run again."""
    fill(tmp_path, 300, at=1_795_485_335_917)
    (tmp_path / "app.py").write_text(
        "from logto_webhooks import LogtoWebhooks\n"
        "logto = LogtoWebhooks.from_env()\n"
        "@logto.on('LocalUserCreated', name='greet')\n"
        "def greet(): ...\n"
    )
    command("worker", "--drain", "--app", "app:logto", folder=tmp_path)
    running = Running(tmp_path, "handlers", "run", "greet", "--rate", "10")
    assert running.interrupt("/s") == 130
    assert "Stopped. The jobs made so far are stored. Run it again for the rest." in running.errors
