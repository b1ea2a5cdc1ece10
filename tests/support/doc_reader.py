"""Who reads a page of the docs, and does what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from tests.support import postgres
from tests.support.servers import free_port
from tests.support.service import clean_environment
from tests.support.waiting import until

UNSETTLED: Final = """
SELECT EXISTS (SELECT 1 FROM logto_deliveries WHERE state = 'pending')
    OR EXISTS (SELECT 1 FROM logto_jobs WHERE state = 'waiting')
"""
# What runs on, in a terminal of its own, and what it says once it does.
_RUN_ON: Final = {"logto-webhooks serve": "listening on", "python logto.py": "Logto is at"}
_ENDED: Final = (0, 130, -signal.SIGINT)


class Reader:
    """Who does what a page says, in a folder and on ports of her own.

    `own` is what she has instead of what the page names: her database, say.
    """

    def __init__(self, folder: Path, engine: sa.Engine, own: Mapping[str, str]) -> None:
        self.folder = folder
        self._engine = engine
        self._port = str(free_port())
        self._own_texts = {"127.0.0.1:8787": f"127.0.0.1:{self._port}", **own}
        here = str(Path(sys.executable).parent)
        path = os.pathsep.join([here, os.environ["PATH"], postgres.programs()])
        self._environment = clean_environment(
            {"PATH": path, "LOGTO_WEBHOOKS_PORT": self._port, "COLUMNS": "120"}
        )
        self._logs: dict[str, Path] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def write(self, name: str, text: str) -> None:
        """A file that the page names."""
        (self.folder / name).write_text(self._own(text))

    def run(self, block: str) -> str:
        """A block of the shell, to its end, and until nothing waits; or what runs on."""
        for program, says in _RUN_ON.items():
            if block.startswith(program):
                self._begin(program, block, says)
                return ""
        done = subprocess.run(
            ["sh", "-ec", self._own(block)],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        fine = (0, 1) if "doctor" in block else (0,)  # it may warn
        assert done.returncode in fine, f"{block}\n{done.stdout}"
        until(self._is_settled, self._said)
        return done.stdout

    def end(self) -> None:
        """Ctrl-C in all other terminals."""
        for program in list(self._running):
            self._interrupt(program)

    def _begin(self, program: str, line: str, says: str) -> None:
        """In another terminal, after Ctrl-C if it runs there."""
        self._interrupt(program)
        log = self._logs[program] = self.folder / f"{len(self._logs)}.log"
        with log.open("wb") as file:
            self._running[program] = subprocess.Popen(
                ["sh", "-c", f"exec {line}"],
                cwd=self.folder,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        until(lambda: says in log.read_text(), self._said)

    def _interrupt(self, program: str) -> None:
        if running := self._running.pop(program, None):
            running.send_signal(signal.SIGINT)
            assert running.wait(30) in _ENDED, self._said()

    def _said(self) -> str:
        return "\n".join(each.read_text() for each in self._logs.values())

    def _own(self, text: str) -> str:
        for theirs, mine in self._own_texts.items():
            text = text.replace(theirs, mine)
        return text

    def _is_settled(self) -> bool:
        with self._engine.connect() as connection:
            return not connection.scalar(sa.text(UNSETTLED))


def steps(page: str) -> Iterator[tuple[str, str, str]]:
    """Language and text of each block, with the file that was named last before it."""
    for prose, language, text in re.findall(r"(.*?)^```(\w+)\n(.*?)^```", page, re.DOTALL | re.M):
        names = re.findall(r"`([a-z]*\.(?:py|env))`", prose) or re.findall(r"`(\.env)`", prose)
        yield language, text, names[-1] if names else ""
