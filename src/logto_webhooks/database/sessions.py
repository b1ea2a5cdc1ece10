"""Lend our transaction to a handler, as a session or a connection. Its settings are restored
afterwards, and it can't write to or lock our tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import Pool, QueuePool

from logto_webhooks.database.schema import VERSION_TABLE, installation, metadata
from logto_webhooks.errors import SettingInvalid, TableIsReadOnly, TransactionEnded

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import Session, SessionTransaction

# A session commits or rolls back only a savepoint. All is committed with the job's state "done".
SESSION: Final[dict[str, Any]] = {
    "join_transaction_mode": "create_savepoint",
    "expire_on_commit": False,
}
_CLOSED: Final = "logto_webhooks_closed"
_FAILED: Final = "25P02"  # PostgreSQL's: in_failed_sql_transaction
# PostgreSQL's: no_active_sql_transaction, invalid_savepoint_specification
_ENDED: Final = ("25P01", "3B001")
OF_APPLICATION: Final = "logto_of_application"  # an option: the SQL is the application's
INTERNAL: Final = "logto_internal"  # the same while it runs statements of this package
APP_SCHEMAS: Final = "logto_app_schemas"  # where the application's tables are
_SCHEMA_MAP: Final = "schema_translate_map"
_DEFAULT_LIMIT: Final = 4  # the limit with SQLAlchemy's default pool size, 5


def get_sync_types() -> tuple[type, ...]:
    """Return the types of transaction that synchronous handlers can ask for."""
    from sqlalchemy.orm import Session  # slow to import, and rarely used

    return (Session, sa.Connection)


def get_handler_limit(pool: Pool) -> int:
    """Return how many handlers may hold a connection at once. One connection of the pool remains
    for others."""
    size = pool.size() if isinstance(pool, QueuePool) else 0
    return max(1, size - 1) if size else _DEFAULT_LIMIT


def get_schema_map(engine: sa.Engine | sa.Connection | AsyncEngine) -> Any:
    """Return the schema_translate_map of an application's engine or connection."""
    return engine.get_execution_options().get(_SCHEMA_MAP)


@contextmanager
def lend(connection: sa.Connection) -> Iterator[None]:
    """Lend the connection to a handler within the block. Its schema_translate_map is then the
    application's, and the handler can't commit."""
    event.listen(connection, "commit", _refuse)
    try:
        with _use_schema_map(connection, _get_app_schemas(connection), **{OF_APPLICATION: True}):
            yield
    finally:
        event.remove(connection, "commit", _refuse)


def _refuse(connection: sa.Connection) -> None:
    raise TransactionEnded()


def use_our_schema(engine: sa.Engine, connection: sa.Connection) -> AbstractContextManager[None]:
    """Use our engine's schema_translate_map on an application's connection within the block."""
    options = {INTERNAL: True, APP_SCHEMAS: get_schema_map(connection)}
    return _use_schema_map(connection, get_schema_map(engine), **options)


def use_schema(connection: sa.Connection, schema: str | None) -> AbstractContextManager[None]:
    """Use `schema` for our tables on an application's connection within the block."""
    options = {APP_SCHEMAS: get_schema_map(connection)}
    return _use_schema_map(connection, make_schema_map(schema), **options)


def use_app_schemas(connection: sa.Connection) -> AbstractContextManager[None]:
    """Use the application's schema_translate_map on a connection within the block."""
    return _use_schema_map(connection, _get_app_schemas(connection))


def _get_app_schemas(connection: sa.Connection) -> Any:
    return connection.get_execution_options().get(APP_SCHEMAS)


def make_schema_map(schema: str | None) -> dict[str | None, str | None] | None:
    """Return the schema_translate_map for our tables. None stands for the default schema."""
    return {None: schema} if schema else None


@contextmanager
def _use_schema_map(connection: sa.Connection, schema_map: Any, **options: Any) -> Iterator[None]:
    options[_SCHEMA_MAP] = schema_map
    before = connection.get_execution_options()
    connection.execution_options(**options)
    try:
        yield
    finally:
        connection.execution_options(**{name: before.get(name) for name in options})


@contextmanager
def handler_savepoint(connection: sa.Connection) -> Iterator[None]:
    """Run the block, which calls a handler, in a savepoint. Raises TransactionEnded."""
    savepoint = connection.begin_nested()
    try:
        yield
    except BaseException as error:
        roll_back_savepoint(connection, savepoint, error)
        raise
    release(connection, savepoint)


