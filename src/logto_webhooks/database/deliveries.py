"""The inbox: add, claim, finish, search."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.database import codec
from logto_webhooks.database.bulk import insert_deliveries
from logto_webhooks.database.dialect import among, chunks, holds, now, pairs
from logto_webhooks.database.schema import deliveries, is_odd, is_pending, members, records
from logto_webhooks.deliveries import (
    DELETIONS,
    MEMBERSHIP_EVENTS,
    ClaimedDelivery,
    Clocks,
    Dated,
    DeliveryFilter,
    DeliveryOutcome,
    DeliveryState,
    NewDelivery,
    ReceivedBody,
    StoredDelivery,
    StoreResult,
    sent_at_of,
)
from logto_webhooks.errors import ClaimLost
from logto_webhooks.records.record import Key, Record

# Until the transaction ends: the connection may be the application's.
LIMIT_WAITS = sa.select(
    sa.func.set_config("lock_timeout", sa.bindparam("lock", type_=sa.Text), sa.true()),
    sa.func.set_config("statement_timeout", sa.bindparam("statement", type_=sa.Text), sa.true()),
)
DUE = (
    sa.select(deliveries.c.id, sa.func.length(deliveries.c.body))
    .where(is_pending, deliveries.c.due_at <= now())
    .order_by(deliveries.c.due_at, deliveries.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
LEASE = (
    sa.update(deliveries)
    .where(among(deliveries.c.id, "ids"))
    .values(
        token=sa.bindparam("by"),
        due_at=now() + sa.bindparam("lease_ms"),
        attempts=deliveries.c.attempts + 1,
    )
    .returning(
        deliveries.c.id,
        deliveries.c.body,
        deliveries.c.event,
        deliveries.c.subject,
        deliveries.c.received_at,
        deliveries.c.digest,
        deliveries.c.occurred_at,
        deliveries.c.origin,
        deliveries.c.attempts.label("attempt"),
        deliveries.c.failures,
    )
)
RENEW = (
    sa.update(deliveries)
    .where(among(deliveries.c.id, "ids"), deliveries.c.token == sa.bindparam("by"))
    .values(due_at=now() + sa.bindparam("lease_ms"))
)
FINISH = (
    sa.update(deliveries)
    # Only what is pending has a token; to ask for the state would lead a planner astray.
    .where(among(deliveries.c.id, "ids"), deliveries.c.token == sa.bindparam("by"))
    .values(
        token=None,
        due_at=now() + sa.bindparam("wait_ms"),
        failures=deliveries.c.failures + sa.bindparam("failed"),
        **{name: sa.bindparam(name) for name in ("state", "result", "last_error")},
    )
)
KNOWN = sa.select(records.c.logto_id).where(
    records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids")
)
_RECORDS = (
    sa.select(records)
    .where(records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids"))
    .order_by(records.c.kind, records.c.logto_id)
)
ENDED = (
    sa.select(records.c.logto_id)
    .where(records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids"))
    .where(records.c.gone_at.is_not(None) | records.c.absent_at.is_not(None))
    .limit(1)
)
LOCK = _RECORDS.with_for_update()
SHARE = _RECORDS.with_for_update(read=True)
HOLD = (
    sa.select(records.c.doubtful)
    .where(records.c.kind == sa.literal_column("'membership'"), among(records.c.logto_id, "ids"))
    .order_by(records.c.logto_id)
    .with_for_update()
)
# One index serves each of them; an OR in one statement would lead a planner astray.
MEMBERSHIPS_OF = {
    kind: sa.select(records.c.logto_id).where(among(column, "ids"))
    for kind, column in (("user", records.c.user_id), ("organization", records.c.organization_id))
}
COUNT_OF = {
    kind: sa.select(sa.func.count()).select_from(
        sa.select(sa.literal_column("1").label("one"))
        .where(among(column, "ids"))
        .limit(sa.bindparam("most", type_=sa.Integer) + 1)
        .subquery()
    )
    for kind, column in (("user", records.c.user_id), ("organization", records.c.organization_id))
}
LEAVE = sa.delete(members).where(
    members.c.logto_organization_id == sa.bindparam("organization"),
    members.c.logto_user_id == sa.bindparam("user"),
)


def add_deliveries(
    connection: sa.Connection, new: Sequence[NewDelivery], tried: Collection[bytes] = ()
) -> list[StoreResult]:
    """Put deliveries into the inbox; one answer each, in order.

    Those whose digests were `tried` before may be there already, with the same `received_at`.
    """
    if not new:
        return []
    inserted = insert_deliveries(connection, [codec.to_inbox_row(delivery) for delivery in new])
    known = dict(inserted)
    ours = {(each.digest, each.received_at) for each in new if each.digest in tried}
    for some in chunks([each.digest for each in new if each.digest not in known]):
        query = sa.select(deliveries.c.digest, deliveries.c.id, deliveries.c.received_at)
        for digest, number, at in connection.execute(query.where(deliveries.c.digest.in_(some))):
            known[digest] = number
            if (digest, at) in ours:  # its commit was done, and only the answer was lost
                inserted[digest] = number
    # Of two copies in one batch, only the first is new.
    return [
        StoreResult(known[each.digest], inserted.pop(each.digest, None) is None) for each in new
    ]


def claim_deliveries(
    connection: sa.Connection, token: str, limit: int, max_bytes: int, lease_s: float
) -> list[ClaimedDelivery]:
    """Take due deliveries, the longest due first; nobody else gets them during the lease."""
    ids = _within(max_bytes, connection.execute(DUE, {"most": limit}))
    if not ids:
        return []
    lease = {"ids": ids, "by": token, "lease_ms": int(lease_s * 1000)}
    rows = connection.execute(LEASE, lease).mappings()
    return [ClaimedDelivery(**row) for row in sorted(rows, key=lambda row: row["id"])]


def renew(connection: sa.Connection, token: str, ids: Sequence[int], lease_s: float) -> None:
    """Hold claimed deliveries longer. Raises ClaimLost when any is no longer held by `token`."""
    held = {"ids": list(ids), "by": token, "lease_ms": int(lease_s * 1000)}
    renewed = connection.execute(RENEW, held).rowcount
    if renewed < len(ids):
        raise ClaimLost(count=len(ids) - renewed)


def finish_deliveries(
    connection: sa.Connection, token: str, outcomes: Sequence[DeliveryOutcome]
) -> None:
    """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for each in outcomes:
        wait_ms = int(each.retry_after_s * 1000)
        said = (each.state.value, each.result, each.error, wait_ms, int(each.failed))
        alike.setdefault(said, []).append(each.id)
    held = 0
    for (state, result, error, wait_ms, failed), ids in alike.items():
        values = {"state": state, "result": result, "last_error": error}
        values |= {"wait_ms": wait_ms, "failed": failed}
        held += connection.execute(FINISH, values | {"ids": ids, "by": token}).rowcount
    if held < len(outcomes):
        raise ClaimLost(count=len(outcomes) - held)


