"""What PostgreSQL writes for an update: nothing into an index, where no indexed column changes and
the page has room (a HOT update)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from logto_webhooks.database.jobs import JobStore
from logto_webhooks.database.store import Store
from logto_webhooks.jobs import Job, JobOutcome, JobState
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import Key, Record, Upsert, Value, membership
from tests.support import postgres
from tests.support.jobs import job

pytestmark = pytest.mark.postgres

JOBS = 400
MEMBERS = 2_000
STEP = 100

_WRITTEN = sa.text(
    "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables"
    " WHERE schemaname = :schema AND n_tup_upd > 0"
)


class Updates:
    """Counts the updates of transactions, by table; those that wrote into an index apart."""

    def __init__(self) -> None:
        self._schema = postgres.emptied_schema()
        engine = postgres.sync_engine()
        self.engine = engine.execution_options(schema_translate_map={None: self._schema})
        self.all: Counter[str] = Counter()
        self.hot: Counter[str] = Counter()

    @contextmanager
    def counted(self) -> Iterator[sa.Connection]:
        """A transaction whose updates are counted."""
        with self.engine.begin() as connection:
            all_before, hot_before = self._written(connection)  # by others of this connection
            yield connection
            all_after, hot_after = self._written(connection)
        self.all += all_after - all_before
        self.hot += hot_after - hot_before

    def _written(self, connection: sa.Connection) -> tuple[Counter[str], Counter[str]]:
        rows = connection.execute(_WRITTEN, {"schema": self._schema}).all()
        return Counter({row[0]: row[1] for row in rows}), Counter({row[0]: row[2] for row in rows})


def test_a_job_changes_an_index_only_when_it_ends() -> None:
    """Its queue key is written once, when it is held, and its row twice: held, and ended."""
    updates = Updates()
    with updates.engine.begin() as connection:
        JobStore(connection).add([job(f"{n}", queue_key=f"user:{n}") for n in range(JOBS)])
    held: list[Job] = []
    for _ in range(JOBS // 10 + 1):
        with updates.counted() as connection:
            jobs = JobStore(connection)
            assert jobs.finish("t", [_done(job) for job in held]) == []
            held = jobs.claim("t", {"one": 10}, 60)
    with updates.engine.connect() as connection:
        [done] = JobStore(connection).counts()
    assert (done.state, done.count) == ("done", JOBS)
    assert updates.all == {"logto_lines": JOBS, "logto_jobs": 2 * JOBS}
    assert updates.hot["logto_lines"] == JOBS
    assert updates.hot["logto_jobs"] >= 0.9 * JOBS


def test_a_long_queue_changes_no_index_of_its_key() -> None:
    """But for once in a while, when it goes behind the others."""
    updates = Updates()
    with updates.engine.begin() as connection:
        JobStore(connection).add([job(f"{n}", at=n) for n in range(JOBS)])
    for _ in range(JOBS):
        with updates.counted() as connection:
            jobs = JobStore(connection)
            [first] = jobs.claim("t", {"one": 10}, 60)
            assert jobs.finish("t", [_done(first)]) == []
    assert updates.all["logto_lines"] == 2 * JOBS - 1
    assert updates.hot["logto_lines"] >= 0.9 * updates.all["logto_lines"]


def test_memberships_that_end_with_an_organization_change_no_index() -> None:
    """However many there are."""
    updates = Updates()
    pairs = [membership("o", f"u{n:05}") for n in range(MEMBERS)]
    present = {"present": Value(True, stamp=1, start=1, end=1)}
    end = Record(
        Key("organization", "o"), gone_at=10, local_id="0190c0de-0000-7000-8000-000000000001"
    )
    with updates.engine.begin() as connection:
        known = [merge(Record(pair, announced=True), Upsert(pair, present)) for pair in pairs]
        Store(connection).save(known)
    random.Random(1).shuffle(pairs)
    for start in range(0, MEMBERS, STEP):
        with updates.counted() as connection:
            ended, _ = Store(connection).end_memberships(end, pairs[start : start + STEP])
            assert len(ended) == STEP
    assert updates.all["logto_records"] == MEMBERS
    assert updates.hot["logto_records"] >= 0.9 * MEMBERS


def _done(job: Job) -> JobOutcome:
    return JobOutcome(id=job.id, queue_key_id=job.queue_key_id, state=JobState.DONE)
