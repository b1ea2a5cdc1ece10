"""Jobs repeated or discarded by hand, whatever they do just then: one suite for every store."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import httpx2
import pytest
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.ext.asyncio import AsyncConnection

from logto_webhooks import Delivery, LogtoWebhooks, events
from logto_webhooks.cli.jobs import count_groups
from logto_webhooks.database.jobs import JobStore
from logto_webhooks.database.schema import jobs
from logto_webhooks.database.store import Store
from logto_webhooks.events.base import to_millis
from logto_webhooks.jobs import JobFilter, JobMove, JobOutcome, JobRow, JobState
from logto_webhooks.testing import SIGNING_KEY, make
from tests.integration.conftest import Run
from tests.support import postgres
from tests.support.jobs import add, claim, finish, job
from tests.support.mounted import all_over, live, on_sqlite, send, soon
from tests.support.mounted import until as until_all
from tests.support.stores import delivery as delivered
from tests.support.waiting import eventually, until

T = TypeVar("T")


def moved(run: Run, move: JobMove, *ids: int) -> list[int]:
    return run(lambda store: store.jobs.move(ids, move))


def rows(run: Run) -> dict[int, JobRow]:
    return {each.id: each for each in run(lambda store: store.jobs.find(JobFilter()))}


@pytest.mark.parametrize("outcome", [JobState.DONE, JobState.WAITING, JobState.DEAD])
def test_what_is_discarded_while_it_runs_stays_so(run: Run, outcome: JobState) -> None:
    """Nothing is written of how it ended, and the next of its queue is run at once."""
    add(run, job("a", at=1), job("b", at=2))
    [held] = claim(run)
    assert moved(run, JobMove.DISCARD, held.id) == [held.id]
    assert claim(run, "another") == [], "the queue is held as long as it runs"
    assert finish(run, held, outcome, after_s=60) == [held.id]
    row = rows(run)[held.id]
    assert (row.state, row.failures) == ("discarded", 0)
    assert [each.key for each in claim(run)] == ["b"]


def test_what_is_repeated_after_that_runs_once_more(run: Run) -> None:
    """How the first run ended isn't taken for the second."""
    add(run, job("a"))
    [held] = claim(run)
    moved(run, JobMove.DISCARD, held.id)
    assert moved(run, JobMove.REPEAT, held.id) == [held.id]
    assert claim(run, "another") == []
    assert finish(run, held, JobState.DONE) == [held.id]
    [again] = claim(run)
    assert (again.id, again.runs, again.attempts) == (held.id, 1, 0)
    assert finish(run, again, JobState.DONE) == []
    assert rows(run)[held.id].state == "done"


def test_what_runs_is_not_repeated(run: Run) -> None:
    """It does so already; nor is what stands behind it run beside it."""
    add(run, job("a", at=1), job("b", at=2))
    [held] = claim(run)
    assert moved(run, JobMove.REPEAT, held.id) == []
    assert moved(run, JobMove.REPEAT, held.id + 1) == [held.id + 1]
    assert claim(run, "another") == []
    assert finish(run, held, JobState.DONE) == []


def test_what_its_holder_lost_is_repeated(run: Run) -> None:
    """And whoever comes back to it writes nothing."""
    add(run, job("a"))
    [lost] = run(lambda store: store.jobs.claim("gone", {"one": 10}, -1))
    assert moved(run, JobMove.REPEAT, lost.id) == [lost.id]
    assert finish(run, lost, JobState.DONE, "gone") == [lost.id]
    assert [(each.id, each.losses) for each in claim(run)] == [(lost.id, 0)]


def test_after_a_failure_it_is_repeated_at_once(run: Run) -> None:
    """With all attempts before it, at its place, as the same run."""
    add(run, job("a", at=1), job("b", at=2))
    [held] = claim(run)
    finish(run, held, JobState.WAITING, after_s=3600)
    assert claim(run) == []
    assert moved(run, JobMove.REPEAT, held.id) == [held.id]
    [again] = claim(run)
    assert (again.key, again.failures, again.attempts, again.runs) == ("a", 0, 0, 0)