def recent_deliveries(connection: sa.Connection, limit: int) -> list[ReceivedBody]:
    """Return the newest deliveries, the newest first."""
    columns = (deliveries.c.body, deliveries.c.occurred_at, deliveries.c.received_at)
    query = sa.select(*columns).order_by(deliveries.c.id.desc()).limit(limit)
    return [ReceivedBody(*row) for row in connection.execute(query)]


def clocks(connection: sa.Connection, limit: int) -> Clocks:
    """Return the database's clock, and how the newest deliveries are dated."""
    dated = (deliveries.c.digest, deliveries.c.occurred_at, deliveries.c.received_at)
    query = sa.select(*dated, deliveries.c.origin).order_by(deliveries.c.id.desc()).limit(limit)
    found = [Dated(sent_at_of(row[0]), *row[1:]) for row in connection.execute(query)]
    return Clocks(connection.scalar(sa.select(now())) or 0, found)


def count_deliveries(connection: sa.Connection) -> dict[str, int]:
    """Count deliveries by state; every state is there."""
    found = dict.fromkeys((state.value for state in DeliveryState), 0)
    for condition in (is_pending, is_odd):  # each by its small index; all else is done
        by_state = sa.select(deliveries.c.state, sa.func.count()).where(condition)
        found |= pairs(connection.execute(by_state.group_by(deliveries.c.state)))
    total = connection.scalar(sa.select(sa.func.count()).select_from(deliveries)) or 0
    return found | {DeliveryState.DONE.value: total - sum(found.values())}


def oldest_pending_s(connection: sa.Connection) -> float | None:
    """How long ago the oldest pending delivery was received; None if nothing is pending."""
    query = sa.select(sa.func.min(deliveries.c.received_at)).where(is_pending)
    oldest = connection.scalar(query)
    moment = connection.scalar(sa.select(now())) or 0
    return None if oldest is None else max(0, moment - oldest) / 1000


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


