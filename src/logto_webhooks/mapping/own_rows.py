"""Find the application's own row of a user or an organization, as an object of its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import RowState, StateStore, decode_ids
from logto_webhooks.mapping.declare import EntityMapping, OwnValues
from logto_webhooks.mapping.former_rows import find_texts, may_be_another
from logto_webhooks.mapping.functions import SHARED_S, FunctionCaller
from logto_webhooks.mapping.mirror import read_rows
from logto_webhooks.mapping.primary_keys import describe_several
from logto_webhooks.mapping.sources import describe_raised

T = TypeVar("T")
_DELETED_HERE: Final = "it was deleted here; `logto-webhooks mapping apply` writes it again"


class OwnRow(Struct, frozen=True, kw_only=True):
    """Whether a record's own row is `here`, `waits` for the `reason`, or is `absent`: then none
    will be written. If it is `here`, the `reason` is for the case that the application deleted it.

    `primary_key` is set if the row no longer has Logto's id, because the record was deleted. If
    another row may have it by now, `texts` are what the row was written with.
    """

    state: Literal["here", "waits", "absent"]
    reason: str = ""
    primary_key: tuple[Any, ...] | None = None
    texts: dict[str, str | None] = {}
    is_known: bool = True  # whether the mirror has the record
    is_deleted: bool = False  # whether the record was deleted in Logto


def find_own_row(connection: sa.Connection, mapping: EntityMapping, logto_id: str) -> OwnRow:
    """Find out about a record's own row, without reading the application's table."""
    row = read_rows(connection, mapping.kind, [logto_id]).get(logto_id)
    if row is None:
        reason = f"the {mapping.kind} isn't known yet"
        return OwnRow(state="waits", reason=reason, is_known=False)
    states = StateStore(connection, mapping.name, mapping.kind)
    stored = states.find([logto_id]).get(logto_id)
    is_deleted = row.deleted_at is not None
    row_id = None if stored is None else stored.row_id
    primary_key = None
    texts: dict[str, str | None] = {}
    if stored is not None and row_id is not None and is_deleted:
        if mapping.when_deleted == "unlink" and states.find_deleted([logto_id]):
            decoded = decode_ids([row_id], mapping.primary_key, connection.dialect)
            primary_key = decoded.get(row_id)
            if may_be_another(mapping, connection.dialect):
                texts = _read_texts(mapping, logto_id, row)
        elif mapping.when_deleted == "unlink" and stored.is_settled:
            row_id = None  # the application deleted the row, so another one may have its key
    if stored is not None and row_id is not None:
        return OwnRow(
            state="here",
            reason=_explain_deletion(mapping, stored),
            primary_key=primary_key,
            texts=texts,
            is_deleted=is_deleted,
        )
    if is_deleted:
        reason = f"the {mapping.kind} was deleted in Logto"
        return OwnRow(state="absent", reason=reason, is_deleted=True)
    return _explain_absence(mapping, logto_id, row, stored)


def _read_texts(mapping: EntityMapping, logto_id: str, row: Any) -> dict[str, str | None]:
    """Return the texts with which a record's row was written."""
    evaluated = _call(mapping, mapping.evaluate, logto_id, row)
    return find_texts(mapping, evaluated) if isinstance(evaluated, OwnValues) else {}


def _call(
    mapping: EntityMapping, function: Callable[[Any], T], logto_id: str, row: Any
) -> T | Exception:
    """Call functions of the application, within a time limit."""
    if not mapping.has_functions:
        return function(row)
    return FunctionCaller(SHARED_S).call(mapping.name, function, {logto_id: row})[logto_id]


def _explain_deletion(mapping: EntityMapping, stored: RowState) -> str:
    """Say why a row that was written isn't here, if the application deleted it."""
    if stored.state == "excluded":
        return f"it was deleted here, and {stored.reason} excludes the {mapping.kind}"
    return stored.reason or _DELETED_HERE


def _explain_absence(
    mapping: EntityMapping, logto_id: str, row: Any, stored: RowState | None
) -> OwnRow:
    if stored is not None and not stored.is_settled:
        return OwnRow(state="waits", reason=stored.reason or stored.state)
    is_wanted = _call(mapping, mapping.where, logto_id, row)
    if isinstance(is_wanted, Exception):
        return OwnRow(state="waits", reason=describe_raised(is_wanted))
    if not is_wanted:
        return OwnRow(state="absent", reason=f"`where` excludes the {mapping.kind}")
    if stored is not None and not mapping.create:
        return OwnRow(state="absent", reason="no existing row is linked, and create=False")
    return OwnRow(state="waits", reason="it hasn't been written yet")


def describe_several_rows(mapping: EntityMapping) -> str:
    """Say why a record has no row: several have its id."""
    return describe_several(f"ID in {mapping.key.column.name}")


def select_own(mapping: EntityMapping, target: Any, logto_id: str, row: OwnRow) -> sa.Select[Any]:
    """Select a record's own row as an object of the class `target`."""
    query, key = sa.select(target), mapping.key.text
    if row.primary_key is None:
        return query.where(key == logto_id)
    # The application may have given the row to somebody else since.
    query = query.where(sa.or_(key.is_(None), key == logto_id))
    for column, value in zip(mapping.primary_key, row.primary_key, strict=True):
        query = query.where(column == value)
    for name, text in row.texts.items():
        query = query.where(mapping.table.c[name] == text)  # IS NULL for None
    return query
