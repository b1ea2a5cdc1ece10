"""Looking at jobs, and moving them by hand."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from logto_webhooks.adapters.stores.dialect import among, now
from logto_webhooks.adapters.stores.schema import jobs
from logto_webhooks.core.jobs import JobCount, JobFilter, JobRow
from logto_webhooks.core.lifecycle import JOB_MOVES, JobMove, JobState

_BY_ID = among(jobs.c.id, "ids")


def counts(connection: sa.Connection) -> list[JobCount]:
    """Count jobs by handler and state; the oldest of each, too."""
    query = (
        sa.select(jobs.c.handler, jobs.c.state, sa.func.count(), sa.func.min(jobs.c.occurred_at))
        .group_by(jobs.c.handler, jobs.c.state)
        .order_by(jobs.c.handler, jobs.c.state)
    )
    moment = connection.scalar(sa.select(now())) or 0
    return [
        JobCount(handler=handler, state=state, count=count, oldest_s=max(0, moment - first) / 1000)
        for handler, state, count, first in connection.execute(query)
    ]


def find(connection: sa.Connection, wanted: JobFilter) -> list[JobRow]:
    """List jobs, the newest first."""
    names = JobRow.__struct_fields__
    query = sa.select(*(jobs.c[name] for name in names)).order_by(jobs.c.id.desc())
    for name in ("id", "handler", "state", "subject", "event", "delivery_id"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(jobs.c[name] == value)
    if wanted.after is not None:
        query = query.where(jobs.c.id < wanted.after)
    rows = connection.execute(query.limit(wanted.limit)).mappings()
    return [JobRow(**row) for row in rows]


def move(connection: sa.Connection, ids: Sequence[int], move: JobMove) -> int:
    """Repeat or discard jobs, where that can be; return how many. A repeated one goes to the end
    of its line."""
    moved = 0
    for state in JobState:
        target = JOB_MOVES.get((state, move))
        if target is None:
            continue
        statement = sa.update(jobs).where(_BY_ID, jobs.c.state == state.value)
        if move is JobMove.REPEAT:
            again = {"occurred_at": now(), "runs": jobs.c.runs + 1, "finished_at": None}
            statement = statement.values(state=target.value, attempts=0, failures=0, **again)
        else:
            statement = statement.values(state=target.value, finished_at=now())
        moved += connection.execute(statement, {"ids": list(ids)}).rowcount
    return moved