def test_discarded_after_a_failure_the_next_runs_at_once(run: Run) -> None:
    """It doesn't wait for the attempt that isn't made any more."""
    add(run, job("a", at=1), job("b", at=2))
    [held] = claim(run)
    finish(run, held, JobState.WAITING, after_s=3600)
    assert moved(run, JobMove.DISCARD, held.id) == [held.id]
    assert [each.key for each in claim(run)] == ["b"]


def test_a_dead_job_is_repeated_at_once(run: Run) -> None:
    """Though its queue waits for another attempt; the order in the queue is kept."""
    add(run, job("a", at=1), job("b", at=2))
    [dead] = claim(run)
    finish(run, dead, JobState.DEAD)
    [failing] = claim(run)
    finish(run, failing, JobState.WAITING, after_s=3600)
    assert moved(run, JobMove.REPEAT, dead.id) == [dead.id]
    [first] = claim(run)
    assert first.key == "b"
    finish(run, first, JobState.DONE)
    assert [each.key for each in claim(run)] == ["a"]


def test_what_cannot_move_leaves_its_line_alone(run: Run) -> None:
    """A job that is done isn't discarded, and whoever fails beside it still waits."""
    add(run, job("a", at=1), job("b", at=2))
    [done] = claim(run)
    finish(run, done, JobState.DONE)
    [failing] = claim(run)
    finish(run, failing, JobState.WAITING, after_s=3600)
    assert moved(run, JobMove.DISCARD, done.id, 4711) == []
    assert claim(run) == []


def test_many_move_at_once_and_each_once(run: Run) -> None:
    """Named twice, or in several states."""
    add(run, *(job(key, queue_key=f"user:{key}") for key in "abcd"))
    held = {each.key: each for each in claim(run)}
    finish(run, held["a"], JobState.DONE)
    finish(run, held["b"], JobState.DEAD)
    finish(run, held["c"], JobState.WAITING, after_s=60)
    ids = [each.id for each in held.values()]
    some = sorted(held[key].id for key in "abc")
    assert moved(run, JobMove.REPEAT, *ids, *ids) == some
    assert {each.runs for each in rows(run).values() if each.id in some} == {0, 1}
    assert moved(run, JobMove.DISCARD, *ids, *ids) == sorted(ids)
    assert moved(run, JobMove.DISCARD, *ids) == []


