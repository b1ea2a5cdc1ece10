"""Open a database from a URL or an engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, Union

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database import inspect, migrate, sqlite
from logto_webhooks.database.errors import translate_errors
from logto_webhooks.database.inspect import DatabaseInfo
from logto_webhooks.database.store import HandlerRunner, Store
from logto_webhooks.database.sync_runner import ThreadRunner
from logto_webhooks.deliveries import Status
from logto_webhooks.errors import SettingInvalid, StoreUnavailable
from logto_webhooks.files import LockFile
from logto_webhooks.settings import Settings

T = TypeVar("T")
_NAME: Final = "database_url"  # of who has no setting: an argument
_USE: Final = "sqlite:///file.db or postgresql://user:password@host/name"
_DRIVERS: Final = ("asyncpg", "psycopg", "greenlet")  # packages that come with an extra
# Backends whose names can be repeated in an error; anything else may be a part of a password.
_OTHERS: Final = (
    "mysql",
    "mariadb",
    "mssql",
    "oracle",
    "mongodb",
    "redis",
    "cockroachdb",
    "http",
    "https",
)


class Database(Protocol):
    """A database that can be used, checked and migrated; nothing is opened before that.

    `budget_s` is how long a worker's transaction may take: on SQLite it holds back who accepts.
    """

    name: str
    host: HandlerRunner
    budget_s: float
    any_loop: bool  # whether its connections are of no event loop

    @property
    def files(self) -> Sequence[Path]:
        """Its files here, whether they exist or not."""

    async def open(self) -> None:
        """Make it ready for the service, or raise a LogtoWebhooksError that says what to do."""

    async def migrate(self) -> None:
        """Bring the schema up to this release."""

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""

    async def premises(self) -> DatabaseInfo:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""

    def may_work(self) -> bool:
        """Whether this process may apply deliveries; if not now, perhaps later."""

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""


class SqliteFile:
    """An embedded SQLite file: one writer, in a thread; migrated whenever it is opened."""

    budget_s = 0.005
    any_loop = True

    def __init__(self, file: Path, setting: str = _NAME) -> None:
        """`setting` is the name of the setting that the file's URL came from."""
        self.name = str(file)
        self.file = file
        self._setting = setting
        self._engine = sqlite.make_sqlite_engine(file, setting)
        self._worker = LockFile(Path(f"{file}-worker"))
        self._guard = sqlite.FileGuard(self._engine, file)
        self.host: HandlerRunner = ThreadRunner(
            self._engine,
            Store,
            reads=sqlite.READS,
            committed=self._guard.check,
            failed=self._guard.reset,
            stop=sqlite.stop_connection,
            one_writer=True,
        )

    @property
    def files(self) -> Sequence[Path]:
        """The database, and what is beside it."""
        return [Path(f"{self.file}{end}") for end in ("", "-wal", "-shm", "-journal", "-worker")]

    async def open(self) -> None:
        """Make the file unless it exists, and migrate it. Raises SettingInvalid."""
        self._guard.reset()  # with the last connection of before, the files beside it went, too
        await self.migrate()

    async def migrate(self) -> None:
        """Bring the schema up to this release."""
        sqlite.create_file(self.file, self._setting)
        with translate_errors(self._engine), self._engine.begin() as connection:
            migrate.upgrade(connection)

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

    def _check(self) -> None:
        self._look(migrate.check)
        if problem := sqlite.find_forbidden(self.file):
            raise StoreUnavailable(problem=problem)

    def _premises(self) -> DatabaseInfo:
        free = shutil.disk_usage(self.file.absolute().parent).free
        found = self._look(inspect.inspect_database(self.name, free))
        return replace(found, unwritable=self._unwritable())

    def _unwritable(self) -> str | None:
        """Why nothing can be written now, if so; nothing is."""
        try:
            with translate_errors(self._engine), self._engine.connect() as connection:
                sqlite.try_to_write(connection)
        except StoreUnavailable as error:
            return error.problem
        return sqlite.find_forbidden(self.file)

    def _look(self, work: Callable[[sa.Connection], T]) -> T:
        self._guard.check_file()
        with translate_errors(self._engine), self._engine.connect() as connection:
            return work(connection.execution_options(**sqlite.READS))


