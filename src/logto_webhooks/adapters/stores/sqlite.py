"""The engine for embedded SQLite: durable, one writer at a time, and never a file that is gone."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import QueuePool

from logto_webhooks.errors import SettingInvalid, StoreUnavailable

BUSY_S = 3.0  # the worker's wait and a request's own fit into what a request may wait
READS = {"logto_reads": True}


def engine_of(file: Path) -> sa.Engine:
    """Open `file`, which `create` made; the engine itself never creates one.

    WAL with `synchronous=FULL`: a commit is on disk when it returns. A transaction takes the
    write lock with its first statement, unless the connection has the options `READS`.
    """
    uri = f"{file.absolute().as_uri()}?mode=rw"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    engine = sa.create_engine(
        "sqlite://", creator=connect, poolclass=QueuePool, hide_parameters=True
    )
    event.listen(engine, "begin", _begin)
    return engine


def create(file: Path) -> None:
    """Make an empty database file unless it exists. Raises SettingInvalid."""
    try:
        sqlite3.connect(file).close()
        file.touch()
    except (OSError, sqlite3.Error) as error:
        problem = f"{file} can't be opened for writing ({error})"
        raise SettingInvalid(name="LOGTO_WEBHOOKS_DATABASE_URL", problem=problem) from None


def still_there(engine: sa.Engine, file: Path) -> Callable[[], None]:
    """Make a check that raises StoreUnavailable when `file` is no longer the one first seen.

    SQLite goes on writing to a file that was deleted or moved, and reports success.
    """
    seen: list[tuple[int, int]] = []

    def check() -> None:
        try:
            stat = file.stat()
        except OSError:
            engine.dispose()
            hint = "is gone" if seen else "isn't there; logto-webhooks serve or migrate makes it"
            raise StoreUnavailable(problem=f"{file} {hint}") from None
        identity = (stat.st_dev, stat.st_ino)
        if not seen:
            seen.append(identity)
        elif seen[0] != identity:
            engine.dispose()
            raise StoreUnavailable(problem=f"{file} was replaced; restart to use the new one")

    return check


def _begin(connection: sa.Connection) -> None:
    options: Any = connection.get_execution_options()
    reads = options.get("logto_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