def test_many_repeated_jobs_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if they need several transactions, and in whatever order you name them. `Created` is
    the first again."""
    monkeypatch.setattr("logto_webhooks.admin.AT_ONCE", 2)
    logto = on_sqlite(tmp_path)
    host = logto.database.host

    def run(work: Callable[[Store], T]) -> T:
        return asyncio.run(host.run(work))

    asyncio.run(logto.migrate())
    created = replace(job("created", at=None), is_first=True)
    add(run, *(job(f"updated {number}", at=None) for number in range(4)), created)
    keys = []
    for again in (False, True):
        while held := claim(run):
            keys += [each.key for each in held]
            finish(run, held[0], JobState.DEAD)
        if not again:
            assert asyncio.run(logto.retry_jobs([2, 5, 4, 1, 3])) == 5
    assert keys == 2 * ["created", *(f"updated {number}" for number in range(4))]
    asyncio.run(logto.close())


def test_what_is_repeated_is_never_too_old(tmp_path: Path) -> None:
    """Who repeats a job knows its age. A new one is discarded for it."""
    logto = on_sqlite(tmp_path)
    ran: list[bool] = []

    @logto.on(events.UserCreated, name="soon", max_age=60)
    def note(delivery: Delivery) -> None:
        ran.append(delivery.replayed)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        old = make.user_created(id="ana", at=soon() - 3_600_000)
        await logto.database.host.run(lambda store: store.set_installed_at(0))
        await send(client, old)
        [row] = await until_all(all_over(1), logto)
        assert row.state == "discarded"
        assert await logto.retry_jobs([row.id]) == 1
        await eventually(lambda: has_run(logto))

    async def has_run(logto: LogtoWebhooks) -> bool:
        return [row.state for row in await logto.jobs()] == ["done"]

    live(logto, body)
    assert ran == [True]


def test_a_job_that_is_run_again_has_the_event_of_then(tmp_path: Path) -> None:
    """Its date is that of Logto, not that of the second run, also for a member that is derived."""
    logto = on_sqlite(tmp_path)
    dates: list[tuple[str, int]] = []

    @logto.on(events.UserCreated, events.OrganizationUserAdded, name="dates")
    def note(event: events.Event, delivery: Delivery) -> None:
        assert event.created_at is not None
        assert to_millis(event.created_at) == delivery.occurred_at
        dates.append((event.event, delivery.occurred_at))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        at = soon()
        joins = make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=at + 1)
        await send(client, make.user_created(id="ana", at=at), joins)
        rows = await until_all(all_over(2), logto)
        assert await logto.retry_jobs([row.id for row in rows]) == 2
        await eventually(lambda: count_dates(4))
        assert sorted(dates) == 2 * [("Organization.User.Added", at + 1)] + 2 * [
            ("User.Created", at)
        ]

    async def count_dates(count: int) -> bool:
        return len(dates) == count

    live(logto, body)


def test_all_dead_jobs_of_a_handler_are_moved_in_short_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There can be millions: no transaction lists them all, and none reads their errors."""
    monkeypatch.setattr("logto_webhooks.admin.AT_ONCE", 3)
    logto = on_sqlite(tmp_path)
    host = logto.database.host
    read: list[str] = []

    async def live() -> None:
        await logto.migrate()
        await host.run(lambda store: store.jobs.add([job(f"{n}", f"user:{n}") for n in range(10)]))
        held = await host.run(lambda store: store.jobs.claim("t", {"one": 10}, 60))
        dead = [ended(each.id, each.queue_key_id, JobState.DEAD) for each in held]
        await host.run(lambda store: store.jobs.finish("t", dead))
        sa.event.listen(sa.Engine, "before_cursor_execute", note)
        sa.event.listen(sa.Engine, "begin", begin)
        try:
            assert await logto.retry_jobs(handler="one") == 10
            assert await logto.discard_jobs(handler="one", state="waiting") == 10
            assert await logto.discard_jobs(handler="one") == 0
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", note)
            sa.event.remove(sa.Engine, "begin", begin)
        await logto.close()

    def begin(_: object) -> None:
        read.append("begin")

    def note(_: object, __: object, statement: str, *more: object) -> None:
        if statement.startswith("SELECT") and "FROM logto_jobs" in statement:
            read.append(statement)

    asyncio.run(live())
    assert not [statement for statement in read if "error" in statement]
    lists = [place for place, statement in enumerate(read) if "LIMIT" in statement]
    assert len(lists) == 5 + 5 + 1
    assert all(read[place - 1] == "begin" for place in lists)


