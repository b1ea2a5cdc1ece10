"""Run what a page of the docs shows, as its reader would. All tests of pages use this module.

- `Page.follow(text)` does what the text says, block by block: a file is written (its name stands in
  the prose before it), `sh` is run, and `text` is what the command before it must have printed.
- `Page.write`, `run` and `start` do one such step; what is started runs on until `end`.
- `run_command` runs a line of `logto-webhooks` in this process, where a page has dozens of them.
- `is_alike` compares what a page says with what was printed, but for what differs each time.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa

from logto_webhooks import cli
from tests.support import postgres
from tests.support.servers import free_port
from tests.support.service import clean_environment
from tests.support.waiting import until

WIDTH: Final = 120
CUT: Final = "…"  # a line that stands for any number of lines
_UNSETTLED: Final = """
SELECT EXISTS (SELECT 1 FROM logto_deliveries WHERE state = 'pending')
    OR EXISTS (SELECT 1 FROM logto_jobs WHERE state = 'waiting')
"""
# What runs on, in a terminal of its own, and what it says once it does.
_RUN_ON: Final = {"logto-webhooks serve": "listening on", "python logto.py": "Logto is at"}
_ENDED: Final = (0, 130, -signal.SIGINT)
# These set up logging, or wait for signals: a process of their own is for them.
_APART: Final = ("demo", "listen", "worker")
# What differs each time.
_VARYING: Final = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "TIME"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"[0-9a-f]{64}", "DIGEST"),
    (r"(SIGNING_KEY=)[\w,]+", "KEY"),
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"(attempts\W+)\d+", "ATTEMPTS"),
    (r"(took_ms=|after )\d+(\.\d+)?", "TOOK"),
    (r"[ \t]+", " "),
)


class Started:
    """A process that runs on, and what it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()


class Page:
    """A page that is followed in a folder, on ports of its reader's own.

    `own` is what the reader has instead of what the page names: her database, say. With an `engine`
    of that database, each command is done once no delivery and no job waits.
    """

    def __init__(
        self,
        folder: Path,
        own: Mapping[str, str] | None = None,
        *,
        logs: Path | None = None,
        engine: sa.Engine | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`logs` is where what is started writes its log, by default the folder."""
        self._folder = folder
        self._logs = logs or folder
        self._engine = engine
        port = str(free_port())
        self._own_texts = {"127.0.0.1:8787": f"127.0.0.1:{port}", **(own or {})}
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]
        if engine is not None:
            path.append(postgres.programs())
        self._environment = clean_environment(
            {
                "PATH": os.pathsep.join(path),
                "LOGTO_WEBHOOKS_PORT": port,
                "COLUMNS": str(WIDTH),
                **(environment or {}),
            }
        )
        self._started: dict[str, Started] = {}
        self._ended: list[Started] = []

    def follow(self, text: str) -> list[str]:
        """Do what a text says, and return what each of its commands printed."""
        printed = [""]
        for language, block, name in _blocks(text):
            if language == "text":
                assert is_alike(block, printed[-1]), printed[-1]
            elif language != "sh":
                assert name, block
                self.write(name, block)
            elif program := next((name for name in _RUN_ON if block.startswith(name)), None):
                self.interrupt(program)
                self.start(program, block, _RUN_ON[program])
            else:
                printed.append(self.run(block))
        return printed[1:]

    def write(self, name: str, text: str) -> None:
        """A file that the page names."""
        (self._folder / name).write_text(self._replace_own(text))

    def run(self, block: str) -> str:
        """A block of the shell, to its good end; return what it printed."""
        done = subprocess.run(
            ["sh", "-ec", self._replace_own(block)],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        fine = (0, 1) if "doctor" in block else (0,)  # it may warn
        assert done.returncode in fine, f"{block}\n{done.stdout}"
        if self._engine is not None:
            until(self._is_settled, self._read_logs)
        return done.stdout

    def start(self, name: str, line: str, says: str) -> Started:
        """In another terminal; return once it says something."""
        log = self._logs / f"{len(self._started) + len(self._ended)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {self._replace_own(line)}"],
                cwd=self._folder,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started = self._started[name] = Started(process, log)
        until(lambda: says in started.log or process.poll() is not None, self._read_logs)
        assert says in started.log, started.log
        return started

    def interrupt(self, name: str) -> None:
        """Ctrl-C in another terminal, if something runs there."""
        if started := self._started.pop(name, None):
            self._ended.append(started)
            started.process.send_signal(signal.SIGINT)
            assert started.process.wait(30) in _ENDED, self._read_logs()

    def end(self) -> None:
        """Ctrl-C in all other terminals."""
        for name in list(self._started):
            self.interrupt(name)

    def _read_logs(self) -> str:
        return "\n".join(started.log for started in [*self._ended, *self._started.values()])

    def _replace_own(self, text: str) -> str:
        for theirs, mine in self._own_texts.items():
            text = text.replace(theirs, mine)
        return text

    def _is_settled(self) -> bool:
        assert self._engine is not None
        with self._engine.connect() as connection:
            return not connection.scalar(sa.text(_UNSETTLED))


def _blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Language and text of each block, with the file that was named last before it."""
    for prose, language, block in re.findall(r"(.*?)^```(\w+)\n(.*?)^```", text, re.DOTALL | re.M):
        names = re.findall(r"`([a-z-]*\.(?:py|env|sql|toml))`", prose) or re.findall(
            r"`(\.env)`", prose
        )
        yield language, block, names[-1] if names else ""


def run_command(line: str) -> str:
    """Return what a command prints, to either stream, in this folder and environment."""
    program, *words = shlex.split(line)
    assert program == "logto-webhooks", line
    if words[0] in _APART:
        done = subprocess.run(
            [sys.executable, "-m", "logto_webhooks", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return trim(done.stdout)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *words])
        patch.setenv("COLUMNS", str(WIDTH))
        with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit):
            cli.run()
    return trim(printed.getvalue())


def is_alike(said: str, printed: str) -> bool:
    """Whether a page says what was printed, but for what differs each time, and what it cuts.

    Rows may come in another order: that of local ids, of which some are of the same millisecond.
    """
    said, printed = _make_plain(said), _make_plain(printed)
    pieces = re.split(rf"^{CUT}\n", said, flags=re.MULTILINE)
    pattern = "(?:.*\n)*".join(map(re.escape, pieces))
    in_any_order = sorted(said.splitlines()) == sorted(printed.splitlines())
    return in_any_order or re.fullmatch(pattern, printed) is not None


def trim(text: str) -> str:
    """Without spaces at the ends of lines, and empty lines at the end."""
    return "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())


def _make_plain(text: str) -> str:
    for pattern, word in _VARYING:
        text = re.sub(pattern, word, text)
    return trim(text)
