"""The inbox: add, claim, finish, search."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from msgspec import structs

from logto_webhooks.batch_sizes import count_fitting
from logto_webhooks.database.dialect import (
    NOW_ON_SQLITE,
    Row,
    among,
    contains,
    execute_rows,
    greatest,
    group_ids,
    insert_into,
    now,
    read_clock,
    unnest,
)
from logto_webhooks.database.records import from_row
from logto_webhooks.database.schema import deliveries, is_odd, is_pending, records
from logto_webhooks.deliveries import (
    DELETIONS,
    LARGE,
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

LOCK_MS: Final = 500
_MOST_ROWS: Final = 64  # in one INSERT on SQLite
_MOST_DIGESTS: Final = 1000  # in one IN (…)
HUGE: Final = 512 * 2**10  # a body that can take seconds to apply
FEW_CLAIMS: Final = 2  # until deliveries whose last claim was lost are claimed by themselves
_LOST_PART: Final = 8  # of these, one in so many is claimed together after each further loss
MOST_DOUBLINGS: Final = 5  # of its lease
_size = sa.func.length(deliveries.c.body)
# So can a list of a thousand members.
_is_slow = sa.or_(
    _size >= HUGE, sa.and_(_size >= LARGE, deliveries.c.event.in_(sorted(MEMBERSHIP_EVENTS)))
)
# The last of its claims was lost: it may be what ends its process.
_was_lost = sa.and_(deliveries.c.token.is_not(None), deliveries.c.attempts >= FEW_CLAIMS)
_SELECT_DUE = (
    sa.select(
        deliveries.c.id,
        _size.label("size"),
        _is_slow.label("is_slow"),
        sa.case((_was_lost, deliveries.c.attempts), else_=0).label("claims_lost"),
    )
    .where(is_pending, deliveries.c.due_at <= now())
    .order_by(deliveries.c.due_at, deliveries.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_SELECT_QUICK = _SELECT_DUE.where(sa.not_(sa.or_(_is_slow, _was_lost)))
_these = among(deliveries.c.id, "ids")
_lease_end = now() + sa.bindparam("lease_ms")
_is_ours = deliveries.c.token == sa.bindparam("by")
_COLUMNS = {column.name: column for column in deliveries.c} | {
    "attempt": deliveries.c.attempts.label("attempt"),
    "error": deliveries.c.last_error.label("error"),
}
_LEASE = (
    sa.update(deliveries)
    .where(_these)
    .values(token=sa.bindparam("by"), due_at=_lease_end, attempts=deliveries.c.attempts + 1)
    .returning(*(_COLUMNS[name] for name in ClaimedDelivery.__struct_fields__))
)
_RENEW = (
    sa.update(deliveries)
    .where(_these, _is_ours)
    .values(due_at=greatest(deliveries.c.due_at, _lease_end))  # a longer lease stays
)
_FINISH = (
    sa.update(deliveries)
    # Only pending rows have a token. A condition on the state would mislead a planner.
    .where(_these, _is_ours)
    .values(
        token=None,
        due_at=now() + sa.bindparam("wait_ms"),
        attempts=deliveries.c.attempts - sa.bindparam("released"),
        failures=deliveries.c.failures + sa.bindparam("failed"),
        **{name: sa.bindparam(name) for name in ("state", "result", "last_error")},
    )
)
_SELECT_STORED = sa.select(*(_COLUMNS[name] for name in StoredDelivery.__struct_fields__))


def may_be_apart(delivery: ClaimedDelivery) -> bool:
    """Whether a delivery may have been claimed apart from others: it can take seconds to apply, or
    its claims were lost."""
    least = LARGE if delivery.event in MEMBERSHIP_EVENTS else HUGE
    return len(delivery.body) >= least or delivery.attempt > FEW_CLAIMS


class DeliveryStore:
    """The part of a Store that adds deliveries to the inbox and works them off."""

    _connection: sa.Connection

    def add(self, new: Sequence[NewDelivery], tried: Collection[bytes] = ()) -> list[StoreResult]:
        """Add deliveries to the inbox. Return one result for each, in order.

        `tried` are digests that were sent before without an answer. If the inbox has one with the
        same `received_at`, that try was committed, so the delivery isn't a duplicate.
        """
        if not new:
            return []
        state = {"state": DeliveryState.PENDING.value, "attempts": 0}
        inserted = _insert(self._connection, [structs.asdict(delivery) | state for delivery in new])
        stored = dict(inserted)
        ours = {
            (delivery.digest, delivery.received_at) for delivery in new if delivery.digest in tried
        }
        there = [delivery.digest for delivery in new if delivery.digest not in stored]
        query = sa.select(deliveries.c.digest, deliveries.c.id, deliveries.c.received_at)
        for start in range(0, len(there), _MOST_DIGESTS):
            digests = deliveries.c.digest.in_(there[start : start + _MOST_DIGESTS])
            for digest, id_, received_at in self._connection.execute(query.where(digests)):
                stored[digest] = id_
                if (digest, received_at) in ours:  # committed, but the answer was lost
                    inserted[digest] = id_
        # Of two copies in one batch, only the first is new.
        return [
            StoreResult(stored[delivery.digest], inserted.pop(delivery.digest, None) is None)
            for delivery in new
        ]

    def claim(
        self, token: str, limit: int, max_bytes: int, lease_s: float, *, quick: bool = False
    ) -> list[ClaimedDelivery]:
        """Claim due deliveries, the longest due first. Nobody else gets them during the lease.

        One that can take seconds to apply is claimed alone. Of those whose claims were lost, one
        may be what ends its process: so they are claimed by fewer after each further loss, and in
        the end alone, with a lease that grows. With `quick`, both are claimed only if no other is
        due.
        """
        due: Sequence[Any] = ()
        if quick:
            due = self._connection.execute(_SELECT_QUICK, {"most": limit}).all()
        if not due:
            due = self._connection.execute(_SELECT_DUE, {"most": limit}).all()
        if not due:
            return []
        first = due[0]
        due = [r for r in due if r.is_slow == first.is_slow and r.claims_lost == first.claims_lost]
        if first.is_slow:
            due = due[:1]
        elif first.claims_lost:
            due = due[: max(1, limit // _LOST_PART ** (first.claims_lost - 1))]
        if len(due) == 1:
            lease_s *= 2 ** min(first.claims_lost, MOST_DOUBLINGS)
        ids = [row.id for row in due[: count_fitting((row.size for row in due), max_bytes)]]
        lease = {"ids": ids, "by": token, "lease_ms": int(lease_s * 1000)}
        rows = self._connection.execute(_LEASE, lease).mappings()
        return [ClaimedDelivery(**row) for row in sorted(rows, key=lambda row: row["id"])]

    def renew(self, token: str, ids: Sequence[int], lease_s: float) -> None:
        """Renew the lease of claimed deliveries. Raises ClaimLost if `token` lost any of them."""
        lease = {"ids": list(ids), "by": token, "lease_ms": int(lease_s * 1000)}
        renewed = self._connection.execute(_RENEW, lease).rowcount
        if renewed < len(ids):
            raise ClaimLost(count=len(ids) - renewed)

    def finish(self, token: str, outcomes: Sequence[DeliveryOutcome]) -> None:
        """Write outcomes. Raises ClaimLost if `token` lost any of the deliveries."""
        changes = [
            (
                {
                    "state": outcome.state.value,
                    "result": outcome.result,
                    "last_error": outcome.error,
                    "wait_ms": int(outcome.retry_after_s * 1000),
                    "failed": int(outcome.failed),
                    "released": int(outcome.released),
                },
                outcome.id,
            )
            for outcome in outcomes
        ]
        held = 0
        for values, ids in group_ids(changes):
            held += self._connection.execute(_FINISH, values | {"ids": ids, "by": token}).rowcount
        if held < len(outcomes):
            raise ClaimLost(count=len(outcomes) - held)

    def recent(self, limit: int) -> list[ReceivedBody]:
        """Return the newest deliveries, the newest first, except large ones."""
        columns = (deliveries.c.body, deliveries.c.occurred_at, deliveries.c.received_at)
        newest = sa.select(deliveries.c.id).order_by(deliveries.c.id.desc()).limit(limit)
        query = (
            sa.select(*columns)
            .where(deliveries.c.id.in_(newest), sa.func.length(deliveries.c.body) < LARGE)
            .order_by(deliveries.c.id.desc())
        )
        return [ReceivedBody(*row) for row in self._connection.execute(query)]

    def clocks(self, limit: int) -> Clocks:
        """Return the time of the database's clock, and the dates of the newest deliveries."""
        names = ("digest", "occurred_at", "received_at", "origin")
        query = sa.select(*(deliveries.c[name] for name in names))
        rows = self._connection.execute(query.order_by(deliveries.c.id.desc()).limit(limit))
        dated = [Dated(sent_at_of(digest), *times) for digest, *times in rows]
        return Clocks(read_clock(self._connection), dated)

    def count_deliveries(self) -> dict[str, int]:
        """Count deliveries by state, with 0 for a state without deliveries."""
        counts = dict.fromkeys((state.value for state in DeliveryState), 0)
        # Each condition has a small index; the rest is done. Only what an index has is read.
        odd = sa.select(deliveries.c.state, sa.func.count()).where(is_odd)
        for state, count in self._connection.execute(odd.group_by(deliveries.c.state)):
            counts[state] = count
        count_all = sa.select(sa.func.count()).select_from(deliveries)
        counts[DeliveryState.PENDING.value] = (
            self._connection.scalar(count_all.where(is_pending)) or 0
        )
        total = self._connection.scalar(count_all) or 0
        return counts | {DeliveryState.DONE.value: total - sum(counts.values())}

    def oldest_pending_s(self) -> float | None:
        """Return how long ago the oldest pending delivery was received; None if none is pending."""
        query = sa.select(sa.func.min(deliveries.c.received_at)).where(is_pending)
        oldest = self._connection.scalar(query)
        return None if oldest is None else max(0, read_clock(self._connection) - oldest) / 1000