def test_groups_of_jobs_are_counted_page_by_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a page of tracebacks is in memory."""
    monkeypatch.setattr("logto_webhooks.cli.jobs.AT_ONCE", 4)
    logto = on_sqlite(tmp_path)
    host = logto.database.host
    large = sa.update(jobs).values(state="dead", error="x" * 100_000 + "\nValueError: no")

    async def live() -> list[dict[str, object]]:
        await logto.migrate()
        await host.run(lambda store: store.jobs.add([job(f"{n}", f"user:{n}") for n in range(40)]))
        await host.run(lambda store: store.connection.execute(large).rowcount)
        await count_groups(logto, JobFilter())
        tracemalloc.start()
        try:
            groups = await count_groups(logto, JobFilter())
            assert tracemalloc.get_traced_memory()[1] < 20 * 100_000
        finally:
            tracemalloc.stop()
        await logto.close()
        return groups

    assert asyncio.run(live()) == [
        {"handler": "one", "state": "dead", "error": "ValueError: no", "jobs": 40}
    ]


def test_jobs_are_found_by_ids(run: Run) -> None:
    """Those that there are."""
    add(run, *(job(key) for key in "abc"))
    found = run(lambda store: store.jobs.find(JobFilter(ids=(3, 1, 99))))
    assert [each.id for each in found] == [3, 1]
    assert run(lambda store: store.jobs.find(JobFilter(ids=()))) == []


@pytest.mark.postgres
def test_who_repeats_waits_for_who_ends_the_queue() -> None:
    """Else the queue would be gone, and nobody would wake it (PostgreSQL)."""
    engine = postgres.sync_engine().execution_options(
        schema_translate_map={None: postgres.emptied_schema()}
    )
    with engine.begin() as connection:
        JobStore(connection).add([job("dead", at=1), job("last", at=2)])
        [first] = JobStore(connection).claim("t", {"one": 1}, 60)
        JobStore(connection).finish("t", [ended(first.id, first.queue_key_id, JobState.DEAD)])
        [last] = JobStore(connection).claim("t", {"one": 1}, 60)
    begun = threading.Event()

    def repeat() -> list[int]:
        with engine.begin() as connection:
            begun.set()
            return JobStore(connection).move([first.id], JobMove.REPEAT)

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as connection:
            JobStore(connection).finish("t", [ended(last.id, last.queue_key_id, JobState.DONE)])
            repeated = pool.submit(repeat)
            assert begun.wait(10)
            until_one_waits(engine)
        assert repeated.result(10) == [first.id]
    with engine.begin() as connection:
        assert [each.id for each in JobStore(connection).claim("t", {"one": 1}, 60)] == [first.id]


def ended(number: int, line: int, state: JobState) -> JobOutcome:
    return JobOutcome(id=number, queue_key_id=line, state=state, failed=state is JobState.DEAD)


def until_one_waits(engine: sa.Engine) -> None:
    """For a lock of this schema; whoever runs beside this test has another."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :q"
    named = {"q": f"%{postgres.schema()}%"}

    def one_waits() -> bool:
        with engine.connect() as connection:
            return bool(connection.scalar(sa.text(query), named))

    until(one_waits)


@pytest.mark.postgres
def test_what_a_discarded_handler_wrote_is_rolled_back() -> None:
    """And the next of its queue runs as soon as it has returned (PostgreSQL)."""
    url = postgres.server_url().render_as_string(hide_password=False)
    schema = postgres.emptied_schema()
    with postgres.sync_engine().begin() as connection:
        connection.execute(sa.text(f"DROP TABLE IF EXISTS {schema}.notes"))
        connection.execute(sa.text(f"CREATE TABLE {schema}.notes (delivery bigint)"))
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, database_url=url, schema=schema)
    begun, go_on = asyncio.Event(), asyncio.Event()

    @logto.on(events.UserDataUpdated, name="writes")
    async def writes(delivery: Delivery, connection: AsyncConnection) -> None:
        note = sa.text(f"INSERT INTO {schema}.notes VALUES (:delivery)")
        await connection.execute(note, {"delivery": delivery.id})
        begun.set()
        await go_on.wait()

    async def run() -> None:
        async with logto.lifespan():
            bodies = [make.user_data_updated(id="ana", name=name).body for name in "ab"]
            new = [delivered(body) for body in bodies]
            await logto.database.host.run(lambda store: store.add(new))
            async with asyncio.timeout(20):
                await begun.wait()
            [first] = await logto.jobs(JobFilter(delivery_id=1))
            assert await logto.retry_jobs([first.id]) == 0, "it runs just now"
            assert await logto.discard_jobs([first.id]) == 1
            go_on.set()
            done = JobFilter(handler="writes", state="done")
            await eventually(lambda: logto.jobs(done), lambda rows: len(rows) == 1)
            assert [each.state for each in await logto.jobs(JobFilter(id=first.id))] == [
                "discarded"
            ]
        await logto.close()

    asyncio.run(run())
    with postgres.sync_engine().connect() as connection:
        notes = connection.scalars(sa.text(f"SELECT delivery FROM {schema}.notes"))
        assert list(notes) == [2]
