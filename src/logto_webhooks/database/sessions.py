"""What a handler has of our transaction: a session or a connection, of which what it set is put
back, and with which it can't write to or lock our tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import Pool, QueuePool

from logto_webhooks.database.schema import VERSION_TABLE, metadata
from logto_webhooks.errors import SettingInvalid, TableIsReadOnly, TransactionEnded

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

# What a session commits or rolls back by itself is a savepoint; "done" commits it all.
SESSION: Final[dict[str, Any]] = {
    "join_transaction_mode": "create_savepoint",
    "expire_on_commit": False,
}
_FAILED: Final = "25P02"  # PostgreSQL's: in_failed_sql_transaction
# PostgreSQL's: no_active_sql_transaction, invalid_savepoint_specification
_ENDED: Final = ("25P01", "3B001")
THEIRS: Final = "logto_theirs"  # an option of a connection while a handler has it
OURS: Final = "logto_ours"  # an option of a connection while statements of this package run on it
_MAP: Final = "schema_translate_map"
_ROOM: Final = 4  # what a pool of SQLAlchemy's usual size has


def sync_types() -> tuple[type, ...]:
    """The kinds of transaction that plain handlers can have."""
    from sqlalchemy.orm import Session  # which takes long, and is seldom used

    return (Session, sa.Connection)


def pool_limit(pool: Pool) -> int:
    """How many handlers may hold a connection each: all but one, for who accepts and applies."""
    size = pool.size() if isinstance(pool, QueuePool) else 0
    return max(1, size - 1) if size else _ROOM


def translation(engine: sa.Engine | sa.Connection | AsyncEngine) -> Any:
    """Where an application's engine or connection says that its tables are."""
    return engine.get_execution_options().get(_MAP)


@contextmanager
def lend(connection: sa.Connection, theirs: Any) -> Iterator[None]:
    """While the block lasts, a handler has the connection: the application's tables are where it
    says, by `theirs`, and only "done" commits."""
    event.listen(connection, "commit", _refuse)
    try:
        with _mapped(connection, theirs, **{THEIRS: True}):
            yield
    finally:
        event.remove(connection, "commit", _refuse)


def _refuse(connection: sa.Connection) -> None:
    raise TransactionEnded()


def our_schema(engine: sa.Engine, connection: sa.Connection) -> AbstractContextManager[None]:
    """Our tables are where our engine says, on a connection that is the application's."""
    return _mapped(connection, translation(engine), **{OURS: True})


def in_schema(connection: sa.Connection, schema: str | None) -> AbstractContextManager[None]:
    """The same, where a schema is named."""
    return _mapped(connection, schema_map(schema))


def schema_map(schema: str | None) -> dict[str | None, str | None] | None:
    """How SQLAlchemy is told that our tables are in a schema, or in the default one."""
    return {None: schema} if schema else None


@contextmanager
def _mapped(connection: sa.Connection, there: Any, **options: Any) -> Iterator[None]:
    before = translation(connection)
    connection.execution_options(**{_MAP: there}, **options)
    try:
        yield
    finally:
        connection.execution_options(**{_MAP: before}, **dict.fromkeys(options))


@contextmanager
def handler_savepoint(connection: sa.Connection) -> Iterator[None]:
    """A savepoint in which a handler is called. Raises TransactionEnded as the two below."""
    savepoint = connection.begin_nested()
    try:
        yield
    except BaseException as error:
        roll_back(connection, savepoint, error)
        raise
    release(connection, savepoint)


def no_session(session: object, wanted: str) -> SettingInvalid:
    """The error about a session that can't be used."""
    problem = f"it must be {wanted} here, not {type(session).__name__}"
    return SettingInvalid(name="session", problem=problem)


def make_session(wish: type, connection: sa.Connection) -> Any:
    """Give a Session, or a subclass of the application's, or a Connection."""
    return connection if wish is sa.Connection else wish(bind=connection, **SESSION)


def finish_session(session: Any) -> None:
    """Write what a session holds, and let go of it; a Connection holds nothing."""
    if not isinstance(session, sa.Connection):
        session.commit()
        session.close()


def roll_back(
    connection: sa.Connection, savepoint: sa.NestedTransaction, error: BaseException
) -> None:
    """Roll the savepoint back in which a handler raised, if that can still be done.

    Raises TransactionEnded if it failed because somebody ended the transaction, or a savepoint in
    it, by hand.
    """
    is_ended = not savepoint.is_active and not connection.invalidated
    if connection.get_nested_transaction() is savepoint and not connection.invalidated:
        with suppress(sa.exc.SQLAlchemyError):
            savepoint.rollback()
    if is_ended and isinstance(error, sa.exc.InvalidRequestError):  # SQLAlchemy's own
        raise TransactionEnded() from error
    if isinstance(error, sa.exc.DBAPIError) and getattr(error.orig, "sqlstate", None) in _ENDED:
        raise TransactionEnded() from error


def release(connection: sa.Connection, savepoint: sa.NestedTransaction) -> None:
    """Release it. Raises TransactionEnded when a handler ended what only "done" may end, be it
    behind SQLAlchemy's back."""
    if not savepoint.is_active or connection.get_nested_transaction() is not savepoint:
        raise TransactionEnded()
    try:
        savepoint.commit()
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _FAILED:
            raise  # it went on after an error of the database
        raise TransactionEnded() from error


