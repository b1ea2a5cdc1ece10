"""Jobs of handlers: enqueue, claim, finish, list."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from msgspec import structs

from logto_webhooks.database.dialect import (
    Row,
    among,
    by_code,
    execute_rows,
    greatest,
    group_ids,
    insert_into,
    insert_values,
    inserted_values,
    now,
    read_clock,
    unnest,
)
from logto_webhooks.database.schema import (
    deliveries,
    handlers,
    has_not_succeeded,
    jobs,
    queue_keys,
)
from logto_webhooks.deliveries import LARGE
from logto_webhooks.jobs import (
    JOB_MOVES,
    Job,
    JobCount,
    JobFilter,
    JobMove,
    JobOfDelivery,
    JobOutcome,
    JobRow,
    JobState,
    KnownJob,
    NewJob,
    RegisteredHandler,
    ToldEvent,
    job_targets,
)
from logto_webhooks.retries import MAX_LOSSES

TURN_MS: Final = 1_000
LOCKED_MS: Final = 1_000  # until a locked job is looked at again
IN_USE_MS: Final = 5 * 60_000  # a process registers its handlers every minute
MOST_BYTES: Final = 16 * 2**20  # of the payloads of one handler's claimed jobs
FIRST: Final = 0  # the `order_at` of a job that runs before all others of its queue
Queue = tuple[str, str]  # its handler and its key
Place = tuple[Any, ...]  # of a job in an index; its last value is the job's id
_LITERAL_STATES: Final[dict[JobState, sa.ColumnElement[Any]]] = {
    state: sa.literal_column(f"'{state.value}'") for state in JobState
}
_first, _newer = jobs.alias("first"), jobs.alias("newer")
_is_waiting, _is_done = (
    _newer.c.state == sa.literal_column(f"'{state.value}'")
    for state in (JobState.WAITING, JobState.DONE)
)
_these_jobs = among(jobs.c.id, "ids")
_these_keys = among(queue_keys.c.id, "ids")
_lease_end = now() + sa.bindparam("lease_ms")
_is_ours = queue_keys.c.token == sa.bindparam("by")
_is_free = queue_keys.c.token.is_(None)
_has_job = (queue_keys.c.handler == jobs.c.handler, queue_keys.c.queue_key == jobs.c.queue_key)
_is_begun = jobs.c.attempts > jobs.c.failures  # by who holds its queue, or lost it
_UPDATE_KEYS = sa.update(queue_keys).where(_these_keys)
_HOLD = _UPDATE_KEYS.values(token=sa.bindparam("by"), held_until=_lease_end)
_RENEW = _UPDATE_KEYS.where(_is_ours).values(held_until=_lease_end)
# A queue that had its turn for TURN_MS goes behind the others that are due.
_had_its_turn = queue_keys.c.due_at < now() - TURN_MS
_FREE = _UPDATE_KEYS.values(
    token=None, held_until=None, due_at=sa.case((_had_its_turn, now()), else_=queue_keys.c.due_at)
)
_FREE_LATER = _UPDATE_KEYS.values(
    token=None, held_until=None, due_at=now() + sa.bindparam("wait_ms")
)
_SELECT_AND_LOCK = (
    sa.select(queue_keys.c.id)
    # in the order in which `_touch` locks them
    .order_by(by_code(queue_keys.c.handler), by_code(queue_keys.c.queue_key))
    .with_for_update()
)
_LOCK = _SELECT_AND_LOCK.where(_these_keys)
_LOCK_OF_HANDLER = _SELECT_AND_LOCK.where(queue_keys.c.handler == sa.bindparam("name"))
_LOCK_SOME_OF_HANDLER = _LOCK_OF_HANDLER.where(among(queue_keys.c.queue_key, "queues"))
_LOCK_OWN = _LOCK.where(_is_ours)
_KEY_IDS = sa.select(queue_keys.c.id).where(_these_keys)
_JOB_IDS = sa.select(jobs.c.id).where(_these_jobs)
_first_of_queue = (
    sa.select(_first.c.id)
    .where(
        _first.c.handler == queue_keys.c.handler,
        _first.c.queue_key == queue_keys.c.queue_key,
        _first.c.state == sa.literal_column("'waiting'"),
    )
    .order_by(_first.c.order_at, _first.c.id)
    .limit(1)
    .correlate(queue_keys)
    .scalar_subquery()
)
_losses = (
    sa.select(jobs.c.attempts - jobs.c.failures)
    .where(jobs.c.id == _first_of_queue)
    .correlate(queue_keys)
    .scalar_subquery()
)
_most_losses = sa.bindparam("most_losses", type_=sa.Integer)
_is_lost = (
    (_most_losses > 0)
    & (queue_keys.c.held_until <= now())
    & ((_most_losses >= MAX_LOSSES) | (sa.func.coalesce(_losses, 0) <= _most_losses))
)
# Of the columns that change often, only `due_at` is in an index. Holding a queue and freeing it
# rarely changes `due_at`, so these updates don't write to an index on PostgreSQL.
_SELECT_DUE = (
    sa.select(queue_keys.c.id, queue_keys.c.token)
    .where(queue_keys.c.handler == sa.bindparam("name"), queue_keys.c.due_at <= now())
    .where(_is_free | _is_lost)
    .order_by(queue_keys.c.due_at)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_due_at = (
    sa.select(queue_keys.c.due_at)
    .where(*_has_job, jobs.c.id == _first_of_queue)
    .where(jobs.c.state == sa.literal_column("'waiting'"))
    .correlate(jobs)
    .scalar_subquery()
    .label("due_at")
)
_is_late = (jobs.c.order_at != FIRST) & (
    sa.exists()
    .where(
        _newer.c.handler == jobs.c.handler,
        _newer.c.queue_key == jobs.c.queue_key,
        _is_done,
        _newer.c.order_at > jobs.c.order_at,
    )
    .correlate(jobs)
)
_payload = sa.func.coalesce(jobs.c.payload, deliveries.c.body)
_size = sa.func.length(_payload)
_JOB_COLUMNS = ("id", "handler", "key", "event", "subject", "occurred_at", "delivery_id")
_SELECT_FIRST_JOBS = (
    sa.select(
        *(jobs.c[name] for name in (*_JOB_COLUMNS, "attempts", "failures", "runs")),
        queue_keys.c.id.label("queue_key_id"),
        _is_late.label("late"),
        deliveries.c.received_at,
        deliveries.c.origin,
        _size.label("size"),
        sa.case((_size < LARGE, _payload)).label("payload"),
    )
    .select_from(queue_keys)
    .join(jobs, jobs.c.id == _first_of_queue)
    .outerjoin(deliveries, deliveries.c.id == jobs.c.delivery_id)
    .where(_these_keys)
)
_SELECT_PAYLOADS = (
    sa.select(jobs.c.id, _payload)
    .select_from(jobs)
    .outerjoin(deliveries, deliveries.c.id == jobs.c.delivery_id)
    .where(_these_jobs)
)
_LOCK_FIRST_JOBS = _SELECT_FIRST_JOBS.with_for_update(of=jobs, skip_locked=True)
_SELECT_HANDLERS = sa.select(handlers.c.name, handlers.c.options, handlers.c.seen_at).order_by(
    by_code(handlers.c.name), handlers.c.registered_at
)
_SELECT_QUEUES = sa.select(jobs.c.handler, jobs.c.queue_key, jobs.c.state).where(_these_jobs)
_COUNT_ATTEMPT = sa.update(jobs).where(_these_jobs).values(attempts=jobs.c.attempts + 1)
_FINISH = (
    sa.update(jobs)
    # Waiting jobs have no end. With a condition on the state, a planner may read all that wait.
    .where(_these_jobs, jobs.c.finished_at.is_(None), _is_begun)
    .values(
        state=sa.bindparam("state"),
        error=sa.bindparam("error"),
        failures=jobs.c.failures + sa.bindparam("failed"),
        attempts=jobs.c.attempts - sa.bindparam("not_counted"),
        finished_at=sa.case((sa.bindparam("is_over", type_=sa.Boolean), now())),
    )
    .returning(jobs.c.id)
)
# With NOT EXISTS instead, a planner would make a join and read all waiting jobs.
_DROP_EMPTY = (
    sa.delete(queue_keys).where(_these_keys, _first_of_queue.is_(None)).returning(queue_keys.c.id)
)


def _end_of_queue(handler: Any, queue_key: Any) -> Any:
    """Return an expression for the `order_at` of a job that runs after all others of its queue:
    now, or that of the last one if the clock was set back."""
    end: sa.ColumnElement[int] = now()
    for in_state in (_is_waiting, _is_done):
        last = sa.select(sa.func.max(_newer.c.order_at)).where(
            _newer.c.handler == handler, _newer.c.queue_key == queue_key, in_state
        )
        end = greatest(end, sa.func.coalesce(last.scalar_subquery() + 1, 0))
    return end


@functools.cache
def _make_insert(columns: tuple[str, ...], dialect: str) -> Any:
    """Return an INSERT of jobs that don't exist. The default for `occurred_at` is now, and for
    `order_at` the end of the queue."""
    values = inserted_values(jobs, columns, dialect)
    end = _end_of_queue(values["handler"], values["queue_key"])
    values["occurred_at"] = sa.func.coalesce(values["occurred_at"], now())
    values["order_at"] = sa.func.coalesce(values["order_at"], end)
    values["state"] = sa.literal_column(f"'{JobState.WAITING.value}'")
    values |= {name: sa.literal_column("0") for name in ("attempts", "failures", "runs")}
    insert = insert_values(jobs, values, dialect)
    return insert.on_conflict_do_nothing(index_elements=["handler", "key"])


@functools.cache
def _select_known(dialect: str) -> sa.Select[Any]:
    """Return a query of the jobs that a handler has had with the keys `key`."""
    known = sa.select(jobs.c.key, jobs.c.delivery_id, jobs.c.occurred_at).where(
        jobs.c.handler == sa.bindparam("name")
    )
    if dialect != "postgresql":
        return known.where(among(jobs.c.key, "key"))
    # One lookup for each key. Otherwise, a planner that saw the table when it was small would read
    # all jobs of the handler.
    wanted = unnest(jobs, ("key",))
    job = known.where(jobs.c.key == wanted.c.key).limit(1).correlate(wanted).lateral()
    return sa.select(job).select_from(wanted.join(job, sa.true()))


@functools.cache
def _make_touch(dialect: str, wake: bool) -> Any:
    """Return an INSERT of queue keys that don't exist. Existing ones are locked until the
    transaction ends.

    With `wake`, existing ones become due now, unless somebody holds them.
    """
    values = inserted_values(queue_keys, ("handler", "queue_key"), dialect) | {"due_at": now()}
    insert = insert_values(queue_keys, values, dialect)
    new = insert.excluded
    # A row is locked even if it isn't updated.
    is_changed = _is_free & (queue_keys.c.due_at > new.due_at) if wake else sa.false()
    return insert.on_conflict_do_update(
        index_elements=["handler", "queue_key"], set_={"due_at": new.due_at}, where=is_changed
    )


@functools.cache
def _make_move(state: JobState, move: JobMove) -> Any:
    """Return an UPDATE that repeats or discards the jobs in a state."""
    target = JOB_MOVES[state, move].value
    statement = (
        sa.update(jobs)
        .where(_these_jobs, jobs.c.state == sa.literal_column(f"'{state.value}'"))
        .returning(jobs.c.id)
    )
    if move is JobMove.DISCARD:
        return statement.values(state=target, finished_at=now())
    afresh: dict[str, Any] = {"attempts": 0, "failures": 0}
    if state is JobState.WAITING:
        is_held = sa.exists().where(*_has_job, queue_keys.c.held_until > now()).correlate(jobs)
        return statement.where(~(_is_begun & is_held)).values(afresh)
    end = _end_of_queue(jobs.c.handler, jobs.c.queue_key)
    order_at = sa.case((jobs.c.order_at == FIRST, FIRST), else_=end)
    afresh |= {"order_at": order_at, "finished_at": None, "runs": jobs.c.runs + 1}
    return statement.values(state=target, **afresh)


class JobStore:
    """Handlers and their jobs, in the transaction of a Connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def handlers(self) -> list[RegisteredHandler]:
        """Return all registered handlers, whichever process has their code.

        While several releases run, a handler is for the events of each, so that none is missing.
        Its other options are those of the newest.
        """
        by_name: dict[str, list[Any]] = {}
        for row in self._connection.execute(_SELECT_HANDLERS):
            by_name.setdefault(row.name, []).append(row)
        return [_combine(rows) for rows in by_name.values()]

    def register(self, new: Sequence[RegisteredHandler]) -> None:
        """Register handlers, or note that a process still has their code."""
        for handler in sorted(new, key=lambda handler: handler.name):
            options = msgspec.to_builtins(handler)
            digest = hashlib.sha256(msgspec.json.encode(options, order="deterministic"))
            insert = insert_into(handlers, self._connection.dialect.name).values(
                name=handler.name,
                definition=digest.hexdigest()[:32],
                options=options,
                registered_at=now(),
                seen_at=greatest(now(), _last_seen(handler.name)),
            )
            self._connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["name", "definition"],
                    set_={"seen_at": insert.excluded.seen_at},
                )
            )

    def set_clock_back(self, moment: int, by_ms: int) -> None:
        """Make the times when handlers were registered that are after `moment` earlier by `by_ms`.
        What is used the longest stays so."""
        # in the order in which processes lock them
        in_order = sa.select(handlers.c.name).order_by(by_code(handlers.c.name)).with_for_update()
        self._connection.execute(in_order)
        times = (handlers.c.registered_at, handlers.c.seen_at)
        earlier = {at: sa.case((at > moment, at - by_ms), else_=at) for at in times}
        self._connection.execute(sa.update(handlers).values(earlier))

    def forget(self, name: str, most: int) -> int:
        """Delete a handler, and discard at most `most` of its waiting jobs. Return how many these
        were; 0 when none is left."""
        self._connection.execute(sa.delete(handlers).where(handlers.c.name == name))
        waiting = sa.select(jobs.c.id, jobs.c.queue_key).where(
            jobs.c.handler == name, jobs.c.state == sa.literal_column("'waiting'")
        )
        in_order = waiting.order_by(jobs.c.queue_key, jobs.c.order_at, jobs.c.id).limit(most)
        rows = self._connection.execute(in_order).all()
        if len(rows) < most:
            locked = self._connection.scalars(_LOCK_OF_HANDLER, {"name": name}).all()
        else:
            some = {"name": name, "queues": sorted({row.queue_key for row in rows})}
            locked = self._connection.scalars(_LOCK_SOME_OF_HANDLER, some).all()
        discard = _make_move(JobState.WAITING, JobMove.DISCARD)
        discarded = self._connection.scalars(discard, {"ids": [row.id for row in rows]}).all()
        self._connection.execute(_DROP_EMPTY, {"ids": locked})
        return len(discarded)

    def add(self, new: Sequence[NewJob]) -> None:
        """Add jobs, each once for its handler and key, and the queues that they lack."""
        if not new:
            return
        new = self._choose_keys(new)
        rows = [_to_row(job) for job in new]
        statement = _make_insert(tuple(rows[0]), self._connection.dialect.name)
        execute_rows(self._connection, statement, rows)
        self._touch({(job.handler, job.queue_key) for job in new})

    def list_of_delivery(self, delivery_id: int, after: int, limit: int) -> list[JobOfDelivery]:
        """List the next jobs of a delivery after the id `after`, in the order of an index."""
        place = (jobs.c.delivery_id, jobs.c.id)
        query = (
            sa.select(*(jobs.c[name] for name in JobOfDelivery.__struct_fields__))
            # Without statistics, a planner takes an equal delivery for selective, and sorts.
            .where(sa.tuple_(*place) > sa.tuple_(delivery_id, after))
            .where(jobs.c.delivery_id <= delivery_id)
            .order_by(*place)
            .limit(limit)
        )
        return [JobOfDelivery(**row) for row in self._connection.execute(query).mappings()]

    def told_events(self, ids: Sequence[int]) -> list[ToldEvent]:
        """Return the local events of jobs, in the order of the jobs."""
        columns = (jobs.c[name] for name in ToldEvent.__struct_fields__)
        query = sa.select(*columns).where(_these_jobs, jobs.c.payload.is_not(None))
        rows = self._connection.execute(query.order_by(jobs.c.id), {"ids": list(ids)}).mappings()
        return [ToldEvent(**row) for row in rows]

    def find_known(self, handler: str, keys: Collection[str]) -> dict[str, KnownJob]:
        """Return the jobs that a handler has had with some of the keys."""
        query = _select_known(self._connection.dialect.name)
        rows = self._connection.execute(query, {"name": handler, "key": list(keys)})
        return {key: KnownJob(*others) for key, *others in rows}

    def _choose_keys(self, new: Sequence[NewJob]) -> Sequence[NewJob]:
        """Give each job its `key_again` if the handler has had a job with its key."""
        keys: dict[str, list[str]] = {}
        for job in new:
            if job.key_again is not None:
                keys.setdefault(job.handler, []).append(job.key)
        known = {handler: self.find_known(handler, some) for handler, some in keys.items()}
        return (
            [
                job.with_key(job.key_again)
                if job.key_again is not None and job.key in known[job.handler]
                else job
                for job in new
            ]
            if known
            else new
        )

    def claim(
        self,
        token: str,
        room: Mapping[str, int],
        lease_s: float,
        *,
        most_losses: int = MAX_LOSSES,
        skip_locked: bool = False,
        held: Mapping[int, str] | None = None,
        held_bytes: Mapping[str, int] | None = None,
    ) -> list[Job]:
        """Claim the first job of each due queue, for at most `room` queues of each handler. Nobody
        else gets these queues during the lease.

        The large payloads of a handler's jobs have at most MOST_BYTES, together with `held_bytes`
        of its claimed jobs. One of any size is claimed if the handler has none.

        Of the queues whose lease expired, it claims one, with a job that was lost at most
        `most_losses` times. Those that the process holds, by their tokens in `held`, are renewed
        instead: the clock was set forward.
        With `skip_locked`, it skips jobs whose row another transaction has locked.
        """
        due: list[int] = []
        renewed: dict[str, list[int]] = {}
        has_lost = False
        held = held or {}
        for name, most in room.items():
            wanted = {"name": name, "most": most, "most_losses": 0 if has_lost else most_losses}
            for queue_key_id, holder in self._connection.execute(_SELECT_DUE, wanted):
                if holder is not None and queue_key_id in held:
                    renewed.setdefault(held[queue_key_id], []).append(queue_key_id)
                elif holder is None or not has_lost:
                    due.append(queue_key_id)
                    has_lost = has_lost or holder is not None
        for own, queue_key_ids in renewed.items():
            self.renew(own, queue_key_ids, lease_s)
        if not due:
            return []
        self._connection.execute(_HOLD, {"ids": due, "by": token, "lease_ms": int(lease_s * 1000)})
        heads = _LOCK_FIRST_JOBS if skip_locked else _SELECT_FIRST_JOBS
        found = self._connection.execute(heads, {"ids": due}).mappings().all()
        empty = set(due) - {row["queue_key_id"] for row in found}
        rows = self._fit(found, held_bytes or {})
        self._connection.execute(_COUNT_ATTEMPT, {"ids": [row["id"] for row in rows]})
        if empty:
            self._connection.execute(_DROP_EMPTY, {"ids": list(empty)})
            if skip_locked:  # the first job of those that remain is locked
                later = {"ids": list(empty), "wait_ms": LOCKED_MS}
                self._connection.execute(_FREE_LATER, later)
        return [Job(**row | {"late": bool(row["late"])}) for row in rows]

    def _fit(self, found: Sequence[sa.RowMapping], held_bytes: Mapping[str, int]) -> list[Row]:
        """Choose jobs by the size of their payloads, and free the queues of the others. Return
        those with their payloads."""
        rows: list[Row] = []
        used = dict(held_bytes)
        postponed: list[int] = []
        large: list[int] = []
        for row in found:
            values = dict(row)
            size, handler = values.pop("size"), values["handler"]
            if size >= LARGE:
                before = used.get(handler, 0)
                if before and before + size > MOST_BYTES:
                    postponed.append(values["queue_key_id"])
                    continue
                used[handler] = before + size
                large.append(values["id"])
            rows.append(values)
        if large:
            payloads = dict(map(tuple, self._connection.execute(_SELECT_PAYLOADS, {"ids": large})))
            for values in rows:
                values["payload"] = payloads.get(values["id"], values["payload"])
        if postponed:
            self._connection.execute(_FREE, {"ids": postponed})
        return rows

    def lock(self, queue_key_ids: Sequence[int]) -> None:
        """Lock queues until the transaction ends, in the same order as all others."""
        self._connection.execute(_LOCK, {"ids": list(queue_key_ids)})

    def find_locked(
        self, queue_key_ids: Sequence[int], job_ids: Sequence[int]
    ) -> tuple[set[int], set[int]]:
        """Lock queues and jobs without waiting. Return those that others have locked."""
        return self._find_locked(_KEY_IDS, queue_key_ids), self._find_locked(_JOB_IDS, job_ids)

    def renew(self, token: str, queue_key_ids: Sequence[int], lease_s: float) -> None:
        """Renew the lease of queues."""
        held = {"ids": list(queue_key_ids), "by": token, "lease_ms": int(lease_s * 1000)}
        self._connection.execute(_RENEW, held)

    def finish(self, token: str, outcomes: Sequence[JobOutcome]) -> list[int]:
        """Write outcomes and free the queues. Return the ids of jobs for which nothing was written,
        because `token` no longer holds them or they were discarded."""
        wanted = {"ids": [outcome.queue_key_id for outcome in outcomes], "by": token}
        held = set(self._connection.scalars(_LOCK_OWN, wanted))
        ours = [outcome for outcome in outcomes if outcome.queue_key_id in held]
        if not ours:
            return [outcome.id for outcome in outcomes]
        written: set[int] = set()
        for values, ids in group_ids((_to_values(outcome), outcome.id) for outcome in ours):
            written.update(self._connection.scalars(_FINISH, values | {"ids": ids}))
        left = held.difference(self._connection.scalars(_DROP_EMPTY, {"ids": sorted(held)}))
        if left:
            self._free(left, [outcome for outcome in ours if outcome.id in written])
        return [outcome.id for outcome in outcomes if outcome.id not in written]

    def counts(self) -> list[JobCount]:
        """Count jobs by handler and state, with the age of the oldest."""
        group = (jobs.c.handler, jobs.c.state)
        began = greatest(jobs.c.occurred_at, jobs.c.order_at)  # to wait, also once more
        query = sa.select(*group, sa.func.count(), sa.func.min(began))
        query = query.group_by(*group).order_by(*group)
        moment = read_clock(self._connection)
        return [
            JobCount(
                handler=handler, state=state, count=count, oldest_s=max(0, moment - first) / 1000
            )
            for handler, state, count, first in self._connection.execute(query)
        ]

    def count_waiting(self, but: Collection[str] = ()) -> dict[str, int]:
        """Count the waiting jobs of each handler, `but` some. Jobs that are over aren't read."""
        query = sa.select(jobs.c.handler, sa.func.count()).where(
            jobs.c.state == sa.literal_column("'waiting'"), jobs.c.handler.not_in(sorted(but))
        )
        query = query.group_by(jobs.c.handler).order_by(jobs.c.handler)
        return {row.handler: row[1] for row in self._connection.execute(query)}

    def find(self, wanted: JobFilter) -> list[JobRow]:
        """List jobs, the newest first."""
        names = [name for name in JobRow.__struct_fields__ if name != "due_at"]
        query = sa.select(*(jobs.c[name] for name in names), _due_at).order_by(jobs.c.id.desc())
        if wanted.ids is not None:
            query = query.where(jobs.c.id.in_(wanted.ids))
        for name in ("id", "handler", "state", "subject", "event", "delivery_id"):
            if (value := getattr(wanted, name)) is not None:
                query = query.where(jobs.c[name] == value)
        if wanted.state in (JobState.DEAD, JobState.DISCARDED):
            query = query.where(has_not_succeeded)
        if wanted.after is not None:
            query = query.where(jobs.c.id < wanted.after)
        rows = self._connection.execute(query.limit(wanted.limit)).mappings()
        return [JobRow(**row) for row in rows]

    def list_places(
        self, handler: str, state: JobState, after: Place | None, limit: int
    ) -> list[Place]:
        """List the next jobs of a handler in a state, in the order of an index."""
        place = [jobs.c.id]
        conditions = [jobs.c.handler == handler, jobs.c.state == _LITERAL_STATES[state]]
        if state in (JobState.WAITING, JobState.DONE):
            place = [jobs.c.queue_key, jobs.c.order_at, jobs.c.id]
        else:
            conditions.append(has_not_succeeded)
        if after is not None:
            conditions.append(sa.tuple_(*place) > sa.tuple_(*after))
        query = sa.select(*place).where(*conditions).order_by(*place).limit(limit)
        return [tuple(row) for row in self._connection.execute(query)]

    def move(self, ids: Sequence[int], move: JobMove) -> list[int]:
        """Repeat or discard jobs by hand, if their state allows it. Return the ids of those.

        A repeated job goes to the end of its queue, unless it is to be the first. The next attempt
        of a waiting job is due now, unless the job is running. Their queues are due now, unless
        somebody holds them.
        """
        some = {"ids": list(ids)}
        targets = job_targets(move)
        in_queue = {state for state, to in targets.items() if JobState.WAITING in (state, to)}
        queues = self._connection.execute(_SELECT_QUEUES, some).all()
        self._touch(
            {(at.handler, at.queue_key) for at in queues if at.state in in_queue}, wake=True
        )
        moved: set[int] = set()
        for state in targets:  # waiting jobs first, so that none is moved twice
            moved.update(self._connection.scalars(_make_move(state, move), some))
        return sorted(moved)

    def find_missing_queues(
        self, after: Queue | None, limit: int
    ) -> tuple[list[Queue], Queue | None]:
        """Look at the next waiting jobs, in the order of an index. Return those of their queues
        that have no row, and the last of them; None at the end."""
        place = (jobs.c.handler, jobs.c.queue_key)
        has_queue = sa.exists().where(*_has_job).correlate(jobs)
        query = sa.select(*place, has_queue).where(jobs.c.state == sa.literal_column("'waiting'"))
        if after is not None:  # other jobs of that queue are skipped
            query = query.where(sa.tuple_(*place) > sa.tuple_(*after))
        rows = self._connection.execute(query.order_by(*place).limit(limit)).all()
        missing = dict.fromkeys((handler, key) for handler, key, is_there in rows if not is_there)
        return list(missing), (rows[-1][0], rows[-1][1]) if len(rows) == limit else None

    def add_queues(self, missing: Collection[Queue]) -> None:
        """Insert queues. One that has no job any more is dropped when it is claimed."""
        self._touch(set(missing))

    def _find_locked(self, known: sa.Select[Any], ids: Sequence[int]) -> set[int]:
        wanted = {"ids": list(ids)}
        lock_free = known.with_for_update(skip_locked=True)
        free = set(self._connection.scalars(lock_free, wanted))
        if free.issuperset(ids):
            return set()
        return set(self._connection.scalars(known, wanted)) - free

    def _touch(self, touched: set[Queue], *, wake: bool = False) -> None:
        if touched:
            rows = [{"handler": handler, "queue_key": key} for handler, key in sorted(touched)]
            statement = _make_touch(self._connection.dialect.name, wake)
            execute_rows(self._connection, statement, rows)

    def _free(self, queue_key_ids: set[int], written: Sequence[JobOutcome]) -> None:
        """Free queues. They are due after the wait of the job that was written, if there is one."""
        waits = {outcome.queue_key_id: int(outcome.after_s * 1000) for outcome in written}
        later = [({"wait_ms": wait}, key) for key, wait in waits.items() if wait > 0]
        for values, ids in group_ids(pair for pair in later if pair[1] in queue_key_ids):
            self._connection.execute(_FREE_LATER, values | {"ids": ids})
        now_free = queue_key_ids.difference(key for _, key in later)
        if now_free:
            self._connection.execute(_FREE, {"ids": sorted(now_free)})


