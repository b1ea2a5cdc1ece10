"""What became of each mapped row: which of your rows it is, and what it waits for."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.database.dialect import among, insert_into, now
from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.records.record import Kind

State = Literal["ok", "waiting", "conflict", "owed"]


class RowState(Struct, frozen=True, kw_only=True):
    """What became of one record in one mapping.

    `row_id` is the primary key of the application's row, as JSON; also of a row that had Logto's
    id before and has it no longer. `blocked_by` names what must change first: another row, by its
    primary key, or a record, by its key.
    """

    logto_id: str
    row_id: str | None = None
    state: State = "ok"
    reason: str | None = None
    blocked_by: str | None = None


def encode_id(primary_key: Iterable[Any]) -> str:
    """Write a primary key as text."""
    values = [v if isinstance(v, int | str | None) else str(v) for v in primary_key]
    return canonical_json.encode(values).decode()


def decode_id(row_id: str, primary_key: Sequence[sa.Column[Any]]) -> tuple[Any, ...]:
    """Read a primary key that `encode_id` wrote."""
    values = canonical_json.decode(row_id.encode())
    return tuple(
        uuid.UUID(value) if isinstance(column.type, sa.Uuid) and column.type.as_uuid else value
        for column, value in zip(primary_key, values, strict=True)
    )


class StateStore:
    """The states of one mapping's rows."""

    def __init__(self, connection: sa.Connection, mapping: str, kind: Kind) -> None:
        self._connection = connection
        self._mapping = mapping
        self._kind = kind

    def find(self, ids: Collection[str]) -> dict[str, RowState]:
        """Find the states of records."""
        query = self._select().where(among(mapped_rows.c.logto_id, "ids"))
        rows = self._connection.execute(query, {"ids": list(ids)}).mappings()
        return {row["logto_id"]: RowState(**row) for row in rows}

    def find_blocked(self, blockers: Collection[str]) -> list[str]:
        """List the records that wait for any of these."""
        query = sa.select(mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == self._mapping,
            mapped_rows.c.state != "ok",
            among(mapped_rows.c.blocked_by, "blockers"),
        )
        return list(self._connection.scalars(query, {"blockers": list(blockers)}))

    def find_owners(self, row_ids: Collection[str]) -> dict[str, set[str]]:
        """Return which records have, or ever had, these rows."""
        query = sa.select(mapped_rows.c.row_id, mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == self._mapping, among(mapped_rows.c.row_id, "row_ids")
        )
        owners: dict[str, set[str]] = {}
        for row_id, logto_id in self._connection.execute(query, {"row_ids": list(row_ids)}):
            owners.setdefault(row_id, set()).add(logto_id)
        return owners

    def list_due(self, states: Collection[State], limit: int, after: str = "") -> list[str]:
        """List records in these states, by id."""
        query = (
            sa.select(mapped_rows.c.logto_id)
            .where(mapped_rows.c.mapping == self._mapping, mapped_rows.c.state.in_(states))
            .where(mapped_rows.c.logto_id > after)
            .order_by(mapped_rows.c.logto_id)
            .limit(limit)
        )
        return list(self._connection.scalars(query))

    def save(self, states: Iterable[RowState]) -> None:
        """Keep states."""
        rows = [
            {
                "mapping": self._mapping,
                "kind": self._kind,
                "logto_id": state.logto_id,
                "row_id": state.row_id,
                "state": state.state,
                "reason": state.reason,
                "blocked_by": state.blocked_by,
            }
            for state in states
        ]
        if not rows:
            return
        insert = insert_into(mapped_rows, self._connection.dialect.name)
        insert = insert.values(changed_at=now())
        names = ("row_id", "state", "reason", "blocked_by")
        changed = {name: insert.excluded[name] for name in names}
        statement = insert.on_conflict_do_update(
            index_elements=["mapping", "logto_id"], set_={**changed, "changed_at": now()}
        )
        self._connection.execute(statement, rows)

    def forget(self, ids: Collection[str]) -> None:
        """Forget records that have no row, and never had one."""
        statement = sa.delete(mapped_rows).where(
            mapped_rows.c.mapping == self._mapping, among(mapped_rows.c.logto_id, "ids")
        )
        self._connection.execute(statement, {"ids": list(ids)})

    def _select(self) -> sa.Select[Any]:
        names = ("logto_id", "row_id", "state", "reason", "blocked_by")
        return sa.select(*(mapped_rows.c[name] for name in names)).where(
            mapped_rows.c.mapping == self._mapping
        )
