"""The real service in a process of its own, and real HTTP to it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import httpx2

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY
from tests.support import forked
from tests.support.marks import need
from tests.support.waiting import until

PATH = "/api/webhooks/logto"


def command(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the product to its end."""
    need("process")
    environment = clean_environment(environment)
    code, out, err = forked.run(arguments, folder, environment, seconds=60)
    return subprocess.CompletedProcess(arguments, code, out, err)


def clean_environment(more: dict[str, str]) -> dict[str, str]:
    """The environment without what would set the product up."""
    kept = {k: v for k, v in os.environ.items() if "LOGTO" not in k and k != "DATABASE_URL"}
    return kept | forked.WIDTH | more


class Service:
    """`logto-webhooks serve` on a free port of 127.0.0.1; ends with the block."""

    constants: ClassVar[dict[str, object]] = {}  # of the product, that have other values

    def __init__(
        self,
        folder: Path,
        *options: str,
        port: int = 0,
        prefix: str = "",
        **environment: str,
    ) -> None:
        need("process")
        self.file = folder / "logto-webhooks.db"
        self.process = self._start(
            shlex.split(prefix),
            ["serve", "--port", str(port), *options],
            folder,
            clean_environment({"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY} | environment),
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Service:
        line = self.wait_for_log("listening on")
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx2.Client(base_url=self.url, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr
        self.process.stderr.close()

    @property
    def log(self) -> str:
        """All that was logged so far."""
        return "\n".join(self._lines)

    def wait_for_log(self, text: str, seconds: float = 20) -> str:
        """Wait for a line with this text, and return it."""

        def found() -> str | None:
            return next((line for line in self._lines if text in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self.process.poll() is not None, seconds)
        line = found()
        assert line, f"no {text!r} in the log:\n{self.log}"
        return line

    def post(self, delivery: SignedRequest, path: str = PATH) -> httpx2.Response:
        """Send a delivery as Logto does."""
        return self.http.post(path, content=delivery.body, headers=delivery.headers)

    def rows(self, statement: str) -> list[Any]:
        """Read the database beside the service."""
        connection = sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def stored(self) -> int:
        """How many deliveries are in the inbox."""
        [(count,)] = self.rows("SELECT count(*) FROM logto_deliveries")
        return int(count)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def _start(
        self, prefix: list[str], arguments: list[str], folder: Path, environment: dict[str, str]
    ) -> forked.Forked | subprocess.Popen[str]:
        if not prefix:
            return forked.Forked(arguments, folder, environment, constants=self.constants)
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "logto_webhooks", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class HastyService(Service):
    """One that answers 503 after 2 s, not 8, if a delivery can't be stored."""

    constants: ClassVar = {"logto_webhooks.ingest.group_commit:LONGEST_WAIT_S": 2.0}


def wait_until_done(service: Service) -> None:
    """Wait until nothing is pending in the service's SQLite file."""
    pending = "SELECT 1 FROM logto_deliveries WHERE state = 'pending' LIMIT 1"
    until(lambda: not service.rows(pending), lambda: service.log)


def one_line(text: str) -> str:
    """Return the text, which must be a single line."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]
