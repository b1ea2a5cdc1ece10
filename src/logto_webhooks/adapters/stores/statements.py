"""The statements of the steps that run for every batch, each built once.

To build one costs SQLAlchemy several times what running it costs the database.
"""

from __future__ import annotations

import functools
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores.dialect import CLOCK, INSERT
from logto_webhooks.adapters.stores.schema import (
    deliveries,
    is_pending,
    members,
    organizations,
    records,
    users,
)

MIRROR = {"user": users, "organization": organizations, "membership": members}
_KEYS = {
    "user": ["logto_user_id"],
    "organization": ["logto_organization_id"],
    "membership": ["logto_organization_id", "logto_user_id"],
}
_ids: sa.BindParameter[list[Any]] = sa.bindparam("ids", expanding=True)

DUE = (
    sa.select(deliveries.c.id, sa.func.length(deliveries.c.body))
    .where(is_pending, deliveries.c.due_at <= sa.bindparam("now"))
    .order_by(deliveries.c.due_at, deliveries.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
LEASE = (
    sa.update(deliveries)
    .where(deliveries.c.id.in_(_ids))
    .values(
        token=sa.bindparam("by"),
        due_at=sa.bindparam("until"),
        attempts=deliveries.c.attempts + 1,
    )
)
CLAIMED = (
    sa.select(
        deliveries.c.id,
        deliveries.c.body,
        deliveries.c.event,
        deliveries.c.subject,
        deliveries.c.received_at,
        deliveries.c.attempts.label("attempt"),
    )
    .where(deliveries.c.id.in_(_ids))
    .order_by(deliveries.c.id)
)
HELD = (
    sa.select(deliveries.c.id)
    .where(deliveries.c.id.in_(_ids), deliveries.c.token == sa.bindparam("by"), is_pending)
    .with_for_update()
)
FINISH = (
    sa.update(deliveries)
    .where(deliveries.c.id == sa.bindparam("of"))
    .values(
        token=None,
        **{name: sa.bindparam(name) for name in ("state", "result", "last_error", "due_at")},
    )
)
LOCK = (
    sa.select(records)
    .where(records.c.kind == sa.bindparam("of_kind"), records.c.logto_id.in_(_ids))
    .order_by(records.c.kind, records.c.logto_id)
    .with_for_update()
)
LEAVE = sa.delete(members).where(
    members.c.logto_organization_id == sa.bindparam("organization"),
    members.c.logto_user_id == sa.bindparam("user"),
)


@functools.cache
def now(dialect: str) -> sa.Select[Any]:
    """The database's clock, in milliseconds since the epoch."""
    return sa.select(CLOCK[dialect])


@functools.cache
def stub(dialect: str) -> Any:
    """Insert a record unless it is there."""
    return INSERT[dialect](records).on_conflict_do_nothing()


@functools.cache
def save(dialect: str, names: tuple[str, ...]) -> sa.Update:
    """Update the columns `names` of a record; since when it waits stays, as long as it waits."""
    waiting = sa.bindparam("waiting_reason", type_=sa.Text)
    since = sa.func.coalesce(records.c.refetch_since, CLOCK[dialect])
    return (
        sa.update(records)
        .where(records.c.kind == sa.bindparam("of_kind"), records.c.logto_id == sa.bindparam("of"))
        .values(
            refetch_since=sa.case((waiting.is_not(None), since), else_=None),
            **{name: sa.bindparam(name) for name in names},
        )
    )


@functools.cache
def upsert(dialect: str, kind: str) -> Any:
    """Write a row of the mirror; its local id is never changed."""
    table, keys = MIRROR[kind], _KEYS[kind]
    insert = INSERT[dialect](table)
    kept = {*keys, "id"}
    new = {
        column.name: insert.excluded[column.name] for column in table.c if column.name not in kept
    }
    return insert.on_conflict_do_update(index_elements=keys, set_=new)