def _insert(connection: sa.Connection, rows: Sequence[Row]) -> dict[bytes, int]:
    """Insert the rows whose digest is new, due at once. Return their ids by digest."""
    columns = tuple(rows[0])
    if connection.dialect.name == "sqlite":
        return _insert_on_sqlite(connection, columns, rows)
    alone = bool(connection.get_execution_options().get("logto_accepts"))
    return dict(execute_rows(connection, _insert_arrays(columns, alone), rows).all())


def _insert_on_sqlite(
    connection: sa.Connection, columns: tuple[str, ...], rows: Sequence[Row]
) -> dict[bytes, int]:
    before = connection.scalar(sa.select(sa.func.max(deliveries.c.id))) or 0
    start = inserted = last = 0
    while start < len(rows):
        # Powers of two, so that few different statements are prepared.
        size = min(_MOST_ROWS, 1 << (len(rows) - start).bit_length() - 1)
        values = tuple(value for row in rows[start : start + size] for value in row.values())
        result = connection.exec_driver_sql(_insert_tuples(columns, size), values)
        inserted, last = inserted + result.rowcount, result.lastrowid or 0
        start += size
    if inserted == len(rows):  # there is one writer, so ids have no gaps
        ids = range(last - inserted + 1, last + 1)
        return dict(zip((row["digest"] for row in rows), ids, strict=True))
    new = sa.select(deliveries.c.digest, deliveries.c.id).where(deliveries.c.id > before)
    return dict(connection.execute(new).all())