@contextmanager
def writing(connection: sa.Connection) -> Iterator[None]:
    """Begin a transaction that can read records and change them, on an application's connection.
    If the block raises, what it wrote and locked is undone.

    Raises SettingInvalid in autocommit mode, in which a lock ends with its statement, and at
    REPEATABLE READ or SERIALIZABLE: a statement after a lock must see what others committed before.
    """
    began = _begin_writing(connection)
    savepoint = connection.begin_nested()
    try:
        yield
    except BaseException:
        if savepoint.is_active:
            savepoint.rollback()
        if began:  # or others would wait for SQLite's only writer
            connection.connection.rollback()
        raise
    savepoint.commit()


def _begin_writing(connection: sa.Connection) -> bool:
    """Return whether this began the driver's transaction."""
    if connection.dialect.name == "sqlite":
        # Python's driver begins one only before the first write: after that, reads are up to date.
        driver: Any = connection.connection.driver_connection
        began = not driver.in_transaction
        if began:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.execute(sa.update(installation).where(sa.false()).values(id=1))
        return began
    driver = connection.connection.dbapi_connection
    if (
        getattr(driver, "autocommit", False)
        or getattr(driver, "isolation_level", None) == "autocommit"
    ):
        problem = "it is in autocommit mode, but this needs a transaction: use another session"
        raise SettingInvalid(name="session", problem=problem)
    # Only the server knows: a driver knows neither its default nor what SET TRANSACTION has set.
    level = connection.scalar(sa.select(sa.func.current_setting("transaction_isolation")))
    if level in ("repeatable read", "serializable"):
        problem = (
            f"its transaction is at {level.upper()}, but this must see what others commit: use a "
            'READ COMMITTED session, such as of engine.execution_options(isolation_level="READ '
            'COMMITTED"), or call ensure_user without session='
        )
        raise SettingInvalid(name="session", problem=problem)
    return False


def make_session_error(session: object, wanted: str, advice: str = "") -> SettingInvalid:
    """Return the error for a session that can't be used."""
    problem = f"it must be {wanted} here, not {type(session).__name__}"
    problem += f"; {advice}, or write it as `async def`" if advice else ""
    return SettingInvalid(name="session", problem=problem)


def make_session(kind: type, connection: sa.Connection) -> Any:
    """Return the Connection, or a Session or a subclass of it on that connection."""
    if kind is sa.Connection:
        return connection
    session = kind(bind=connection, **SESSION)
    note_closing(session)
    return session


def finish_session(session: Any) -> None:
    """Write the pending changes of a session and close it. A Connection has none. Raises
    TransactionEnded."""
    if not isinstance(session, sa.Connection):
        check_not_closed(session)
        session.commit()
        session.close()


def note_closing(session: Session) -> None:
    """Note in a session if it is closed in the middle of a transaction, such as by `with session:`.
    SQLAlchemy then silently rolls back what was written."""
    is_committed = False

    def note_commit(session: Session) -> None:
        nonlocal is_committed
        is_committed = True

    def note_end(session: Session, transaction: SessionTransaction) -> None:
        nonlocal is_committed
        if not is_committed and transaction.parent is None:
            session.info[_CLOSED] = transaction
        is_committed = False

    def note_rollback(session: Session, transaction: SessionTransaction) -> None:
        if session.info.get(_CLOSED) is transaction:
            del session.info[_CLOSED]

    event.listen(session, "after_commit", note_commit)
    event.listen(session, "after_transaction_end", note_end)
    event.listen(session, "after_soft_rollback", note_rollback)  # after its end


def check_not_closed(session: Session) -> None:
    """Raises TransactionEnded if a session was closed in the middle of a transaction."""
    if _CLOSED in session.info:
        raise TransactionEnded()


