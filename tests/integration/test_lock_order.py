"""Who changes several queues or records takes them in the one order of all, so that no two wait for
each other (PostgreSQL)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from logto_webhooks import admin
from logto_webhooks.database.store import Store
from logto_webhooks.handlers import worker
from logto_webhooks.jobs import JobOutcome, JobState
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import Key, Tombstone
from logto_webhooks.testing import make
from tests.integration.test_jobs_by_hand import until_one_waits
from tests.support import postgres
from tests.support.jobs import ONE, job
from tests.support.stores import delivery

Step = Callable[[Store], object]


def adds(line: str) -> Step:
    return lambda store: store.jobs.add([job(f"more {line}", queue_key=line)])


def locks(user: str) -> Step:
    return lambda store: store.lock([Key("user", user)])


def forgets(store: Store) -> None:
    admin.forget_handler(store, "one")


def applies(store: Store) -> None:
    """The later first."""
    admin.replay(store, [2, 1], 100, dry_run=True)


def ends(store: Store) -> None:
    """What was claimed at two times, the later queue first."""
    done = [
        (each.line, JobOutcome(id=each.id, queue_key_id=each.queue_key_id, state=JobState.DONE))
        for each in held(store)
    ]
    worker.write_outcomes(store, sorted(done, key=lambda each: each[0], reverse=True))


def held(store: Store) -> list[sa.Row[tuple[int, int, str]]]:
    assert isinstance(store, Store)
    query = "SELECT jobs.id, queue_keys.id AS queue_key_id, token AS line"
    query += " FROM logto_lines queue_keys JOIN logto_jobs jobs USING (handler, queue_key)"
    query += " WHERE token IS NOT NULL"
    return list(store._connection.execute(sa.text(query)))


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("several", "first", "second"),
    [
        (forgets, adds("user:a"), adds("user:z")),
        (ends, adds("user:a"), adds("user:z")),
        (applies, locks("ana"), locks("zoe")),
    ],
)
def test_no_two_wait_for_each_other(several: Step, first: Step, second: Step) -> None:
    """One takes the first and then the second, while another takes both."""
    schema = postgres.emptied_schema()
    engine = postgres.sync_engine().execution_options(schema_translate_map={None: schema})

    def connected(work: Step) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text(f"SET LOCAL search_path TO {schema}"))
            work(Store(connection))

    connected(prepare)
    with ThreadPoolExecutor(1) as threads, engine.begin() as connection:
        first(Store(connection))
        other = threads.submit(connected, several)
        until_one_waits(engine)
        second(Store(connection))
        connection.commit()
        other.result(10)


def prepare(store: Store) -> None:
    """Two deliveries, two users, and two queues, each of them held."""
    made = [make.user_created(id=each).body for each in ("ana", "zoe")]
    store.add([delivery(each) for each in made])
    store.lock([Key("user", each) for each in ("ana", "zoe")])
    store.jobs.register([ONE])
    for name in ("z", "a"):  # as they lie in the table
        store.jobs.add([job(name, queue_key=f"user:{name}")])
        store.jobs.claim(name, {"one": 1}, 60)


@pytest.mark.postgres
@pytest.mark.parametrize("was_deleted", [False, True])
def test_an_organization_that_gains_members_is_shared_unless_it_was_deleted(
    was_deleted: bool,
) -> None:
    """Two that share it, and then write that a member tells of it, would wait for each other."""
    schema = postgres.emptied_schema()
    engine = postgres.sync_engine().execution_options(schema_translate_map={None: schema})
    key = Key("organization", "acme")
    nowait = sa.text(f"SELECT 1 FROM {schema}.logto_records FOR SHARE NOWAIT")
    with engine.begin() as connection:
        store = Store(connection)
        known = store.lock([key])[key]
        store.save([merge(known, Tombstone(key, 5))] if was_deleted else [known])
    with engine.begin() as connection, engine.connect() as other:
        Store(connection).lock([key], share=True)
        if was_deleted:
            with pytest.raises(sa.exc.OperationalError, match="could not obtain lock"):
                other.execute(nowait)
        else:
            other.execute(nowait)
        other.rollback()
