"""SQLite: durable, one writer at a time, and never a file that is gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy import event
from sqlalchemy.pool import QueuePool

from logto_webhooks import private_files
from logto_webhooks.database import migrate
from logto_webhooks.database.errors import SETTING, translate_errors
from logto_webhooks.database.migrate import DatabaseInfo, inspect_database
from logto_webhooks.database.runner import HandlerRunner, ThreadRunner
from logto_webhooks.errors import SettingInvalid, StoreUnavailable
from logto_webhooks.private_files import LockFile

T = TypeVar("T")

BUSY_S: Final = 3.0  # the worker's wait and a request's own fit into what a request may wait
_WAL_PAGES: Final = 4000  # 16 MB: to move pages into the database costs commits that accept
READS: Final = {"logto_reads": True}  # options of a connection


def make_sqlite_engine(file: Path, setting: str = "database_url") -> sa.Engine:
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
        connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        return connection

    named = sa.URL.create("sqlite", database=str(file))  # for messages: `connect` opens it
    engine = sa.create_engine(
        named,
        creator=connect,
        poolclass=QueuePool,
        hide_parameters=True,
        execution_options={SETTING: setting},
    )
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: sa.Connection) -> None:
    options: Any = connection.get_execution_options()
    reads = options.get("logto_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def create_file(file: Path, setting: str = "database_url") -> None:
    """Make an empty database file unless it exists, for its owner alone. Raises SettingInvalid.

    SQLite gives the files beside it the same mode.
    """
    try:
        private_files.create(file)
        sqlite3.connect(file).close()
        file.touch()
        problem = find_forbidden(file)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"{file} can't be opened for writing ({reason})"
        if isinstance(error, FileNotFoundError) and not file.parent.exists():
            problem = f"the folder {file.parent} doesn't exist; create it"
    if problem is not None:
        raise SettingInvalid(name=setting, problem=problem)


def find_forbidden(file: Path) -> str | None:
    """Why this user can't have a database there, if so.

    The file isn't opened for it: to close it again would end SQLite's locks of this process.
    """
    effective = os.access in os.supports_effective_ids
    for path in (file, file.absolute().parent):
        if not os.access(path, os.W_OK, effective_ids=effective):
            return f"this user has no write permission for {path}"
    return None


class FileGuard:
    """Notices that a file of the database was deleted, moved or replaced.

    SQLite goes on writing to such a file, and reports success. The `-wal` and the `-shm` beside
    the database count, too: they are made with the first connection, and go with the last.
    """

    def __init__(self, engine: sa.Engine, file: Path) -> None:
        self._engine = engine
        self._file = file
        self._beside = [Path(f"{file}{end}") for end in ("-wal", "-shm")]
        self._seen: dict[Path, tuple[int, int]] = {}
        self._open = 0  # connections
        self._lock = threading.Lock()
        event.listen(engine, "connect", self._note_connected)
        event.listen(engine, "close", self._note_closed)
        event.listen(engine, "close_detached", self._note_closed)

    def check(self) -> None:
        """Raise StoreUnavailable if any of them isn't what was first seen; after each commit."""
        self.check_file()
        for file in self._beside:
            self._same(file, "was replaced")

    def check_file(self) -> None:
        """The same for the database alone, when nobody may be connected."""
        self._same(self._file, "was replaced; restart to use the new one")

    def _same(self, file: Path, replaced: str) -> None:
        try:
            stat = file.stat()
        except OSError:
            if self._seen:
                raise self._lost(f"{file} is gone") from None
            never = "doesn't exist; logto-webhooks serve or migrate creates it"
            if not file.parent.exists():
                never = f"doesn't exist, because the folder {file.parent} doesn't; create it"
            raise self._lost(f"{file} {never}") from None
        identity = (stat.st_dev, stat.st_ino)
        if self._seen.setdefault(file, identity) != identity:
            raise self._lost(f"{file} {replaced}")

    def reset(self) -> None:
        """Disconnect, and begin anew: a connection may remember what is wrong after it was mended.

        The last one to disconnect moves what only it can still see into the database.
        """
        self._engine.dispose()
        self._forget_files_beside()

    def _note_connected(self, connection: object, record: object) -> None:
        with self._lock:
            self._open += 1

    def _note_closed(self, connection: object, *record: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._forget_files_beside()

    def _forget_files_beside(self) -> None:
        for file in self._beside:
            self._seen.pop(file, None)

    def _lost(self, problem: str) -> StoreUnavailable:
        self.reset()
        return StoreUnavailable(problem=problem)


class FileRunner(ThreadRunner):
    """Writes one transaction at a time, and trusts no commit to a file that is gone."""

    _reads = READS
    _one_writer = True

    def __init__(self, engine: sa.Engine, guard: FileGuard) -> None:
        super().__init__(engine)
        self._guard = guard

    def _trust_commit(self) -> None:
        self._guard.check()

    def _begin_anew(self) -> None:
        self._guard.reset()

    def _stop(self, connection: sa.Connection) -> None:
        """Roll back, from any thread, and let nothing more be done on a connection.

        A statement that runs is interrupted, and none is prepared again: who still has the
        connection would write outside of any transaction.
        """
        driver: Any = connection.connection.dbapi_connection
        driver.set_authorizer(_allow_only_rollback)
        driver.interrupt()
        driver.rollback()


def _allow_only_rollback(action: int, what: str | None, *more: str | None) -> int:
    rolls_back = action == sqlite3.SQLITE_TRANSACTION and what == "ROLLBACK"
    return sqlite3.SQLITE_OK if rolls_back else sqlite3.SQLITE_DENY


class SqliteFile:
    """An embedded SQLite file: one writer, in a thread; migrated whenever it is opened."""

    budget_s = 0.005  # of a worker's transaction: it holds back who accepts
    any_loop = True  # whether its connections are of no event loop

    def __init__(self, file: Path, setting: str = "database_url") -> None:
        """`setting` is the name of the setting that the file's URL came from."""
        self.name = str(file)
        self.file = file
        self._setting = setting
        self._engine = make_sqlite_engine(file, setting)
        self._worker = LockFile(Path(f"{file}-worker"))
        self._guard = FileGuard(self._engine, file)
        self.host: HandlerRunner = FileRunner(self._engine, self._guard)

    @property
    def files(self) -> Sequence[Path]:
        """The database, and what is beside it, whether they exist or not."""
        return [Path(f"{self.file}{end}") for end in ("", "-wal", "-shm", "-journal", "-worker")]

    async def open(self) -> None:
        """Make the file unless it exists, and migrate it. Raises SettingInvalid."""
        self._guard.reset()  # with the last connection of before, the files beside it went, too
        await self.migrate()

    async def migrate(self) -> None:
        """Bring the schema up to this release."""
        create_file(self.file, self._setting)
        await asyncio.to_thread(self._migrate)

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        await asyncio.to_thread(self._check)

    async def premises(self) -> DatabaseInfo:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""
        return await asyncio.to_thread(self._premises)

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""
        return migrate.sql("sqlite")

    def may_work(self) -> bool:
        """One process works on a file; others are its spares."""
        return self._worker.acquire()

    def _migrate(self) -> None:
        with translate_errors(self._engine), self._engine.begin() as connection:
            migrate.upgrade(connection)

    def _check(self) -> None:
        self._look(migrate.check)
        if problem := find_forbidden(self.file):
            raise StoreUnavailable(problem=problem)

    def _premises(self) -> DatabaseInfo:
        free = shutil.disk_usage(self.file.absolute().parent).free
        info = self._look(partial(inspect_database, place=self.name, free=free))
        return replace(info, unwritable=self._unwritable())

    def _unwritable(self) -> str | None:
        """Why nothing can be written now, if so; what is written for it is rolled back."""
        try:
            with translate_errors(self._engine), self._engine.connect() as connection:
                # To begin isn't enough: of a read-only file, SQLite makes a transaction that reads.
                connection.exec_driver_sql("PRAGMA user_version = 1")
        except StoreUnavailable as error:
            return error.problem
        return find_forbidden(self.file)

    def _look(self, work: Callable[[sa.Connection], T]) -> T:
        self._guard.check_file()
        with translate_errors(self._engine), self._engine.connect() as connection:
            return work(connection.execution_options(**READS))