def roll_back_savepoint(
    connection: sa.Connection, savepoint: sa.NestedTransaction, error: BaseException
) -> None:
    """Roll back to the savepoint of a handler that raised, if possible.

    Raises TransactionEnded if the handler's error is that the transaction, or a savepoint in it,
    was ended by hand.
    """
    is_ended = not savepoint.is_active and not connection.invalidated
    if connection.get_nested_transaction() is savepoint and not connection.invalidated:
        with suppress(sa.exc.SQLAlchemyError):
            savepoint.rollback()
    if is_ended and isinstance(error, sa.exc.InvalidRequestError):  # raised by SQLAlchemy itself
        raise TransactionEnded() from error
    if isinstance(error, sa.exc.DBAPIError) and getattr(error.orig, "sqlstate", None) in _ENDED:
        raise TransactionEnded() from error


def release(connection: sa.Connection, savepoint: sa.NestedTransaction) -> None:
    """Release the savepoint of a handler. Raises TransactionEnded if the handler ended it or the
    transaction, even in SQL that SQLAlchemy knows nothing of."""
    if not savepoint.is_active or connection.get_nested_transaction() is not savepoint:
        raise TransactionEnded()
    try:
        savepoint.commit()
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _FAILED:
            raise  # the handler went on after an error of the database
        raise TransactionEnded() from error


_CACHED: Final = "logto_webhooks_settings"
_SETTINGS: Final = (  # the role first, because it decides which others may be set
    "session_authorization",
    "role",
    "statement_timeout",
    "search_path",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "default_transaction_read_only",
    "default_transaction_isolation",
    "default_transaction_deferrable",
    "synchronous_commit",
    "session_replication_role",
    "row_security",
    "check_function_bodies",
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "bytea_output",
    "client_encoding",
    "client_min_messages",
    "standard_conforming_strings",
    "application_name",
    "work_mem",
    "jit",
    "enable_seqscan",
    "enable_indexscan",
)
_READ_ALL: Final = sa.text(
    "SELECT " + ", ".join(f"current_setting('{name}', true)" for name in _SETTINGS)
)


def _format_restore(name: str, number: int) -> str:
    was = f"CAST(:was{number} AS text)"
    changed = f"current_setting('{name}', true) <> {was}"
    return f"CASE WHEN {changed} THEN set_config('{name}', {was}, false) END"


# One statement compares the settings and restores them. Columns are computed in order. It also
# releases the session's advisory locks.
_RESTORE_ALL: Final = sa.text(
    "SELECT "
    + ", ".join(_format_restore(name, number) for number, name in enumerate(_SETTINGS))
    + ", CASE WHEN pg_my_temp_schema() <> 0 AND EXISTS (SELECT FROM pg_class"
    " WHERE relnamespace = pg_my_temp_schema()) THEN 'temporary' END, pg_advisory_unlock_all()"
)
_PRAGMAS: Final = (
    "query_only",
    "foreign_keys",
    "synchronous",
    "busy_timeout",
    "locking_mode",
    "ignore_check_constraints",
    "recursive_triggers",
    "defer_foreign_keys",
    "read_uncommitted",
    "secure_delete",
    "cache_size",
    "temp_store",
    "trusted_schema",
)
_COUNT_TEMPORARY: Final = (
    "SELECT (SELECT count(*) FROM sqlite_temp_master), (SELECT count(*) FROM pragma_database_list)"
)
_FIRST_WORD: Final = re.compile(
    r"(?:\s|\(|/\*.*?\*/|--[^\n]*\n)*([a-z]+)(?:\s+(local)\b)?", re.S | re.I
)
_TRANSACTIONAL: Final = re.compile(
    "select|insert|update|delete|merge|replace|with|values|savepoint|release|lock|truncate|copy|explain",
    re.I,
)
_ENDING: Final = re.compile(r"(?:commit|end|abort|rollback|prepare\s+transaction)\b", re.I)
_TO_SAVEPOINT: Final = re.compile(r"rollback(?:\s+(?:work|transaction))?\s+to\b", re.I)
_OUTLASTING: Final = re.compile(r"set_config|pg_(?:try_)?advisory_lock|;\s*\S|\binto\s+temp", re.I)

_TABLES: Final = "|".join(sorted([*metadata.tables, VERSION_TABLE], key=len, reverse=True))
_OUR_TABLE: Final = rf'(?:[\w"]+\.)?"?({_TABLES})\b'
_WRITES: Final = re.compile(
    r"\b(?:insert\s+into|update|delete\s+from|merge\s+into|truncate(?:\s+table)?|lock(?:\s+table)?"
    r"|(?:alter|drop)\s+table(?:\s+if\s+exists)?|create\s+(?:unique\s+)?index\b[^;(]*?\bon)"
    rf"\s+(?:only\s+)?(?:[\w\".]+\s*,\s*)*{_OUR_TABLE}",
    re.I,
)
_LOCKS: Final = re.compile(
    rf"\b(?:from|join)\s+{_OUR_TABLE}.*\bfor\s+(?:no\s+key\s+|key\s+)?(?:update|share)\b(?!\s+of\b)",
    re.I | re.S,
)


