"""Looking at jobs."""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks.adapters.stores.dialect import now
from logto_webhooks.adapters.stores.schema import jobs
from logto_webhooks.core.jobs import JobCount, JobFilter, JobRow


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
    if wanted.ids is not None:
        query = query.where(jobs.c.id.in_(wanted.ids))
    for name in ("id", "handler", "state", "subject", "event", "delivery_id"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(jobs.c[name] == value)
    if wanted.after is not None:
        query = query.where(jobs.c.id < wanted.after)
    rows = connection.execute(query.limit(wanted.limit)).mappings()
    return [JobRow(**row) for row in rows]