def _last_seen(name: str) -> Any:
    """Return an expression for when a handler was last registered. Until it is noticed that the
    clock was set back, that is in the future."""
    last = sa.select(sa.func.max(handlers.c.seen_at)).where(handlers.c.name == name)
    return sa.func.coalesce(last.scalar_subquery(), 0)


def _combine(rows: Sequence[Any]) -> RegisteredHandler:
    """Combine the definitions of a handler that processes have, the oldest first."""
    last_seen = max(row.seen_at for row in rows)
    in_use = [
        msgspec.convert(row.options, RegisteredHandler)
        for row in rows
        if row.seen_at >= last_seen - IN_USE_MS
    ]
    patterns = dict.fromkeys(pattern for handler in in_use for pattern in handler.patterns)
    return structs.replace(in_use[-1], patterns=tuple(patterns))


def _to_row(job: NewJob) -> Row:
    row = structs.asdict(job) | {"event": job.event.replace("\0", "")}
    row["order_at"] = FIRST if row.pop("is_first") else job.occurred_at
    del row["key_again"]
    return row


def _to_values(outcome: JobOutcome) -> Row:
    return {
        "state": outcome.state.value,
        "error": None if outcome.error is None else _clean(outcome.error),
        "failed": int(outcome.failed),
        "not_counted": int(not outcome.counts),
        "is_over": outcome.state is not JobState.WAITING,
    }


def _clean(text: str) -> str:
    """Remove NUL and escape lone surrogates, which some databases refuse."""
    return text.replace("\0", "").encode(errors="backslashreplace").decode()