def open_database(url: str, schema: str | None = None, name: str = _NAME) -> Database:
    """Choose by the URL, which stands in the setting with this `name`. Raises SettingInvalid.

    No error repeats the URL, or a part of it that may be a password.
    """
    url = url.strip()
    scheme, separator, _ = url.partition(":")
    backend = scheme.partition("+")[0].lower()
    if separator and backend in ("postgresql", "postgres"):
        return _postgres(url, schema, name)
    if separator and backend == "sqlite":
        return SqliteFile(_file_of(url, name), name)
    problem = f"it isn't a URL; use {_USE}"
    if url[:1] in ("'", '"'):
        problem = "it begins with a quote; remove the quotes around it"
    elif separator and backend in _OTHERS:
        problem = f"it must name a SQLite file or a PostgreSQL server, not {backend}; use {_USE}"
    raise SettingInvalid(name=name, problem=problem)


def database_for(settings: Settings) -> Database:
    """The database that the settings name. Raises SettingInvalid."""
    name = settings.name_of("database_url")
    return open_database(settings.database_url, settings.schema, name)


def for_another_loop(database: Database, settings: Settings) -> Database:
    """The same database, for another event loop: one connection can't be used in two."""
    return database if database.any_loop else database_for(settings)


async def read_status(database: Database) -> Status:
    """Count what is in it. Raises as `check` does."""
    await database.check()
    return await database.host.read(lambda store: store.status())


def _postgres(url: str, schema: str | None, name: str) -> Database:
    # Imported only when used: a driver and greenlet come with an extra.
    try:
        from logto_webhooks.database.postgres import Postgres, make_postgres_engine

        return Postgres(make_postgres_engine(url, name), schema)
    except ImportError as error:
        raise SettingInvalid(name=name, problem=_import_problem(url, error)) from None


def _import_problem(url: str, error: ImportError) -> str:
    """Tell a package that is missing from packages that don't fit together."""
    text = str(error)
    missing = error.name
    if missing is None:  # these two are named in the text alone
        missing = next((name for name in ("greenlet", "libpq") if name in text), None)
    elif not isinstance(error, ModuleNotFoundError) or missing not in _DRIVERS:
        missing = None
    scheme = url.partition(":")[0].split("+")
    extra = "psycopg" if "psycopg" in (*scheme, missing) else "postgres"
    if missing:
        return f'PostgreSQL needs the extra "{extra}" of this package ({missing} is missing)'
    first_line = next(iter(text.splitlines()), type(error).__name__)
    again = f'install this package again, with its extra "{extra}", and restart'
    return f"what PostgreSQL needs can't be imported ({first_line}); {again}"


def _file_of(url: str, name: str) -> Path:
    try:
        database = sa.make_url(url).database
    except (sa.exc.ArgumentError, ValueError):
        raise SettingInvalid(name=name, problem=f"it isn't a URL; use {_USE}") from None
    if not database or database == ":memory:":
        problem = "it names no file, and what is only in memory can't be durable"
        raise SettingInvalid(name=name, problem=problem)
    return Path(database)


if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

Engine = Union[sa.Engine, "AsyncEngine"]
_USE_PLAIN_ENGINE: Final = "give the engine that it was made of"


def wrap_engine(engine: Engine, schema: str | None) -> Database:
    """Choose by the engine. Of SQLite the file alone is taken: how it is written must be durable,
    and one writes at a time. Raises SettingInvalid."""
    if not isinstance(getattr(engine, "url", None), sa.URL):
        problem = f"it must be an Engine or an AsyncEngine, not {type(engine).__name__}"
        hint = "; a URL is given as database_url"
        raise SettingInvalid(name="engine", problem=f"{problem}{hint}")
    backend = engine.url.get_backend_name()
    if backend == "sqlite":
        file = engine.url.database
        if not file or file == ":memory:":
            problem = "it names no file, and what is only in memory can't be durable"
            raise SettingInvalid(name="engine", problem=problem)
        return SqliteFile(Path(file))
    if backend != "postgresql":
        problem = f"it must be of SQLite or PostgreSQL, not {backend}"
        raise SettingInvalid(name="engine", problem=problem)
    # Imported only when used: greenlet comes with the extra `postgres`.
    from logto_webhooks.database.postgres import LEVEL, Postgres, ThreadedPostgres

    level = str(engine.get_execution_options().get("isolation_level", LEVEL))
    if level.upper().replace("_", " ") != LEVEL:
        problem = f"its execution_options say {level}, which can't be changed: {_USE_PLAIN_ENGINE}"
        raise SettingInvalid(name="engine", problem=problem)
    if isinstance(engine, sa.Engine):
        return ThreadedPostgres(engine, schema)
    return Postgres(engine, schema, owns=False)
