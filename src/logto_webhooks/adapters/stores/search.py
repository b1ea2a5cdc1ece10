"""Looking at the inbox, on a Connection; and having it applied again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores import codec
from logto_webhooks.adapters.stores.dialect import among, holds, now
from logto_webhooks.adapters.stores.schema import deliveries, is_odd, is_pending, records
from logto_webhooks.core.inbox import DELETIONS, MEMBERSHIP_EVENTS, DeliveryFilter, Kept
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.record import Key, Record

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


class SqlInbox:
    """An Inbox."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def search(self, sought: DeliveryFilter) -> list[Kept]:
        """List deliveries."""
        wanted = _KEPT.where(*_conditions(sought)).limit(sought.limit)
        number = deliveries.c.id
        return self._kept(wanted.order_by(number if sought.oldest_first else number.desc()))

    def get(self, delivery_id: int) -> Kept | None:
        """Return one delivery; None if there is no such id."""
        return next(iter(self._kept(_KEPT.where(deliveries.c.id == delivery_id))), None)

    def again(self, ids: Sequence[int]) -> int:
        """Make deliveries pending again, but those that are; return how many."""
        replay = (
            sa.update(deliveries)
            .where(among(deliveries.c.id, "ids"), ~is_pending)
            .values(state=State.PENDING.value, due_at=now(), attempts=0, token=None)
        )
        return self._connection.execute(replay, {"ids": list(ids)}).rowcount

    def about(self, key: Key, others: Sequence[Key], after: int, limit: int) -> list[Kept]:
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
        return {record.key: record for record in map(codec.record_of, rows)}

    def _kept(self, wanted: sa.Select[Any], given: dict[str, Any] | None = None) -> list[Kept]:
        rows = self._connection.execute(wanted, given or {}).mappings()
        return [Kept(**{**row, "state": State(row["state"])}) for row in rows]


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
    if sought.since is not None:
        yield deliveries.c.received_at >= sought.since
    if sought.until is not None:
        yield deliveries.c.received_at < sought.until
    if sought.text:
        yield _holds(sought.text)


def _in_state(state: State) -> Iterator[_Condition]:
    """By the small index, where there is one."""
    if state is State.PENDING:
        yield is_pending
        return
    if state is not State.DONE:
        yield is_odd
    yield deliveries.c.state == state.value


def _holds(text: str) -> _Condition:
    return holds(deliveries.c.body, text.encode())
