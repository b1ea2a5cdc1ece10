"""An application of somebody's, in files, and the servers that people run it with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import httpx2
import sqlalchemy as sa

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.app_sources import HEAD
from tests.support.service import PATH, clean_environment
from tests.support.waiting import until

Kind = Literal["asyncpg", "psycopg", "sqlite"]

UVICORN = ("uvicorn", "app:api", "--port", "PORT", "--no-access-log")


class Application:
    """A folder with `app.py`, on a database of its own."""

    def __init__(self, folder: Path, kind: Kind, *source: str) -> None:
        self.folder = folder
        self.write(*source)
        schema: str | None = None
        if kind == "sqlite":
            url = sa.make_url(f"sqlite:///{folder}/app.db")
            self.engine = sa.create_engine(url)
        else:
            url = postgres.server_url().set(drivername=f"postgresql+{kind}")
            schema, self.engine = postgres.emptied_schema(), postgres.sync_engine()
        self.prefix = f"{schema}." if schema else ""
        shown = url.render_as_string(hide_password=False)
        self.environment = {
            "APP_URL": shown,
            "APP_KEY": SIGNING_KEY,
            "APP_EFFECTS": f"{self.prefix}effects",
            "LOGTO_WEBHOOKS_DATABASE_URL": shown,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if schema:
            self.environment |= {"APP_SCHEMA": schema, "LOGTO_WEBHOOKS_SCHEMA": schema}
        with self.engine.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {self.prefix}effects"))
            columns = "handler TEXT, delivery BIGINT, pid BIGINT"
            connection.execute(sa.text(f"CREATE TABLE {self.prefix}effects ({columns})"))

    def write(self, *source: str, name: str = "app") -> None:
        """Write a module whole, as an editor does."""
        new = self.folder / f"{name}.new"
        new.write_text("".join((HEAD, *source)))
        new.replace(self.folder / f"{name}.py")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Read; `{}` in the query is where the tables are."""
        with self.engine.connect() as connection:
            found = connection.execute(sa.text(query.replace("{}", self.prefix)))
            return [tuple(each) for each in found]

    def change(self, statement: str) -> None:
        """Write; `{}` in the statement is where the tables are."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement.replace("{}", self.prefix)))

    def effects(self) -> Counter[tuple[str, int]]:
        """Count by handler and delivery."""
        file = self.folder / "effects"
        noted = [each.split() for each in file.read_text().splitlines()] if file.exists() else []
        written = [(handler, int(delivery)) for handler, delivery, _ in noted]
        written += self.rows("SELECT handler, delivery FROM {}effects")
        return Counter(written)

    def stored(self) -> set[int]:
        """The ids in the inbox."""
        return {number for (number,) in self.rows("SELECT id FROM {}logto_deliveries")}

    def jobs(self) -> Counter[tuple[str, str]]:
        """Count by handler and state."""
        query = "SELECT handler, state, count(*) FROM {}logto_jobs GROUP BY handler, state"
        return Counter({(handler, state): count for handler, state, count in self.rows(query)})

    def leases_end(self) -> None:
        """What a dead process held is free, as some seconds later."""
        self.change("UPDATE {}logto_lines SET held_until = 0 WHERE token IS NOT NULL")
        self.change("UPDATE {}logto_deliveries SET due_at = 0 WHERE state = 'pending'")

    def once(self, answered: set[int], *handlers: str) -> None:
        """Wait until all is handled; each delivery had each effect exactly once."""
        stored = self.stored()
        assert answered <= stored
        expected = Counter((handler, each) for handler in handlers for each in stored)
        until(lambda: self.effects() >= expected, lambda: str(expected - self.effects()))
        until(lambda: not self.waiting(), lambda: str(self.jobs()))
        assert self.effects() == expected

    def waiting(self) -> int:
        """How many jobs wait."""
        return sum(count for (_, state), count in self.jobs().items() if state == "waiting")


class Server:
    """A server's processes, those that it starts included; what is left ends with the block."""

    def __init__(self, app: Application, *command: str, workers: int = 1) -> None:
        self.port = free_port()
        self._workers = workers
        self._file = app.folder / f"log-{self.port}"
        filled = [each.replace("PORT", str(self.port)) for each in command]
        with self._file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *filled],
                cwd=app.folder,
                env=clean_environment(app.environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        # A connection for each delivery: so each process gets some.
        limits = httpx2.Limits(max_keepalive_connections=0)
        url = f"http://127.0.0.1:{self.port}"
        self._http = httpx2.Client(base_url=url, limits=limits, timeout=20)
        try:
            until(lambda: len(self.serving()) >= self._workers, lambda: self.log)
            until(lambda: not self._workers or self._listens(), lambda: self.log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def log(self) -> str:
        """All that was printed so far."""
        return self._file.read_text()

    def serving(self) -> list[int]:
        """The processes that began to serve, and haven't said that they ended."""
        ended = set(re.findall(r"ended (\d+)", self.log))
        return [int(each) for each in re.findall(r"began (\d+)", self.log) if each not in ended]

    def has_begun(self, count: int) -> bool:
        """Whether so many processes began to serve, all in all."""
        return self.log.count("began") == count

    def alive(self) -> bool:
        """Whether any process is left."""
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def stop(self, sign: signal.Signals = signal.SIGTERM, seconds: float = 20) -> int:
        """Ask it to end; return its code once nothing of it is left."""
        self.process.send_signal(sign)
        until(lambda: not self.alive(), lambda: f"it goes on\n{self.log}", seconds)
        return self.process.wait()

    def send(self, *deliveries: SignedRequest) -> set[int]:
        """Send each on a connection of its own; return the ids of those that were answered 200."""
        return {number for each in deliveries if (number := self._sent(each)) is not None}

    def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def _sent(self, delivery: SignedRequest) -> int | None:
        try:
            answer = self._http.post(PATH, content=delivery.body, headers=delivery.headers)
        except httpx2.TransportError:
            return None
        return int(answer.json()["id"]) if answer.status_code == 200 else None


def people(count: int, since: int = 0) -> list[SignedRequest]:
    """So many who are new."""
    return [make.user_created(id=f"u{since + each}", at=soon()) for each in range(count)]


def gone(count: int = 1) -> list[SignedRequest]:
    """So many who are deleted."""
    return [make.user_deleted(id=f"gone{each}", at=soon()) for each in range(count)]


def soon() -> int:
    """A moment after the installation: what is older runs no handlers."""
    return time.time_ns() // 1_000_000 + 1_000


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