@functools.cache
def _insert_tuples(columns: tuple[str, ...], count: int) -> str:
    row = f"({', '.join('?' * len(columns))}, {NOW_ON_SQLITE})"
    return (
        f"INSERT INTO {deliveries.name} ({', '.join(columns)}, due_at) "
        f"VALUES {', '.join([row] * count)} ON CONFLICT (digest) DO NOTHING"
    )


@functools.cache
def _insert_arrays(columns: tuple[str, ...], alone: bool) -> sa.Executable:
    """Return the statement. `alone` in its transaction, it also limits how long it waits for an
    unfinished transaction that inserted the same digest, and makes its commit wait for the disk,
    whatever is set for the role."""
    rows = sa.select(*unnest(deliveries, columns).c, now())
    if alone:
        limit = sa.func.set_config("lock_timeout", f"{LOCK_MS}ms", sa.true())
        mode = sa.func.current_setting("synchronous_commit")
        durable = sa.case((mode == "off", "on"), else_=mode)  # remote_apply promises more than on
        commit = sa.func.set_config("synchronous_commit", durable, sa.true())
        settings = sa.select(limit.concat(commit)).scalar_subquery()
        rows = rows.where(settings.is_not(None))
    insert: sa.Executable = (
        insert_into(deliveries, "postgresql")
        .from_select([*columns, "due_at"], rows)
        .on_conflict_do_nothing(index_elements=["digest"])
        .returning(deliveries.c.digest, deliveries.c.id)
    )
    return insert