class ConnectionWatch:
    """Watches what a handler does with a connection that others use after it."""

    def __init__(self, connection: sa.Connection) -> None:
        """Start watching. On PostgreSQL, read the settings once per connection of the pool."""
        self._connection = connection
        self._sqlite = connection.dialect.name == "sqlite"
        self._may_outlast = False  # whether a statement may have effects beyond the transaction
        if self._sqlite:
            self._before = _read_pragmas(connection)
        elif _CACHED in connection.info:
            self._before = connection.info[_CACHED]
        else:
            self._before = connection.info[_CACHED] = tuple(connection.execute(_READ_ALL).one())
        event.listen(connection, "before_cursor_execute", self._watch)

    def restore(self) -> bool:
        """Restore settings, in the transaction. Return whether to close the connection then."""
        event.remove(self._connection, "before_cursor_execute", self._watch)
        return self._restore_pragmas() if self._sqlite else self._restore_settings()

    def _restore_settings(self) -> bool:
        connection = self._connection
        if self._may_outlast:  # the handler's time limit may be too short for what follows
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        was = {f"was{number}": value or "" for number, value in enumerate(self._before)}
        *changed, temporary, _ = connection.execute(_RESTORE_ALL, was).one()
        if temporary:
            connection.exec_driver_sql("DISCARD TEMP")
        if self._may_outlast:
            connection.exec_driver_sql("UNLISTEN *")
        return self._may_outlast or bool(temporary) or any(value is not None for value in changed)

    def _restore_pragmas(self) -> bool:
        after = _read_pragmas(self._connection)
        for name, was, now in zip(_PRAGMAS, self._before, after, strict=False):
            if was != now:
                self._connection.exec_driver_sql(f"PRAGMA {name} = {was}")
        return self._may_outlast or after != self._before

    def _watch(self, connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        # A constraint or trigger with ROLLBACK ends it. Further statements would commit at once.
        if self._sqlite and not connection.connection.driver_connection.in_transaction:
            raise TransactionEnded()
        is_ours = "logto_" not in statement or connection.get_execution_options().get(INTERNAL)
        if not is_ours and (table := find_written_table(statement)):
            raise TableIsReadOnly(table=table)
        if may_outlast_transaction(statement):
            if ends_transaction(statement):
                raise TransactionEnded()
            self._may_outlast = True


def may_outlast_transaction(statement: str) -> bool:
    """Whether a statement may change its connection beyond the transaction."""
    beginning = _FIRST_WORD.match(statement)
    word = beginning[1].lower() if beginning else ""
    is_local = word == "set" and beginning is not None and beginning[2] is not None
    to_savepoint = beginning is not None and _TO_SAVEPOINT.match(statement, beginning.start(1))
    if not _TRANSACTIONAL.fullmatch(word) and not is_local and not to_savepoint:
        return True
    return _OUTLASTING.search(statement) is not None


def ends_transaction(statement: str) -> bool:
    """Whether a statement ends the transaction, and not only a savepoint in it."""
    beginning = _FIRST_WORD.match(statement)
    if beginning is None or not _ENDING.match(statement, beginning.start(1)):
        return False
    return not _TO_SAVEPOINT.match(statement, beginning.start(1))


def find_written_table(statement: str) -> str | None:
    """Return which of our tables a statement writes to or locks; None if it doesn't.

    All other deliveries would wait for the end of the handler.
    """
    match = _WRITES.search(statement) or _LOCKS.search(statement)
    return match[1] if match else None


def _read_pragmas(connection: sa.Connection) -> tuple[Any, ...]:
    driver: Any = connection.connection.dbapi_connection
    rows = [driver.execute(f"PRAGMA {name}").fetchone() for name in _PRAGMAS]
    return (*(row and row[0] for row in rows), *driver.execute(_COUNT_TEMPORARY).fetchone())
