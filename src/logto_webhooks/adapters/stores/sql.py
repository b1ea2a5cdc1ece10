"""The store on SQLAlchemy Core: the steps of one transaction, on a Connection.

One implementation for all databases; the few statements that differ stand at the end.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from logto_webhooks.adapters.stores import codec, find
from logto_webhooks.adapters.stores.schema import (
    deliveries,
    is_pending,
    members,
    organizations,
    records,
    users,
)
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.ports import Accepted, Claimed, Found, Outcome, Status, Waiting
from logto_webhooks.core.projection import row_of
from logto_webhooks.core.record import Key, Kind, Record
from logto_webhooks.errors import ClaimLost

T = TypeVar("T")

_MIRROR = {"user": users, "organization": organizations, "membership": members}
_MOST_PARAMETERS = 1000  # of one IN (…)


class SqlStore:
    """A Store; the connection's transaction is the caller's."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._insert = _INSERT[connection.dialect.name]
        self._clock = _CLOCK[connection.dialect.name]

    def add(self, new: Sequence[Delivery]) -> list[Accepted]:
        """Put deliveries into the inbox; one answer each, in order."""
        now = self._now()
        insert = (
            self._insert(deliveries)
            .on_conflict_do_nothing(index_elements=["digest"])
            .returning(deliveries.c.digest, deliveries.c.id)
        )
        rows = [codec.inbox_row(delivery, now) for delivery in new]
        inserted = _pairs(self._connection.execute(insert, rows))
        known = dict(inserted)
        for some in _chunks([each.digest for each in new if each.digest not in known]):
            query = sa.select(deliveries.c.digest, deliveries.c.id)
            found = self._connection.execute(query.where(deliveries.c.digest.in_(some)))
            known.update(_pairs(found))
        # Of two copies in one batch, only the first is new.
        return [
            Accepted(known[each.digest], inserted.pop(each.digest, None) is None) for each in new
        ]

    def claim(self, token: str, limit: int, max_bytes: int, lease_s: float) -> list[Claimed]:
        """Take due deliveries, the longest due first; nobody else gets them during the lease."""
        now = self._now()
        size = sa.func.length(deliveries.c.body)
        due = (
            sa.select(deliveries.c.id, size)
            .where(is_pending, deliveries.c.due_at <= now)
            .order_by(deliveries.c.due_at, deliveries.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        ids = _within(max_bytes, self._connection.execute(due))
        if not ids:
            return []
        until = now + int(lease_s * 1000)
        lease = {"token": token, "due_at": until, "attempts": deliveries.c.attempts + 1}
        mine = deliveries.c.id.in_(ids)
        self._connection.execute(sa.update(deliveries).where(mine).values(lease))
        rows = self._connection.execute(sa.select(*_CLAIMED).where(mine).order_by(deliveries.c.id))
        return [Claimed(**row) for row in rows.mappings()]

    def finish(self, token: str, outcomes: Sequence[Outcome]) -> None:
        """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
        if not outcomes:
            return
        now = self._now()
        ids = [outcome.id for outcome in outcomes]
        held = sa.select(sa.func.count()).where(
            deliveries.c.id.in_(ids), deliveries.c.token == token, is_pending
        )
        lost = len(ids) - (self._connection.scalar(held) or 0)
        if lost:
            raise ClaimLost(count=lost)
        update = (
            sa.update(deliveries)
            .where(deliveries.c.id == sa.bindparam("of"))
            .values(token=None, **{name: sa.bindparam(name) for name in _OUTCOME})
        )
        rows = [
            {
                "of": outcome.id,
                "state": outcome.state.value,
                "result": outcome.result,
                "last_error": outcome.error,
                "due_at": now + int(outcome.retry_after_s * 1000),
            }
            for outcome in outcomes
        ]
        self._connection.execute(update, rows)

    def lock(self, keys: Sequence[Key]) -> dict[Key, Record]:
        """Hold records until the transaction ends; unknown ones become empty stubs."""
        if not keys:
            return {}
        insert = self._insert(records).on_conflict_do_nothing()
        self._connection.execute(insert, [codec.stub_row(key, str(uuid.uuid4())) for key in keys])
        found: dict[Key, Record] = {}
        for kind, group in itertools.groupby(keys, key=lambda key: key.kind):
            for ids in _chunks([key.id for key in group]):
                query = (
                    sa.select(records)
                    .where(records.c.kind == kind, records.c.logto_id.in_(ids))
                    .order_by(records.c.kind, records.c.logto_id)
                    .with_for_update()
                )
                for row in self._connection.execute(query).mappings():
                    record = codec.record_of(row)
                    found[record.key] = record
        return found

    def memberships_of(self, keys: Iterable[Key]) -> list[Key]:
        """Find the memberships that the given users and organizations are known to have."""
        sides: dict[Kind, sa.Column[Any]] = {
            "organization": records.c.organization_id,
            "user": records.c.user_id,
        }
        found: set[Key] = set()
        for key in keys:
            query = sa.select(records.c.logto_id).where(sides[key.kind] == key.id)
            found |= {Key("membership", each) for each in self._connection.scalars(query)}
        return sorted(found)

    def save(self, changed: Sequence[Record]) -> None:
        """Write locked records, and the rows of the mirror that follow from them."""
        if not changed:
            return
        now = self._now()
        names = list(codec.record_row(changed[0]))
        waiting = sa.bindparam("waiting_reason", type_=sa.Text)
        since = sa.func.coalesce(records.c.refetch_since, sa.bindparam("now", type_=sa.BigInteger))
        update = (
            sa.update(records)
            .where(
                records.c.kind == sa.bindparam("of_kind"), records.c.logto_id == sa.bindparam("of")
            )
            .values(
                refetch_since=sa.case((waiting.is_not(None), since), else_=None),
                **{name: sa.bindparam(name) for name in names},
            )
        )
        rows = [
            codec.record_row(each) | {"of_kind": each.key.kind, "of": each.key.id, "now": now}
            for each in changed
        ]
        self._connection.execute(update, rows)
        for kind, table in _MIRROR.items():
            self._project(table, [each for each in changed if each.key.kind == kind])

    def status(self) -> Status:
        """Count."""
        counts = dict.fromkeys((state.value for state in State), 0)
        by_state = sa.select(deliveries.c.state, sa.func.count()).group_by(deliveries.c.state)
        counts |= _pairs(self._connection.execute(by_state))
        oldest = self._connection.scalar(
            sa.select(sa.func.min(deliveries.c.received_at)).where(is_pending)
        )
        return Status(
            deliveries=counts,
            doubtful=self._count(records.c.doubtful),
            refetch=self._count(records.c.refetch_since.is_not(None)),
            oldest_pending_s=None if oldest is None else max(0, self._now() - oldest) / 1000,
        )

    def waiting(self, limit: int) -> list[Waiting]:
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
            for row in self._connection.execute(query).mappings()
        ]

    def users(self, query: str, limit: int) -> list[Found]:
        """Find users by Logto id, local id, email, phone or username; else by a part of them."""
        return find.users_like(self._connection, query, limit)

    def organizations(self, query: str, limit: int) -> list[Found]:
        """Find organizations by Logto id, local id or name; else by a part of it."""
        return find.organizations_like(self._connection, query, limit)

    def _project(self, table: sa.Table, changed: Sequence[Record]) -> None:
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
            insert = self._insert(table)
            new = {name: insert.excluded[name] for name in present[0] if name not in (*keys, "id")}
            upsert = insert.on_conflict_do_update(index_elements=keys, set_=new)
            self._connection.execute(upsert, present)
        if absent:
            gone = sa.delete(members).where(
                members.c.logto_organization_id == sa.bindparam("organization"),
                members.c.logto_user_id == sa.bindparam("user"),
            )
            self._connection.execute(gone, absent)

    def _count(self, condition: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(records).where(condition)
        return self._connection.scalar(query) or 0

    def _now(self) -> int:
        return int(self._connection.scalar(sa.select(self._clock)) or 0)


_KEYS = {
    "logto_users": ["logto_user_id"],
    "logto_organizations": ["logto_organization_id"],
    "logto_organization_members": ["logto_organization_id", "logto_user_id"],
}
_OUTCOME = ("state", "result", "last_error", "due_at")
_CLAIMED = (
    deliveries.c.id,
    deliveries.c.body,
    deliveries.c.event,
    deliveries.c.subject,
    deliveries.c.received_at,
    deliveries.c.attempts.label("attempt"),
)


def _pairs(rows: Iterable[Any]) -> dict[Any, Any]:
    return {row[0]: row[1] for row in rows}


def _within(max_bytes: int, sizes: Iterable[Any]) -> list[int]:
    """Take ids as long as their bodies fit; at least one."""
    taken: list[int] = []
    total = 0
    for row_id, size in sizes:
        total += size
        if taken and total > max_bytes:
            break
        taken.append(row_id)
    return taken


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _MOST_PARAMETERS):
        yield items[start : start + _MOST_PARAMETERS]


_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_CLOCK: dict[str, sa.TextClause] = {
    "sqlite": sa.text("CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"),
    "postgresql": sa.text("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"),
}
