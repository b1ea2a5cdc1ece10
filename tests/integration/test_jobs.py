"""Handlers and their jobs, as every store keeps them: one suite for all."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database.jobs import IN_USE_MS, Place, Queue
from logto_webhooks.database.schema import handlers, jobs, queue_keys
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import LARGE, DeliveryOutcome, DeliveryState
from logto_webhooks.jobs import (
    JobFilter,
    JobMove,
    JobOutcome,
    JobState,
    RegisteredHandler,
)
from logto_webhooks.testing import make
from tests.integration.conftest import Run
from tests.support.jobs import ONE, TWO, add, claim, finish, job
from tests.support.plans import explain
from tests.support.stores import delivery


def test_a_handler_is_for_what_each_release_wants(run: Run) -> None:
    """As long as processes of several run, and whichever starts last. Its other options are those
    of the newest."""
    newer = RegisteredHandler(name="one", patterns=("*",), tests="too")
    both = replace(newer, patterns=(*ONE.patterns, "*"))
    for registered in ([TWO, ONE], [newer], [ONE]):
        run(lambda store, registered=registered: store.jobs.register(registered))  # type: ignore[misc]
    assert run(lambda store: store.jobs.handlers()) == [both, TWO]
    for age_ms in (IN_USE_MS - 60_000, 120_000):  # then none of the older runs any more
        assert run(lambda store: store.jobs.handlers()) == [both, TWO]
        run(lambda store, age_ms=age_ms: make_older(store, ONE, age_ms))  # type: ignore[misc]
    assert run(lambda store: store.jobs.handlers()) == [newer, TWO]
    run(lambda store: store.jobs.register([ONE]))
    assert run(lambda store: store.jobs.handlers()) == [both, TWO]


def make_older(store: Store, handler: RegisteredHandler, by_ms: int) -> None:
    """As if its processes had ended earlier."""
    rows = store._connection.execute(sa.select(handlers).where(handlers.c.name == handler.name))
    [row] = [row for row in rows if row.options["patterns"] == list(handler.patterns)]
    is_it = handlers.c.definition == row.definition
    older = sa.update(handlers).where(is_it).values(seen_at=handlers.c.seen_at - by_ms)
    store._connection.execute(older)


def test_the_use_of_a_handler_is_known_when_the_clock_is_set_back(run: Run) -> None:
    """Nobody is taken for gone."""
    run(lambda store: store.jobs.register([ONE]))
    run(lambda store: make_older(store, ONE, -3_600_000))
    newer = RegisteredHandler(name="one", patterns=("*",))
    run(lambda store: store.jobs.register([newer]))
    [both] = run(lambda store: store.jobs.handlers())
    assert both.patterns == (*ONE.patterns, "*")


def test_a_release_that_ended_before_the_clock_was_set_back_is_gone(run: Run) -> None:
    """After some minutes, like any other, however far the clock was ahead."""
    ahead_ms = 30 * 86_400_000
    run(lambda store: store.jobs.register([ONE]))
    run(lambda store: store._connection.execute(set_ahead(ahead_ms)))
    run(lambda store: store.set_clock_back(ahead_ms, moved=0))
    newer = RegisteredHandler(name="one", patterns=("*",))
    run(lambda store: store.jobs.register([newer]))
    [both] = run(lambda store: store.jobs.handlers())
    assert both.patterns == (*ONE.patterns, "*")
    run(lambda store: make_older(store, ONE, IN_USE_MS + 60_000))
    run(lambda store: store.jobs.register([newer]))
    assert run(lambda store: store.jobs.handlers()) == [newer]


def set_ahead(by_ms: int) -> sa.Update:
    """As if the clock had been ahead when handlers were registered."""
    times = (handlers.c.registered_at, handlers.c.seen_at)
    return sa.update(handlers).values({at: at + by_ms for at in times})


def test_a_job_is_made_once(run: Run) -> None:
    """For its handler and key."""
    add(run, job("a"), job("a"))
    add(run, job("a"), job("a", handler="two"))
    assert len(run(lambda store: store.jobs.find(JobFilter()))) == 2


def test_a_line_gives_one_at_a_time_in_order(run: Run) -> None:
    """Whatever the order in which they came; other queues go on."""
    add(run, job("late", at=9), job("early", at=5), job("other", queue_key="user:bo", at=7))
    held = claim(run)
    assert sorted(each.key for each in held) == ["early", "other"]
    assert claim(run, "another") == []
    [first] = [each for each in held if each.key == "early"]
    assert finish(run, first, JobState.DONE) == []
    [second] = claim(run)
    assert (second.key, second.late) == ("late", False)
    add(run, job("older", at=1))
    finish(run, second, JobState.DONE)
    [older] = claim(run)
    assert (older.key, older.late) == ("older", True)


def test_a_failing_job_holds_back_only_its_queue(run: Run) -> None:
    """Until it is due again; dead, it lets the next go."""
    add(run, job("fails", at=1), job("next", at=2), job("other", queue_key="user:bo"))
    held = {each.key: each for each in claim(run)}
    finish(run, held["fails"], JobState.WAITING, after_s=60)
    finish(run, held["other"], JobState.DONE)
    assert claim(run) == []
    [row] = run(lambda store: store.jobs.find(JobFilter(state="waiting", event=None)))[1:]
    assert (row.failures, row.attempts) == (1, 1)


def test_a_waiting_job_tells_when_it_is_due(run: Run) -> None:
    """If it is the first of its queue, and neither over nor behind another."""
    add(run, job("fails", at=1), job("next", at=2), job("done", queue_key="user:bo"))
    held = {each.key: each for each in claim(run)}
    finish(run, held["fails"], JobState.WAITING, after_s=60)
    finish(run, held["done"], JobState.DONE)
    rows = {row.id: row for row in run(lambda store: store.jobs.find(JobFilter()))}
    fails, done = rows.pop(held["fails"].id), rows.pop(held["done"].id)
    [behind] = rows.values()
    assert done.finished_at is not None
    assert fails.due_at is not None
    assert 55_000 < fails.due_at - done.finished_at < 65_000
    assert (behind.due_at, done.due_at) == (None, None)


def test_a_dead_job_lets_the_next_go(run: Run) -> None:
    """And so does a discarded one."""
    add(run, job("a", at=1), job("b", at=2), job("c", at=3))
    for state in (JobState.DEAD, JobState.DISCARDED, JobState.DONE):
        [held] = claim(run)
        finish(run, held, state)
    rows = run(lambda store: store.jobs.find(JobFilter()))
    assert [row.state for row in rows] == ["done", "discarded", "dead"]
    assert claim(run) == []


def test_who_lost_a_line_writes_nothing(run: Run) -> None:
    """Its lease ended, and somebody else has it."""
    add(run, job("a"))
    [mine] = run(lambda store: store.jobs.claim("mine", {"one": 10}, -1))
    [theirs] = claim(run, "theirs")
    assert finish(run, mine, JobState.DONE, "mine") == [mine.id]
    [row] = run(lambda store: store.jobs.find(JobFilter()))
    assert row.state == "waiting"
    assert finish(run, theirs, JobState.DONE, "theirs") == []


def test_what_was_lost_comes_one_at_a_time(run: Run) -> None:
    """It may have ended its process; who has such a one in hand gets others alone."""
    add(run, *(job(key, queue_key=f"user:{key}") for key in "abc"))
    assert len(run(lambda store: store.jobs.claim("gone", {"one": 10}, -1))) == 3
    add(run, job("new", queue_key="user:new"))
    [new] = run(lambda store: store.jobs.claim("t", {"one": 10}, 60, most_losses=0))
    assert (new.key, new.losses) == ("new", 0)
    held = [claim(run) for _ in range(4)]
    assert [[each.losses for each in some] for some in held] == [[1], [1], [1], []]


def test_what_was_lost_too_often_hides_no_other(run: Run) -> None:
    """Beside a job that was lost twice, others that were wait. Free ones don't, however old those
    are, and neither does one that was lost once."""
    add(run, job("a"))
    for _ in range(2):
        run(lambda store: store.jobs.claim("gone", {"one": 1}, -1))
    for key in "bc":
        add(run, job(key, queue_key=f"user:{key}"))
    [lost] = run(lambda store: store.jobs.claim("gone", {"one": 1}, -1, most_losses=0))
    assert lost.key == "b"

    def claim_one() -> list[tuple[str, int]]:
        held = run(lambda store: store.jobs.claim("t", {"one": 1}, 60, most_losses=1))
        return [(each.key, each.losses) for each in held]

    assert sorted(each for _ in range(4) for each in claim_one()) == [("b", 1), ("c", 0)]
    [twice] = run(lambda store: store.jobs.claim("t", {"one": 1}, 60))
    assert twice.losses == 2


def test_what_is_given_back_was_never_begun(run: Run) -> None:
    """What failed did not get lost; nor did what was repeated by hand."""
    add(run, job("a"))
    [held] = claim(run)
    back = JobOutcome(
        id=held.id, queue_key_id=held.queue_key_id, state=JobState.WAITING, counts=False
    )
    run(lambda store: store.jobs.finish("t", [back]))
    for _ in range(2):
        [again] = claim(run)
        assert (again.attempts, again.losses) == (again.failures, 0)
        finish(run, again, JobState.WAITING)
    [lost] = run(lambda store: store.jobs.claim("gone", {"one": 10}, -1))
    [last] = claim(run)
    assert (lost.losses, last.losses) == (0, 1)
    finish(run, last, JobState.DEAD)
    run(lambda store: store.jobs.move([last.id], JobMove.REPEAT))
    assert [(each.attempts, each.losses) for each in claim(run)] == [(0, 0)]


def test_any_error_can_be_written(run: Run) -> None:
    """NUL and half characters, too."""
    add(run, job("a"))
    [held] = claim(run)
    outcome = JobOutcome(
        id=held.id,
        queue_key_id=held.queue_key_id,
        state=JobState.DEAD,
        error="a\0b\udc80",
        failed=True,
    )
    assert run(lambda store: store.jobs.finish("t", [outcome])) == []
    [row] = run(lambda store: store.jobs.find(JobFilter()))
    assert row.state == "dead"
    assert (row.error or "").startswith("a")


def test_only_whose_code_is_here_is_claimed(run: Run) -> None:
    """The others wait for whoever has theirs."""
    add(run, job("a"), job("b", handler="two"))
    assert [each.handler for each in claim(run, names=("two",))] == ["two"]
    assert [each.handler for each in claim(run, names=("one", "nobody"))] == ["one"]


def test_a_repeated_job_goes_to_the_end_of_its_queue(run: Run) -> None:
    """As a new run of the same."""
    add(run, job("a", at=1))
    [held] = claim(run)
    finish(run, held, JobState.DEAD)
    add(run, job("b", at=2))
    assert run(lambda store: store.jobs.move([held.id], JobMove.REPEAT)) == [held.id]
    [first] = claim(run)
    assert (first.key, first.runs) == ("b", 0)
    finish(run, first, JobState.DONE)
    [again] = claim(run)
    assert (again.id, again.key, again.runs, again.failures) == (held.id, "a", 1, 0)


def test_forgetting_a_handler_discards_what_waits_for_it(run: Run) -> None:
    """And nothing else."""
    run(lambda store: store.jobs.register([ONE, TWO]))
    add(run, job("a"), job("b", queue_key="user:bo"), job("c", handler="two"))
    assert run(lambda store: store.jobs.forget("one", 10)) == 2
    assert run(lambda store: store.jobs.handlers()) == [TWO]
    counts = {
        (each.handler, each.state): each.count for each in run(lambda store: store.jobs.counts())
    }
    assert counts == {("one", "discarded"): 2, ("two", "waiting"): 1}


def test_waiting_jobs_are_counted_without_reading_those_that_are_over(run: Run) -> None:
    """Of other handlers than some. A process does this every minute, and jobs are kept."""
    add(run, *(job(f"{n}", queue_key=f"user:{n}") for n in range(5_000)))
    over = sa.update(jobs).values(state=JobState.DONE.value, finished_at=1)
    run(lambda store: store._connection.execute(over).close())
    add(run, job("a", handler="two"), job("b", handler="two"), job("c"))
    # PostgreSQL may have statistics of the moment when all waited.
    run(lambda store: store._connection.execute(sa.text("ANALYZE")).close())
    assert run(lambda store: store.jobs.count_waiting()) == {"one": 1, "two": 2}
    assert run(lambda store: store.jobs.count_waiting(["one"])) == {"two": 2}
    [plan] = run(lambda store: explain(store, lambda store: store.jobs.count_waiting(["two"])))
    assert "logto_jobs_waiting" in plan, plan


@pytest.mark.parametrize("state", list(JobState))
def test_jobs_of_a_handler_are_listed_page_by_page(run: Run, state: JobState) -> None:
    """Each page is read from an index, in its order: nothing is read twice, and nothing sorted.
    `jobs retry --handler` lists millions so."""
    add(run, *(job(f"{n}", queue_key=f"user:{n % 5}", at=n) for n in range(500)))
    add(run, *(job(f"{n}", handler="two") for n in range(500)))
    over = sa.update(jobs).where(jobs.c.id % 2 == 0).values(state=state.value)
    others = sa.update(jobs).where(jobs.c.id % 2 == 1).values(state=_other(state).value)
    run(lambda store: [store._connection.execute(one).rowcount for one in (over, others)])
    found: list[int] = []
    after: Place | None = None

    def list_next(store: Store) -> list[Place]:
        return store.jobs.list_places("one", state, after, 70)

    while page := run(list_next):
        assert len(page) <= 70
        found += [place[-1] for place in page]
        after = page[-1]
    assert sorted(found) == list(range(2, 501, 2))
    [plan] = run(lambda store: explain(store, list_next))
    index = "odd" if state in ("dead", "discarded") else state.value
    assert f"logto_jobs_{index}" in plan, plan
    assert "TEMP B-TREE" not in plan, plan
    assert ">(?" in plan or ">?" in plan or "Cond" in plan, plan


def _other(state: JobState) -> JobState:
    return JobState.DEAD if state is JobState.DONE else JobState.DONE


def test_missing_queues_are_found_step_by_step(run: Run) -> None:
    """A step reads some waiting jobs, from an index, and skips the rest of the last queue."""
    add(run, *(job(f"{n}", queue_key=f"user:{n // 10}") for n in range(100)))
    add(run, *(job(f"{n}", handler="two", queue_key=f"user:{n}") for n in range(9)))
    add(run, job("done", queue_key="user:over"))
    over = sa.update(jobs).where(jobs.c.key == "done").values(state="done")
    lost = sa.or_(queue_keys.c.handler == "two", queue_keys.c.queue_key.in_(["user:3", "user:7"]))
    run(lambda store: store._connection.execute(over).rowcount)
    run(lambda store: store._connection.execute(sa.delete(queue_keys).where(lost)).rowcount)
    missing: list[Queue] = []
    after: Queue | None = None
    steps = 0

    def find_next(store: Store) -> tuple[list[Queue], Queue | None]:
        return store.jobs.find_missing_queues(after, 7)

    while steps == 0 or after is not None:
        some, after = run(find_next)
        steps, missing = steps + 1, missing + some
    wanted = [("one", f"user:{n}") for n in (3, 7)] + [("two", f"user:{n}") for n in range(9)]
    assert missing == wanted
    assert steps == 10 + 2
    [plan] = run(
        lambda store: explain(store, lambda store: store.jobs.find_missing_queues(missing[0], 7))
    )
    assert "logto_jobs_waiting" in plan, plan
    assert "TEMP B-TREE" not in plan, plan
    assert "Sort" not in plan, plan
    run(lambda store: store.jobs.add_queues(missing))
    assert run(lambda store: store.jobs.find_missing_queues(None, 999)) == ([], None)


def test_a_handler_is_forgotten_step_by_step(run: Run) -> None:
    """A transaction that discards very many jobs would delay the receiver."""
    add(run, *(job(str(number), queue_key=f"user:{number % 3}") for number in range(7)))
    add(run, job("of another", handler="two"))
    assert [run(lambda store: store.jobs.forget("one", 3)) for _ in range(4)] == [3, 3, 1, 0]
    assert claim(run, names=("one",)) == []
    assert [held.key for held in claim(run)] == ["of another"]
    assert len(run(lambda store: store.jobs.find(JobFilter(state="discarded")))) == 7


def test_a_delivery_is_made_pending_again(run: Run) -> None:
    """What is over; what is pending stays as it is."""
    bodies = [make.user_created(id=user).body for user in ("ana", "bo")]
    run(lambda store: store.add([delivery(body) for body in bodies]))
    [held] = run(lambda store: store.claim("t", 1, 2**20, 60))
    run(
        lambda store: store.finish(
            "t", [DeliveryOutcome(id=held.id, state=DeliveryState.DEAD, error="x")]
        )
    )
    ids = [held.id, held.id + 1, 99]
    assert run(lambda store: store.inbox.make_pending(ids)) == 1
    assert len(run(lambda store: store.claim("t", 9, 2**20, 60))) == 2


def test_local_events_keep_their_order_when_the_clock_is_set_back(run: Run) -> None:
    """A job without a date runs after all that are in its queue, whatever their dates are."""
    ahead = run(Store.clock).now + 3_600_000
    add(run, job("done", at=ahead))
    [held] = claim(run)
    finish(run, held, JobState.DONE)
    add(run, job("waits", at=ahead + 1), job("next", at=None))
    add(run, job("last", at=None), job("older", at=1))
    assert drain(run) == [("older", True), ("waits", False), ("next", False), ("last", False)]


def test_a_repeated_job_goes_to_the_end_when_the_clock_is_set_back(run: Run) -> None:
    """It isn't late: it was repeated after the others."""
    ahead = run(Store.clock).now + 3_600_000
    add(run, job("first", at=ahead), job("second", at=ahead + 1))
    [first] = claim(run)
    finish(run, first, JobState.DEAD)
    run(lambda store: store.jobs.move([first.id], JobMove.REPEAT))
    assert drain(run) == [("second", False), ("first", False)]


