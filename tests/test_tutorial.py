"""`docs/tutorial.md` as its reader uses it: each block in its file, or run, in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.pages.examples import alike
from tests.support import postgres
from tests.support.servers import free_port
from tests.support.service import clean_environment
from tests.support.waiting import until

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BEGINNING = "\n## A service on a database\n"  # before it stands how to install
UNSETTLED = """
SELECT EXISTS (SELECT 1 FROM logto_deliveries WHERE state = 'pending')
    OR EXISTS (SELECT 1 FROM logto_jobs WHERE state = 'waiting')
"""


class Reader:
    """Who does what the page says, with a database and a port of her own."""

    def __init__(self, folder: Path, url: sa.URL) -> None:
        self.folder = folder
        psycopg = url.set(drivername="postgresql+psycopg")
        self._engine = sa.create_engine(psycopg, poolclass=sa.NullPool)
        self._url, self._port = url.render_as_string(hide_password=False), str(free_port())
        here = str(Path(sys.executable).parent)
        path = os.pathsep.join([here, os.environ["PATH"], postgres.programs()])
        self._environment = clean_environment(
            {"PATH": path, "LOGTO_WEBHOOKS_PORT": self._port, "COLUMNS": "120"}
        )
        self._log = folder / "log"
        self._service: subprocess.Popen[bytes] | None = None

    def write(self, name: str, text: str) -> None:
        """A file that the page names."""
        (self.folder / name).write_text(self._own(text))

    def run(self, block: str) -> str:
        """A block of the shell, to its end, and until nothing waits; or the service."""
        if block.startswith("logto-webhooks serve"):
            self.serve(block)
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
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        until(self._is_settled, self._log.read_text)
        return done.stdout

    def serve(self, line: str) -> None:
        """In the second terminal, after Ctrl-C if something runs there."""
        self.interrupt()
        with self._log.open("wb") as file:
            self._service = subprocess.Popen(
                ["sh", "-c", f"exec {line}"], cwd=self.folder, env=self._environment, stderr=file
            )
        until(lambda: "listening on" in self._log.read_text(), self._log.read_text)

    def interrupt(self) -> None:
        """Ctrl-C in the second terminal."""
        if self._service:
            self._service.send_signal(signal.SIGINT)
            assert self._service.wait(30) == 0, self._log.read_text()
            self._service = None

    def _own(self, text: str) -> str:
        """The text with her database and her port."""
        server = "-h 127.0.0.1 -U postgres tutorial"
        url = "postgresql://postgres@127.0.0.1/tutorial"
        return (
            text.replace(server, f"'{self._url}'")
            .replace(url, self._url)
            .replace("127.0.0.1:8787", f"127.0.0.1:{self._port}")
        )

    def _is_settled(self) -> bool:
        with self._engine.connect() as connection:
            return not connection.scalar(sa.text(UNSETTLED))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with postgres.own_database() as url:
        made = Reader(tmp_path, url)
        try:
            yield made
        finally:
            made.interrupt()


def steps() -> Iterator[tuple[str, str, str]]:
    """Language and text of each block, with the file that was named last before it."""
    _, _, page = PAGE.read_text().partition(BEGINNING)
    for prose, language, text in re.findall(r"(.*?)^```(\w+)\n(.*?)^```", page, re.DOTALL | re.M):
        names = re.findall(r"`([a-z]*\.(?:py|env))`", prose) or re.findall(r"`(\.env)`", prose)
        yield language, text, names[-1] if names else ""


def test_the_tutorial_runs_as_printed(reader: Reader) -> None:
    """From a service on an empty database to a dead job that is mended, and what is printed."""
    printed = ""
    for language, text, name in steps():
        if language == "sh":
            printed = reader.run(text)
        elif language == "text":
            assert alike(text, printed), printed
        else:
            assert name, text
            reader.write(name, text)
