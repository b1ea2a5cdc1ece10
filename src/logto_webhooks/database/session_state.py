"""Watch what a handler does with its connection: put back what it set, and keep our tables from
its writes and locks."""

from __future__ import annotations

import re
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event

from logto_webhooks.database.schema import VERSION_TABLE, metadata
from logto_webhooks.database.sessions import OURS
from logto_webhooks.errors import TableIsReadOnly

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
            self._before = _pragmas(connection)
        elif _KEPT in connection.info:
            self._before = connection.info[_KEPT]
        else:
            self._before = connection.info[_KEPT] = tuple(connection.execute(_LOOK).one())
        event.listen(connection, "before_cursor_execute", self._executes)

    def put_back(self) -> bool:
        """Put settings back, in the transaction; return whether to close the connection then."""
        event.remove(self._connection, "before_cursor_execute", self._executes)
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
        after = _pragmas(self._connection)
        for name, was, now in zip(_PRAGMAS, self._before, after, strict=False):
            if was != now:
                self._connection.exec_driver_sql(f"PRAGMA {name} = {was}")
        return self.doubtful or after != self._before

    def _executes(self, connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if "logto_" in statement and not connection.get_execution_options().get(OURS):
            _refuse_write(statement)
        self.doubtful = self.doubtful or outlasts(statement)


def outlasts(statement: str) -> bool:
    """Whether a statement may change its connection beyond the transaction."""
    found = _BEGINNING.match(statement)
    word = found[1].lower() if found else ""
    is_local = word == "set" and found is not None and found[2] is not None
    to_savepoint = word == "rollback" and " to " in statement.lower()
    if not _PLAIN.fullmatch(word) and not is_local and not to_savepoint:
        return True
    return _SPEAKS_OF.search(statement) is not None


def written_table(statement: str) -> str | None:
    """Which of our tables a statement writes to, or locks; None if there is none.

    Everybody's deliveries would wait for the end of the handler.
    """
    found = _WRITES.search(statement) or _LOCKS.search(statement)
    return found[1] if found else None


def _refuse_write(statement: str) -> None:
    if table := written_table(statement):
        raise TableIsReadOnly(table=table)


def _pragmas(connection: sa.Connection) -> tuple[Any, ...]:
    driver: Any = connection.connection.dbapi_connection
    found = [driver.execute(f"PRAGMA {name}").fetchone() for name in _PRAGMAS]
    beside = driver.execute(_BESIDE).fetchone()
    return (*(value and value[0] for value in found), *beside)