def test_the_first_job_of_a_queue_runs_before_older_ones(run: Run) -> None:
    """A record's `Created` does, because it came with an event that Logto dates earlier."""
    add(run, job("registered", at=1))
    add(run, replace(job("created", at=None), is_first=True), job("other", at=None))
    assert drain(run) == [("created", False), ("registered", False), ("other", False)]


def drain(run: Run) -> list[tuple[str, bool]]:
    """Finish all jobs of a queue; return their keys, and whether they were late."""
    finished = []
    while jobs := claim(run):
        for held in jobs:
            finished.append((held.key, held.late))
            assert finish(run, held, JobState.DONE) == []
    return finished


def test_large_jobs_are_claimed_by_their_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them would not fit into memory. Small ones and other handlers don't wait for them."""
    monkeypatch.setattr("logto_webhooks.database.jobs.MOST_BYTES", 2 * LARGE + 1)
    large = [replace(job(f"l{n}", queue_key=f"l{n}"), payload=b"x" * LARGE) for n in range(5)]
    huge = replace(job("huge", handler="two", queue_key="huge"), payload=b"x" * 10 * LARGE)
    add(run, *large, huge, job("small", queue_key="small"))
    first = claim(run)
    assert sorted(held.key for held in first) == ["huge", "l0", "l1", "small"]
    assert {held.key: len(held.payload) for held in first}["huge"] == 10 * LARGE
    held_bytes = {"one": 2 * LARGE}
    assert run(lambda store: store.jobs.claim("t", {"one": 9}, 60, held_bytes=held_bytes)) == []
    assert sorted(held.key for held in claim(run)) == ["l2", "l3"]
    [last] = claim(run)
    assert (last.key, last.attempts) == ("l4", 0), "those that were postponed weren't begun"