_KEPT: Final = "logto_webhooks_settings"
_SETTINGS: Final = (  # the role first: it decides which of the others may be set
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
_LOOK: Final = sa.text(
    "SELECT " + ", ".join(f"current_setting('{name}', true)" for name in _SETTINGS)
)


def _put_back(name: str, number: int) -> str:
    was = f"CAST(:was{number} AS text)"
    changed = f"current_setting('{name}', true) <> {was}"
    return f"CASE WHEN {changed} THEN set_config('{name}', {was}, false) END"


# One statement looks and puts back. Columns are computed in their order. Locks of the session are
# given up.
_RESTORE: Final = sa.text(
    "SELECT "
    + ", ".join(_put_back(name, number) for number, name in enumerate(_SETTINGS))
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
_BESIDE: Final = (
    "SELECT (SELECT count(*) FROM sqlite_temp_master), (SELECT count(*) FROM pragma_database_list)"
)
_BEGINNING: Final = re.compile(
    r"(?:\s|\(|/\*.*?\*/|--[^\n]*\n)*([a-z]+)(?:\s+(local)\b)?", re.S | re.I
)
_PLAIN: Final = re.compile(
    "select|insert|update|delete|merge|replace|with|values|savepoint|release|lock|truncate|copy|explain",
    re.I,
)
_ENDS: Final = re.compile(r"(?:commit|end|abort|rollback|prepare\s+transaction)\b", re.I)
_SPEAKS_OF: Final = re.compile(r"set_config|pg_(?:try_)?advisory_lock|;\s*\S|\binto\s+temp", re.I)

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


class Traces:
    """Watches what a handler does with a connection that others will have after it."""

    def __init__(self, connection: sa.Connection) -> None:
        """From now on; it may look once, as long as that connection is open."""
        self._connection = connection
        self._sqlite = connection.dialect.name == "sqlite"
        self.doubtful = False  # whether it did what outlasts a transaction, or may have
        if self._sqlite:
            self._before = _read_pragmas(connection)
        elif _KEPT in connection.info:
            self._before = connection.info[_KEPT]
        else:
            self._before = connection.info[_KEPT] = tuple(connection.execute(_LOOK).one())
        event.listen(connection, "before_cursor_execute", self._watch)

    def put_back(self) -> bool:
        """Put settings back, in the transaction; return whether to close the connection then."""
        event.remove(self._connection, "before_cursor_execute", self._watch)
        return self._put_back_pragmas() if self._sqlite else self._put_back_settings()

    def _put_back_settings(self) -> bool:
        connection = self._connection
        if self.doubtful:  # its time limit may be shorter than what follows takes
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        was = {f"was{number}": value or "" for number, value in enumerate(self._before)}
        *changed, temporary, _ = connection.execute(_RESTORE, was).one()
        if temporary:
            connection.exec_driver_sql("DISCARD TEMP")
        if self.doubtful:
            connection.exec_driver_sql("UNLISTEN *")
        return self.doubtful or bool(temporary) or any(value is not None for value in changed)

    def _put_back_pragmas(self) -> bool:
        after = _read_pragmas(self._connection)
        for name, was, now in zip(_PRAGMAS, self._before, after, strict=False):
            if was != now:
                self._connection.exec_driver_sql(f"PRAGMA {name} = {was}")
        return self.doubtful or after != self._before

    def _watch(self, connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        is_ours = "logto_" not in statement or connection.get_execution_options().get(OURS)
        if not is_ours and (table := written_table(statement)):
            raise TableIsReadOnly(table=table)
        if outlasts(statement):
            if ends(statement):
                raise TransactionEnded()
            self.doubtful = True


def outlasts(statement: str) -> bool:
    """Whether a statement may change its connection beyond the transaction."""
    beginning = _BEGINNING.match(statement)
    word = beginning[1].lower() if beginning else ""
    is_local = word == "set" and beginning is not None and beginning[2] is not None
    to_savepoint = word == "rollback" and " to " in statement.lower()
    if not _PLAIN.fullmatch(word) and not is_local and not to_savepoint:
        return True
    return _SPEAKS_OF.search(statement) is not None


def ends(statement: str) -> bool:
    """Whether a statement ends the transaction, and not only a savepoint in it."""
    beginning = _BEGINNING.match(statement)
    if beginning is None or not _ENDS.match(statement, beginning.start(1)):
        return False
    return " to " not in statement.lower()


def written_table(statement: str) -> str | None:
    """Which of our tables a statement writes to, or locks; None if there is none.

    Everybody's deliveries would wait for the end of the handler.
    """
    match = _WRITES.search(statement) or _LOCKS.search(statement)
    return match[1] if match else None


def _read_pragmas(connection: sa.Connection) -> tuple[Any, ...]:
    driver: Any = connection.connection.dbapi_connection
    rows = [driver.execute(f"PRAGMA {name}").fetchone() for name in _PRAGMAS]
    return (*(row and row[0] for row in rows), *driver.execute(_BESIDE).fetchone())
