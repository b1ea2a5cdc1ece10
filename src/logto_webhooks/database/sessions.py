"""What a handler can ask for by annotation: sessions and connections bound to our transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool, QueuePool

from logto_webhooks.errors import SettingInvalid, TransactionEnded

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

SYNC: Final[tuple[type, ...]] = (Session, sa.Connection)
# What a session commits or rolls back by itself is a savepoint; "done" commits it all.
SESSION: Final[dict[str, Any]] = {
    "join_transaction_mode": "create_savepoint",
    "expire_on_commit": False,
}
_FAILED: Final = "25P02"  # PostgreSQL's: in_failed_sql_transaction
# PostgreSQL's: no_active_sql_transaction, invalid_savepoint_specification
_ENDED: Final = ("25P01", "3B001")
OURS: Final = "logto_ours"  # an option of a connection while statements of this package run on it
THEIRS: Final = "logto_theirs"  # the same, while a handler has it
_MAP: Final = "schema_translate_map"
_ROOM: Final = 4  # what a pool of SQLAlchemy's usual size has


def pool_limit(pool: Pool) -> int:
    """How many handlers may hold a connection each: all but one, for who accepts and applies."""
    size = pool.size() if isinstance(pool, QueuePool) else 0
    return max(1, size - 1) if size else _ROOM


def translation(engine: sa.Engine | sa.Connection | AsyncEngine) -> Any:
    """Where an application's engine or connection says that its tables are."""
    return engine.get_execution_options().get(_MAP)


@contextmanager
def app_schema(connection: sa.Connection, theirs: Any) -> Iterator[None]:
    """Our schema is ours: the application's tables are where it says, by `theirs`."""
    with _mapped(connection, theirs, **{THEIRS: True}):
        yield


@contextmanager
def our_schema(engine: sa.Engine, connection: sa.Connection) -> Iterator[None]:
    """Our tables are where our engine says, on a connection that is the application's."""
    with _mapped(connection, translation(engine), **{OURS: True}):
        yield


@contextmanager
def in_schema(connection: sa.Connection, schema: str | None) -> Iterator[None]:
    """The same, where a schema is named."""
    with _mapped(connection, schema_map(schema)):
        yield


def schema_map(schema: str | None) -> dict[str | None, str | None] | None:
    """How SQLAlchemy is told that our tables are in a schema, or in the default one."""
    return {None: schema} if schema else None


@contextmanager
def handler_savepoint(connection: sa.Connection) -> Iterator[None]:
    """A savepoint in which a handler is called. Raises as `kept`."""
    begun = connection.begin_nested()
    try:
        yield
    except BaseException as error:
        rollback(connection, begun)
        if has_no_transaction(error):
            raise TransactionEnded() from error
        raise
    release(connection, begun)


@contextmanager
def _mapped(connection: sa.Connection, there: Any, **options: Any) -> Iterator[None]:
    before = translation(connection)
    connection.execution_options(**{_MAP: there}, **options)
    try:
        yield
    finally:
        connection.execution_options(**{_MAP: before}, **dict.fromkeys(options))


def no_session(session: object, wanted: str) -> SettingInvalid:
    """The error about a session that can't be used."""
    problem = f"it must be {wanted} here, not {type(session).__name__}"
    return SettingInvalid(name="session", problem=problem)


def make_session(wish: type, connection: sa.Connection) -> Any:
    """Give a Session, or a subclass of the application's, or a Connection."""
    return connection if wish is sa.Connection else wish(bind=connection, **SESSION)


def finish_session(given: Any) -> None:
    """Write what a session holds, and let go of it."""
    if isinstance(given, Session):
        given.commit()
        given.close()


def rollback(connection: sa.Connection, begun: sa.NestedTransaction) -> None:
    """Roll the savepoint back in which a handler was called, if that can still be done."""
    if connection.get_nested_transaction() is begun and not connection.invalidated:
        with suppress(sa.exc.SQLAlchemyError):
            begun.rollback()


def has_no_transaction(error: BaseException) -> bool:
    """Whether a statement failed because the transaction, or a savepoint in it, is over: somebody
    ended it by hand."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return isinstance(error, sa.exc.DBAPIError) and state in _ENDED


def release(connection: sa.Connection, begun: sa.NestedTransaction) -> None:
    """Release it. Raises TransactionEnded when a handler ended what only "done" may end, be it
    behind SQLAlchemy's back."""
    if not begun.is_active or connection.get_nested_transaction() is not begun:
        raise TransactionEnded()
    try:
        begun.commit()
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _FAILED:
            raise  # it went on after an error of the database
        raise TransactionEnded() from error