class Inbox:
    """Reads the inbox and its records without locks, and makes deliveries pending again."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def search(
        self, wanted: DeliveryFilter, *, large: bool = True, without: Collection[int] = ()
    ) -> list[StoredDelivery]:
        """List deliveries, except those with the IDs in `without`; without `large`, only those with
        small bodies."""
        id_ = deliveries.c.id
        query = _SELECT_STORED
        if without:
            query = query.where(sa.not_(_these))
        query = query.where(*_make_conditions(wanted)).limit(wanted.limit)
        if not large:
            query = query.where(sa.func.length(deliveries.c.body) < LARGE)
        query = query.order_by(id_ if wanted.oldest_first else id_.desc())
        return self._read(query, {"ids": list(without)} if without else None)

    def count(self, wanted: DeliveryFilter) -> tuple[int, int]:
        """Count all deliveries that match, and return the newest ID among them; 0 if none does."""
        columns = sa.func.count(), sa.func.coalesce(sa.func.max(deliveries.c.id), 0)
        query = sa.select(*columns).where(*_make_conditions(wanted))
        count, newest = self._connection.execute(query).one()
        return count, newest

    def sizes(self, wanted: DeliveryFilter, newest: int) -> dict[int, int]:
        """Return the sizes of the bodies of the next deliveries up to the ID `newest`, by ID, the
        oldest first."""
        size = sa.func.length(deliveries.c.body)
        query = sa.select(deliveries.c.id, size).where(*_make_conditions(wanted))
        query = query.where(deliveries.c.id <= newest).order_by(deliveries.c.id)
        return dict(map(tuple, self._connection.execute(query.limit(wanted.limit))))

    def get(self, delivery_id: int) -> StoredDelivery | None:
        """Return one delivery; None if there is no such id."""
        return next(iter(self._read(_SELECT_STORED.where(deliveries.c.id == delivery_id))), None)

    def make_pending(self, ids: Sequence[int]) -> int:
        """Make deliveries pending again if they aren't. Return how many. A dead one gets the origin
        `replay`, so that it runs its handlers at any age."""
        is_dead = deliveries.c.state == DeliveryState.DEAD.value
        replay = (
            sa.update(deliveries)
            .where(_these, ~is_pending)
            .values(
                state=DeliveryState.PENDING.value,
                origin=sa.case((is_dead, "replay"), else_=deliveries.c.origin),
                due_at=now(),
                attempts=0,
                failures=0,
                token=None,
            )
        )
        return self._connection.execute(replay, {"ids": list(ids)}).rowcount

    def about(
        self, key: Key, others: Sequence[Key], after: int, limit: int
    ) -> list[StoredDelivery]:
        """List deliveries that may be about a user, an organization or its memberships, by id.
        Of `others`, at the other end of the memberships, only deletions are listed.

        A user's memberships are in deliveries of organizations: those that contain the user's id
        as text are listed.
        """
        concerned = [
            deliveries.c.subject == f"{key.kind}:{key.id}",
            deliveries.c.event.in_(DELETIONS) & among(deliveries.c.subject, "others"),
        ]
        if key.kind == "user":
            concerned.append(deliveries.c.event.in_(MEMBERSHIP_EVENTS) & _contains(key.id))
        query = _SELECT_STORED.where(deliveries.c.id > after, sa.or_(*concerned))
        subjects = {"others": [f"{other.kind}:{other.id}" for other in others]}
        return self._read(query.order_by(deliveries.c.id).limit(limit), subjects)

    def known(self, key: Key) -> dict[Key, Record]:
        """Return the record of a user or an organization, if there is one, and the records of all
        its memberships, including ended ones."""
        itself = sa.and_(records.c.kind == key.kind, records.c.logto_id == key.id)
        query = sa.select(records).where(sa.or_(itself, records.c[f"{key.kind}_id"] == key.id))
        rows = self._connection.execute(query.order_by(records.c.logto_id)).mappings()
        return {record.key: record for record in map(from_row, rows)}

    def _read(self, query: sa.Select[Any], values: Row | None = None) -> list[StoredDelivery]:
        rows = self._connection.execute(query, values or {}).mappings()
        return [StoredDelivery(**{**row, "state": DeliveryState(row["state"])}) for row in rows]


def _make_conditions(wanted: DeliveryFilter) -> Iterator[sa.ColumnElement[bool]]:
    if wanted.after is not None:
        id_ = deliveries.c.id
        yield id_ > wanted.after if wanted.oldest_first else id_ < wanted.after
    if wanted.state is not None:
        yield from _in_state(wanted.state)
    for name in ("event", "subject", "origin"):
        if (value := getattr(wanted, name)) is not None:
            yield deliveries.c[name] == value
    if wanted.since is not None:
        yield deliveries.c.received_at >= wanted.since
    if wanted.until is not None:
        yield deliveries.c.received_at < wanted.until
    if wanted.text:
        yield _contains(wanted.text)


def _in_state(state: DeliveryState) -> Iterator[sa.ColumnElement[bool]]:
    """Use the small index of a state, if there is one."""
    if state is DeliveryState.PENDING:
        yield is_pending
        return
    if state is not DeliveryState.DONE:
        yield is_odd
    yield deliveries.c.state == state.value


def _contains(text: str) -> sa.ColumnElement[bool]:
    return contains(deliveries.c.body, text.encode())