_Condition = sa.ColumnElement[bool]
_KEPT = sa.select(
    deliveries.c.id,
    deliveries.c.event,
    deliveries.c.subject,
    deliveries.c.occurred_at,
    deliveries.c.received_at,
    deliveries.c.origin,
    deliveries.c.state,
    deliveries.c.result,
    deliveries.c.attempts,
    deliveries.c.last_error.label("error"),
    deliveries.c.body,
)


class DatabaseInbox:
    """An Inbox."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def search(self, sought: DeliveryFilter) -> list[StoredDelivery]:
        """List deliveries."""
        wanted = _KEPT.where(*_conditions(sought)).limit(sought.limit)
        number = deliveries.c.id
        return self._kept(wanted.order_by(number if sought.oldest_first else number.desc()))

    def get(self, delivery_id: int) -> StoredDelivery | None:
        """Return one delivery; None if there is no such id."""
        return next(iter(self._kept(_KEPT.where(deliveries.c.id == delivery_id))), None)

    def again(self, ids: Sequence[int]) -> int:
        """Make deliveries pending again, but those that are; return how many."""
        replay = (
            sa.update(deliveries)
            .where(among(deliveries.c.id, "ids"), ~is_pending)
            .values(
                state=DeliveryState.PENDING.value, due_at=now(), attempts=0, failures=0, token=None
            )
        )
        return self._connection.execute(replay, {"ids": list(ids)}).rowcount

    def about(
        self, key: Key, others: Sequence[Key], after: int, limit: int
    ) -> list[StoredDelivery]:
        """List what may tell of a user or an organization, or of its memberships, by id; of the
        `others`, at the other ends of these, only their deletions."""
        concerned: _Condition = deliveries.c.subject == f"{key.kind}:{key.id}"
        if key.kind == "user":
            named = deliveries.c.event.in_(MEMBERSHIP_EVENTS), _holds(key.id)
            concerned = sa.or_(concerned, sa.and_(*named))
        deleted = deliveries.c.event.in_(DELETIONS), among(deliveries.c.subject, "others")
        concerned = sa.or_(concerned, sa.and_(*deleted))
        wanted = _KEPT.where(deliveries.c.id > after, concerned)
        names = {"others": [f"{each.kind}:{each.id}" for each in others]}
        return self._kept(wanted.order_by(deliveries.c.id).limit(limit), names)

    def known(self, key: Key) -> dict[Key, Record]:
        """Return a record, if there is one, and those of all its memberships."""
        itself = sa.and_(records.c.kind == key.kind, records.c.logto_id == key.id)
        wanted = sa.select(records).where(sa.or_(itself, records.c[f"{key.kind}_id"] == key.id))
        rows = self._connection.execute(wanted.order_by(records.c.logto_id)).mappings()
        return {record.key: record for record in map(codec.from_record_row, rows)}

    def _kept(
        self, wanted: sa.Select[Any], given: dict[str, Any] | None = None
    ) -> list[StoredDelivery]:
        rows = self._connection.execute(wanted, given or {}).mappings()
        return [StoredDelivery(**{**row, "state": DeliveryState(row["state"])}) for row in rows]


def _conditions(sought: DeliveryFilter) -> Iterator[_Condition]:
    if sought.after is not None:
        number = deliveries.c.id
        yield number > sought.after if sought.oldest_first else number < sought.after
    if sought.state is not None:
        yield from _in_state(sought.state)
    if sought.event is not None:
        yield deliveries.c.event == sought.event
    if sought.subject is not None:
        yield deliveries.c.subject == sought.subject
    if sought.origin is not None:
        yield deliveries.c.origin == sought.origin
    if sought.since is not None:
        yield deliveries.c.received_at >= sought.since
    if sought.until is not None:
        yield deliveries.c.received_at < sought.until
    if sought.text:
        yield _holds(sought.text)


def _in_state(state: DeliveryState) -> Iterator[_Condition]:
    """By the small index, where there is one."""
    if state is DeliveryState.PENDING:
        yield is_pending
        return
    if state is not DeliveryState.DONE:
        yield is_odd
    yield deliveries.c.state == state.value


def _holds(text: str) -> _Condition:
    return holds(deliveries.c.body, text.encode())
