"""The steps of the records and of the mirror, on a Connection whose transaction is the caller's."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores import codec
from logto_webhooks.adapters.stores.dialect import chunks, insert_into, now_of
from logto_webhooks.adapters.stores.schema import members, organizations, records, users
from logto_webhooks.core.mirror import row_of
from logto_webhooks.core.ports import Waiting
from logto_webhooks.core.record import Key, Kind, Record

_SIDES: dict[Kind, tuple[sa.Column[Any], sa.Column[Any]]] = {
    "user": (records.c.user_id, members.c.logto_user_id),
    "organization": (records.c.organization_id, members.c.logto_organization_id),
}
_MIRROR = {"user": users, "organization": organizations, "membership": members}
_KEYS = {
    "logto_users": ["logto_user_id"],
    "logto_organizations": ["logto_organization_id"],
    "logto_organization_members": ["logto_organization_id", "logto_user_id"],
}


def lock(connection: sa.Connection, keys: Sequence[Key]) -> dict[Key, Record]:
    """Hold records until the transaction ends; unknown ones become empty stubs."""
    if not keys:
        return {}
    insert = insert_into(connection, records).on_conflict_do_nothing()
    now = now_of(connection)
    connection.execute(insert, [codec.stub_row(key, str(uuid.uuid4()), now) for key in keys])
    found: dict[Key, Record] = {}
    for kind, group in itertools.groupby(keys, key=lambda key: key.kind):
        for ids in chunks([key.id for key in group]):
            query = (
                sa.select(records)
                .where(records.c.kind == kind, records.c.logto_id.in_(ids))
                .order_by(records.c.kind, records.c.logto_id)
                .with_for_update()
            )
            for row in connection.execute(query).mappings():
                record = codec.record_of(row)
                found[record.key] = record
    return found


def save(connection: sa.Connection, changed: Sequence[Record]) -> None:
    """Write locked records, and the rows of the mirror that follow from them."""
    if not changed:
        return
    now = now_of(connection)
    names = list(codec.record_row(changed[0]))
    waiting = sa.bindparam("waiting_reason", type_=sa.Text)
    since = sa.func.coalesce(records.c.refetch_since, sa.bindparam("now", type_=sa.BigInteger))
    update = (
        sa.update(records)
        .where(records.c.kind == sa.bindparam("of_kind"), records.c.logto_id == sa.bindparam("of"))
        .values(
            refetch_since=sa.case((waiting.is_not(None), since), else_=None),
            **{name: sa.bindparam(name) for name in names},
        )
    )
    rows = [
        codec.record_row(each) | {"of_kind": each.key.kind, "of": each.key.id, "now": now}
        for each in changed
    ]
    connection.execute(update, rows)
    for kind, table in _MIRROR.items():
        _project(connection, table, [each for each in changed if each.key.kind == kind])


def drop_memberships(connection: sa.Connection, ends: Sequence[Record]) -> None:
    """End all memberships of deleted users and organizations; in whole, for there can be many."""
    for end in ends:
        known, row = _SIDES.get(end.key.kind, (None, None))
        if known is None or row is None or end.deleted_at is None:
            continue
        earliest = sa.case(
            (records.c.deleted_at < end.deleted_at, records.c.deleted_at), else_=end.deleted_at
        )
        over = {"doubtful": False, "refetch_since": None, "waiting_reason": None}
        mine = known == end.key.id
        connection.execute(sa.update(records).where(mine).values(deleted_at=earliest, **over))
        connection.execute(sa.delete(members).where(row == end.key.id))


def waiting(connection: sa.Connection, limit: int) -> list[Waiting]:
    """List the records about which Logto must be asked, the longest waiting first."""
    query = (
        sa.select(records)
        .where(records.c.refetch_since.is_not(None))
        .order_by(records.c.refetch_since, records.c.kind, records.c.logto_id)
        .limit(limit)
    )
    return [
        Waiting(
            key=Key(row["kind"], row["logto_id"]),
            reason=row["waiting_reason"],
            doubtful=row["doubtful"],
        )
        for row in connection.execute(query).mappings()
    ]


def doubtful(connection: sa.Connection) -> int:
    """Count the records in doubt."""
    return _count(connection, records.c.doubtful)


def to_ask_about(connection: sa.Connection) -> int:
    """Count the records about which Logto must be asked."""
    return _count(connection, records.c.refetch_since.is_not(None))


def _project(connection: sa.Connection, table: sa.Table, changed: Sequence[Record]) -> None:
    present, absent = [], []
    for record in changed:
        row = row_of(record)
        if row is not None:
            present.append(row | ({"id": record.local_id} if "id" in table.c else {}))
        elif table is members:
            organization, user = record.key.organization_and_user
            absent.append({"organization": organization.id, "user": user.id})
    if present:
        keys = _KEYS[table.name]
        insert = insert_into(connection, table)
        new = {name: insert.excluded[name] for name in present[0] if name not in (*keys, "id")}
        upsert = insert.on_conflict_do_update(index_elements=keys, set_=new)
        connection.execute(upsert, present)
    if absent:
        gone = sa.delete(members).where(
            members.c.logto_organization_id == sa.bindparam("organization"),
            members.c.logto_user_id == sa.bindparam("user"),
        )
        connection.execute(gone, absent)


def _count(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(records).where(condition)
    return connection.scalar(query) or 0
