"""SQLite: durable commits, one writer at a time, and checks that the file still exists."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy import event
from sqlalchemy.pool import QueuePool

from logto_webhooks import private_files
from logto_webhooks.database import migrate
from logto_webhooks.database.errors import NO_PERMISSION, SETTING, translate_errors
from logto_webhooks.database.migrate import DatabaseInfo, Migrated, inspect_database
from logto_webhooks.database.runner import HandlerRunner, HeldConnection, ThreadRunner
from logto_webhooks.database.sessions import APP_SCHEMAS, get_schema_map
from logto_webhooks.database.statement_limits import (
    LOSSES,
    CommitRefused,
    Losses,
    TransactionLost,
)
from logto_webhooks.database.store import STATEMENT_S, Store
from logto_webhooks.errors import SettingInvalid, StoreUnavailable, TimedOut
from logto_webhooks.event_loop import run_in_thread
from logto_webhooks.private_files import LockFile

T = TypeVar("T")
logger = logging.getLogger("logto_webhooks")

BUSY_S: Final = 3.0  # a request can wait that long twice: for the worker and by itself
LOOK_S: Final = 0.001  # how often it looks for the write lock
_WAL_PAGES: Final = 4000  # 16 MB: checkpoints take time from commits that accept
TRIES_S: Final = 3.0  # for a transaction that is tried without slow rows, because accepting waits
READS: Final = {"logto_reads": True}  # options of a connection


def make_sqlite_engine(
    file: Path, setting: str = "database_url", application: sa.Engine | None = None
) -> sa.Engine:
    """Make an engine for `file`, which `create_file` made. The engine never creates a file. Its
    connections are set up as those of the application's engine, because handlers use them.

    With WAL and `synchronous=FULL`, a commit is on disk when it returns. A transaction takes the
    write lock when it begins, unless the connection has the options `READS`.
    """
    uri = f"{file.absolute().as_uri()}?mode=rw"
    named = sa.URL.create("sqlite", database=str(file))  # for messages: the creator opens it
    app_schemas = None if application is None else get_schema_map(application)
    engine = sa.create_engine(
        named,
        creator=partial(sqlite3.connect, uri, uri=True, timeout=BUSY_S, check_same_thread=False),
        poolclass=QueuePool,
        hide_parameters=True,
        execution_options={SETTING: setting, APP_SCHEMAS: app_schemas},
    )
    if application is not None:
        event.listen(engine, "connect", partial(_call_listeners, application))
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def _call_listeners(application: sa.Engine, connection: Any, record: Any) -> None:
    """Call the application's `connect` listeners: they may enforce foreign keys, or add functions
    that its triggers and indexes use."""
    for listener in application.pool.dispatch.connect:
        if listener.__module__.startswith("sqlalchemy."):
            continue  # they set up a dialect, and our engine has its own
        try:
            listener(connection, record)
        except Exception as error:
            logger.warning(
                "A listener of your engine for 'connect' raised %s on this package's connection to "
                "the same SQLite file. What it sets is missing in handlers' sessions.",
                type(error).__name__,
            )


def _set_up(connection: sqlite3.Connection, _: object) -> None:
    connection.commit()  # a listener may have written
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
    _wait_when_busy(connection)


def _begin(connection: sa.Connection) -> None:
    options: Any = connection.get_execution_options()
    if options.get("logto_reads", False):
        connection.exec_driver_sql("BEGIN")
    else:
        _begin_to_write(connection)


def _begin_to_write(connection: sa.Connection) -> None:
    """Take the write lock. SQLite itself looks for it every 100 ms, and so hardly ever gets it from
    a program that writes one transaction after the other."""
    driver: Any = connection.connection.dbapi_connection
    until = time.monotonic() + BUSY_S
    with suppress(sqlite3.DatabaseError):
        driver.execute("PRAGMA busy_timeout=0")
        while not _try_to_begin(driver) and time.monotonic() < until:
            time.sleep(LOOK_S)
    try:
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # raises SQLAlchemy's error
    finally:
        with suppress(sqlite3.DatabaseError):
            _wait_when_busy(driver)


def _try_to_begin(driver: Any) -> bool:
    """Return False if another connection has the write lock. Raises sqlite3.DatabaseError."""
    try:
        driver.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        return False
    return True


def _wait_when_busy(connection: Any) -> None:
    connection.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")


def create_file(file: Path, setting: str = "database_url") -> None:
    """Create an empty database file if it doesn't exist, for its owner only. Raises SettingInvalid.

    SQLite gives the files beside it the same mode.
    """
    try:
        private_files.create(file)
        sqlite3.connect(file).close()
        file.touch()
        if (problem := find_forbidden(file)) is not None:
            problem = f"{problem}; {NO_PERMISSION}"
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"{file} can't be opened for writing ({reason})"
        if isinstance(error, PermissionError | sqlite3.Error):
            problem = f"{problem}; {NO_PERMISSION}"
        if isinstance(error, FileNotFoundError) and not file.parent.exists():
            problem = f"the folder {file.parent} doesn't exist; create it"
    if problem is not None:
        raise SettingInvalid(name=setting, problem=problem)


def find_forbidden(file: Path) -> str | None:
    """Return why this user can't have a database there; None if it can.

    This doesn't open the file: closing it would release SQLite's locks of this process.
    """
    effective = os.access in os.supports_effective_ids
    for path in (file, file.absolute().parent):
        if not os.access(path, os.W_OK, effective_ids=effective):
            return f"this user has no write permission for {path}"
    return None


class FileGuard:
    """Notices that a file of the database was deleted, moved or replaced.

    SQLite goes on writing to such a file, and reports success. The `-wal` and `-shm` files are
    checked, too. They are created with the first connection and deleted with the last.
    """

    def __init__(self, engine: sa.Engine, file: Path) -> None:
        self._engine = engine
        self._file = file
        self._folder = Path.cwd()  # a handler may change the working directory
        self._beside = [Path(f"{file}{end}") for end in ("-wal", "-shm")]
        self._seen: dict[Path, tuple[int, int]] = {}
        self._open = 0  # connections
        self._lock = threading.Lock()
        event.listen(engine, "connect", self._note_connected)
        event.listen(engine, "close", self._note_closed)
        event.listen(engine, "close_detached", self._note_closed)

    def check(self) -> None:
        """Raise StoreUnavailable if any file isn't the one first seen. Called after each commit."""
        self.check_file()
        for file in self._beside:
            self._check_identity(file, "was replaced")

    def check_file(self) -> None:
        """The same for the database file only, also without a connection."""
        self._check_identity(self._file, "was replaced; restart to use the new one")

    def _check_identity(self, file: Path, replaced: str) -> None:
        try:
            stat = (self._folder / file).stat()
        except OSError:
            if self._seen:
                raise self._lost(f"{file} is gone") from None
            here = "" if file.is_absolute() else f" in {self._folder}"
            never = (
                f"doesn't exist{here}: run the command in the service's folder, or set the "
                "database's URL. If it is new, logto-webhooks serve or migrate creates it"
            )
            if not (self._folder / file.parent).exists():
                never = f"doesn't exist, because the folder {file.parent} doesn't; create it"
            raise self._lost(f"{file} {never}") from None
        identity = (stat.st_dev, stat.st_ino)
        if self._seen.setdefault(file, identity) != identity:
            raise self._lost(f"{file} {replaced}")

    def reset(self) -> None:
        """Disconnect and forget the files: a connection may still fail after its cause was removed.

        The last connection that closes moves the rest of the `-wal` file into the database.
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
    """Writes one transaction at a time, and checks after a commit that the file still exists."""

    _reads = READS
    _one_writer = True

    def __init__(self, engine: sa.Engine, guard: FileGuard) -> None:
        super().__init__(engine)
        self._guard = guard

    def _write(
        self, work: Callable[[Store], T], held: HeldConnection, statement_s: float = STATEMENT_S
    ) -> T:
        """Run work and commit. If rows of the application take too long, so that the transaction is
        lost, try it again without these rows, and in the end without any."""
        losses = Losses()

        def run(store: Store) -> T:
            store.connection.execution_options(**{LOSSES: losses})
            return work(store)

        give_up_at = time.monotonic() + TRIES_S
        while not losses.is_last_try:
            losses.is_last_try = time.monotonic() > give_up_at
            try:
                return super()._write(run, held, statement_s)
            except TransactionLost as lost:
                losses.add(lost)
        raise TimedOut(problem="rows of the application's tables take too long")

    def _commit(self, connection: sa.Connection) -> None:
        try:
            super()._commit(connection)
        except sa.exc.IntegrityError as error:
            raise CommitRefused() from error

    def _check_commit(self) -> None:
        self._guard.check()

    def _reset(self) -> None:
        self._guard.reset()

    def _stop(self, connection: sa.Connection) -> None:
        """Roll back a connection, from any thread, and prevent further statements.

        A statement that runs is interrupted, and no other can be prepared: a handler that still has
        the connection would write outside of any transaction.
        """
        driver: Any = connection.connection.dbapi_connection
        driver.set_authorizer(_allow_only_rollback)
        driver.interrupt()
        driver.rollback()


def _allow_only_rollback(action: int, what: str | None, *more: str | None) -> int:
    rolls_back = action == sqlite3.SQLITE_TRANSACTION and what == "ROLLBACK"
    return sqlite3.SQLITE_OK if rolls_back else sqlite3.SQLITE_DENY


class SqliteFile:
    """A SQLite file with one writer, in a thread. It is migrated whenever it is opened."""

    budget_s = 0.005  # for a worker's transaction, because accepting waits for it
    any_loop = True  # whether any event loop can use it

    def __init__(
        self, file: Path, setting: str = "database_url", application: sa.Engine | None = None
    ) -> None:
        """`setting` is the name of the setting that the file's URL came from, and `application` the
        application's own engine."""
        self.name = str(file)
        self.file = file
        self._path = file.absolute()
        self.place = str(self._path)
        self._setting = setting
        self._engine = make_sqlite_engine(file, setting, application)
        self._worker = LockFile(Path(f"{self._path}-worker"))
        self._guard = FileGuard(self._engine, file)
        self.host: HandlerRunner = FileRunner(self._engine, self._guard)

    @property
    def exists(self) -> bool:
        """Whether there is a file. It is created when it is first opened."""
        return self._path.exists()

    @property
    def files(self) -> Sequence[Path]:
        """The database file and the files beside it, whether they exist or not."""
        return [Path(f"{self.file}{end}") for end in ("", "-wal", "-shm", "-journal", "-worker")]

    async def open(self) -> None:
        """Create the file if it doesn't exist, and migrate it.

        Raises SettingInvalid, SchemaUnknown, StoreUnavailable.
        """
        self._guard.reset()  # the files beside it were deleted with the last connection
        await self.migrate()

    async def migrate(self) -> Migrated:
        """Migrate the tables to this release. Raises as `open` does."""
        create_file(self.file, self._setting)
        return await run_in_thread(self._migrate)

    def allow_statements(self, seconds: float) -> None:
        """Do nothing: SQLite doesn't limit statements."""

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch if the database can't be used as it is."""
        await run_in_thread(self._check)

    async def inspect(self) -> DatabaseInfo:
        """Return information on the database, whatever its schema. Raises StoreUnavailable."""
        return await run_in_thread(self._inspect)

    def migration_sql(self) -> str:
        """Return the SQL that creates the schema."""
        return migrate.sql("sqlite")

    def may_work(self) -> bool:
        """Return whether this process may run workers: one per file, others are spares."""
        return self._worker.acquire()

    def _migrate(self) -> Migrated:
        with translate_errors(self._engine), self._engine.begin() as connection:
            return migrate.upgrade(connection)

    def _check(self) -> None:
        self._look(migrate.check)
        if problem := find_forbidden(self._path):
            raise StoreUnavailable(problem=f"{problem}; {NO_PERMISSION}")

    def _inspect(self) -> DatabaseInfo:
        free = shutil.disk_usage(self._path.parent).free
        info = self._look(partial(inspect_database, place=self.name, free=free))
        return replace(info, unwritable=self._unwritable())

    def _unwritable(self) -> str | None:
        """Return why nothing can be written now, or None. Its test write is rolled back."""
        try:
            with translate_errors(self._engine), self._engine.connect() as connection:
                # BEGIN isn't enough: on a read-only file, SQLite begins a reading transaction.
                connection.exec_driver_sql("PRAGMA user_version = 1")
        except StoreUnavailable as error:
            return error.problem
        return find_forbidden(self._path)

    def _look(self, work: Callable[[sa.Connection], T]) -> T:
        self._guard.check_file()
        with translate_errors(self._engine), self._engine.connect() as connection:
            return work(connection.execution_options(**READS))
