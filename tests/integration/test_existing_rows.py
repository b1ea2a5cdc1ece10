"""A handler that is run for the rows that were here before it: on every store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import msgspec
import pytest
import sqlalchemy as sa

from logto_webhooks import Delivery, ExistingRows, LogtoWebhooks, admin, events
from logto_webhooks.apply import batch
from logto_webhooks.apply.membership_steps import MembershipAnnouncer
from logto_webhooks.database import runner
from logto_webhooks.database.mirror import RowFilter
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import jobs as jobs_table
from logto_webhooks.database.store import Store
from logto_webhooks.errors import HandlerUnknown, NotForRows, SettingInvalid, TimedOut
from logto_webhooks.handlers import existing
from logto_webhooks.handlers.existing import Pacer, find_handler, run_for_existing
from logto_webhooks.jobs import JobFilter, JobState, RegisteredHandler
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.conftest import Run
from tests.integration.test_first_installation import Past
from tests.support import postgres
from tests.support.fake import application
from tests.support.jobs import claim, finish
from tests.support.mounted import all_over, live, on_postgres, on_sqlite, send, until
from tests.support.stores import ALL, Copy, StoreKind, WrappedRunner, open_host
from tests.support.waiting import eventually

T = TypeVar("T")
T0 = 1_795_485_335_917
DAY_MS = 86_400_000
NEW = RegisteredHandler(name="new", patterns=("Local*",))
USERS_ONLY = RegisteredHandler(name="users", patterns=("LocalUserCreated", "User.*"))
MEMBERS = RegisteredHandler(name="members", patterns=("LocalMember*",))
ORGANIZATIONS = RegisteredHandler(name="organizations", patterns=("LocalOrganization*",))
LOGTO = RegisteredHandler(name="logto", patterns=("*",))
BEFORE = (
    make.user_created(id="ana", email="ana@example.com", at=T0),
    make.user_created(id="bo", email="bo@example.org", at=T0 + DAY_MS),
    make.user_created(id="cy", email="cy@example.com", at=T0 + DAY_MS),
    make.user_deleted(id="cy", at=T0 + 2 * DAY_MS),
    make.organization_created(id="acme", name="Acme", at=T0),
    make.organization_created(id="beta", name="Beta", at=T0 + DAY_MS),
    make.organization_membership_updated(id="acme", addedUserIds=["ana", "bo"], at=T0 + DAY_MS),
    make.organization_membership_updated(id="beta", addedUserIds=["ana"], at=T0 + DAY_MS + 1),
    make.organization_membership_updated(id="beta", removedUserIds=["ana"], at=T0 + 2 * DAY_MS),
    make.organization_membership_updated(id="beta", addedUserIds=["unknown"], at=T0 + DAY_MS),
)


class Told(msgspec.Struct, frozen=True, order=True):
    """A job of a local event."""

    event: str
    subject: str
    source: str
    organization: str | None = None


def take(host: TransactionRunner, *sent: SignedRequest) -> None:
    asyncio.run(Copy(host).take([request.body for request in sent]))


def register(run: Run, *handlers: RegisteredHandler) -> None:
    run(lambda store: store.jobs.register(handlers))
    run(lambda store: store.set_installed_at(0))


def execute(
    host: TransactionRunner, name: str = "new", *, dry_run: bool = False, **wanted: Any
) -> list[ExistingRows]:
    async def body() -> list[ExistingRows]:
        handler = await host.read(partial(find_handler, name=name))
        return await run_for_existing(
            host,
            handler,
            RowFilter(**wanted),
            Pacer(1_000_000),
            dry_run=dry_run,
            progressed=lambda *progress: None,
        )

    return asyncio.run(body())


def told(run: Run, handler: str = "new") -> list[Told]:
    """All local events for which the handler has had a job, in the order of the jobs."""
    query = sa.select(jobs_table).where(jobs_table.c.handler == handler).order_by(jobs_table.c.id)
    rows = run(lambda store: store.execute(query.where(jobs_table.c.payload.is_not(None))).all())
    found = []
    for row in rows:
        payload = msgspec.json.decode(row.payload)
        where = payload.get("organization_id")
        found.append(Told(row.event, row.subject, payload["source"], where))
    return found


ALL_HERE = [
    Told("LocalUserCreated", "user:ana", "existing"),
    Told("LocalUserCreated", "user:bo", "existing"),
    Told("LocalOrganizationCreated", "organization:acme", "existing"),
    Told("LocalOrganizationCreated", "organization:beta", "existing"),
    Told("LocalMemberAdded", "user:ana", "existing", "acme"),
    Told("LocalMemberAdded", "user:bo", "existing", "acme"),
]


def counts(results: list[ExistingRows]) -> list[tuple[int, int, int]]:
    return [(result.rows, result.jobs, result.skipped) for result in results]


class TestOnce:
    @pytest.fixture(autouse=True)
    def before(self, host: TransactionRunner, run: Run) -> None:
        """Rows that are here before any handler."""
        take(host, *BEFORE)
        register(run, NEW)

    def test_each_row_that_is_here(self, host: TransactionRunner, run: Run) -> None:
        """Not deleted users, ended memberships, or those of users who aren't here."""
        assert counts(execute(host, dry_run=True)) == [(2, 2, 0)] * 3
        assert told(run) == []
        assert counts(execute(host)) == [(2, 2, 0)] * 3
        assert told(run) == ALL_HERE
        assert counts(execute(host, dry_run=True)) == [(2, 0, 2)] * 3
        assert counts(execute(host)) == [(2, 0, 2)] * 3
        assert told(run) == ALL_HERE

    @pytest.mark.parametrize("ordered", [True, False])
    def test_whatever_became_of_the_job(
        self, ordered: bool, host: TransactionRunner, run: Run
    ) -> None:
        """A job that is done or dead isn't made again."""
        register(run, RegisteredHandler(name="it", patterns=("LocalUser*",), ordered=ordered))
        execute(host, "it")
        for job, state in zip(
            claim(run, names=("it",)), (JobState.DONE, JobState.DEAD), strict=True
        ):
            finish(run, job, state)
            assert counts(execute(host, "it")) == [(2, 0, 2)]

    def test_another_handler_is_told_for_itself(self, host: TransactionRunner, run: Run) -> None:
        register(run, USERS_ONLY)
        execute(host)
        assert counts(execute(host, "users")) == [(2, 2, 0)]
        assert told(run, "users") == ALL_HERE[:2]

    def test_in_pages(
        self, host: TransactionRunner, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However few rows are in one."""
        monkeypatch.setattr(existing, "PAGE", 1)
        assert counts(execute(host)) == [(2, 2, 0)] * 3
        assert told(run) == ALL_HERE

    def test_not_what_it_was_told_when_it_came(self, host: TransactionRunner, run: Run) -> None:
        """Neither who came, nor who came back, nor who joined twice; and what comes afterwards is
        told as ever."""
        take(
            host,
            make.user_created(id="dan", at=T0 + 3 * DAY_MS),
            make.organization_membership_updated(
                id="acme", addedUserIds=["dan"], at=T0 + 3 * DAY_MS
            ),
        )
        live_ones = [
            Told("LocalUserCreated", "user:dan", "webhook"),
            Told("LocalMemberAdded", "user:dan", "webhook", "acme"),
        ]
        assert told(run) == live_ones
        assert counts(execute(host)) == [(3, 2, 1), (2, 2, 0), (3, 2, 1)]
        assert told(run) == [*live_ones, *ALL_HERE]
        for number, change in enumerate(["removedUserIds", "addedUserIds"], 4):
            fields: dict[str, Any] = {change: ["dan", "bo"], "at": T0 + number * DAY_MS}
            take(host, make.organization_membership_updated(id="acme", **fields))
        rejoined = [Told("LocalMemberAdded", f"user:{name}", "webhook", "acme") for name in "bd"]
        names = sorted(each.subject for each in told(run)[-2:])
        assert (names, len(rejoined)) == (["user:bo", "user:dan"], 2)
        assert told(run)[-1].event == told(run)[-2].event == "LocalMemberAdded"
        assert counts(execute(host)) == [(3, 0, 3), (2, 0, 2), (3, 0, 3)]

    def test_who_was_deleted_before_is_restored(self, host: TransactionRunner, run: Run) -> None:
        """Whoever comes back is told once, live or as existing."""
        back = make.user_created(id="cy", at=T0 + 5 * DAY_MS)
        take(host, back)
        assert told(run) == [Told("LocalUserCreated", "user:cy", "webhook")]
        assert counts(execute(host))[0] == (3, 2, 1)
        register(run, USERS_ONLY)
        execute(host, "users")
        query = sa.select(jobs_table.c.payload).where(
            jobs_table.c.handler == "users", jobs_table.c.subject == "user:cy"
        )
        [payload] = run(lambda store: store.execute(query).scalars().all())
        assert msgspec.json.decode(payload)["restored"] is True

    def test_before_what_waits_for_its_user(self, host: TransactionRunner, run: Run) -> None:
        """`LocalUserCreated` is the first of its queue, `LocalMemberAdded` the last."""
        take(host, make.user_data_updated(id="ana", name="Anna", at=T0 + 3 * DAY_MS))
        execute(host)
        order = []
        while held := [job for job in claim(run, names=("new",)) if job.subject == "user:ana"]:
            order += [job.event for job in held]
            finish(run, held[0], JobState.DONE)
        assert order == ["LocalUserCreated", "LocalUserUpdated", "LocalMemberAdded"]

    @pytest.mark.parametrize(
        ("wanted", "selected"),
        [
            ({"user": "ana"}, ["u:ana", "m:acme:ana"]),
            ({"user": "nobody"}, []),
            ({"email": "@EXAMPLE.com"}, ["u:ana", "m:acme:ana"]),
            ({"email": "%"}, []),
            ({"organization": "acme"}, ["u:ana", "u:bo", "o:acme", "m:acme:ana", "m:acme:bo"]),
            ({"organization": "beta"}, ["o:beta"]),
            ({"organization": "acme", "user": "bo"}, ["u:bo", "m:acme:bo"]),
            ({"since": T0 + 1}, ["u:bo", "o:beta", "m:acme:bo"]),
            ({"until": T0 + DAY_MS - 1000}, ["u:ana", "o:acme", "m:acme:ana"]),
            ({"since": T0 + 1, "until": T0 + 2}, []),
        ],
        ids=str,
    )
    def test_filters_are_combined(
        self, wanted: dict[str, Any], selected: list[str], host: TransactionRunner, run: Run
    ) -> None:
        """An organization selects its members; what selects users selects no organizations."""
        execute(host, **wanted)
        names = []
        for each in told(run):
            where = f"{each.organization}:" if each.organization else ""
            kind = {"LocalUserCreated": "u", "LocalMemberAdded": "m"}.get(each.event, "o")
            names.append(f"{kind}:{where}{each.subject.partition(':')[2]}")
        assert names == selected

    def test_only_registered_handlers_of_such_events(
        self, host: TransactionRunner, run: Run
    ) -> None:
        """The error says which there are, or which events can be."""
        tests = RegisteredHandler(name="tests", patterns=("Local*", "*"), tests="only")
        register(run, LOGTO, ORGANIZATIONS, tests)
        with pytest.raises(HandlerUnknown, match=r"new \(did you mean this\?\), logto, organiz"):
            execute(host, "neww")
        for name in ("logto", "tests"):
            with pytest.raises(NotForRows, match="LocalUserCreated, LocalOrganizationCreated or"):
                execute(host, name)
        with pytest.raises(SettingInvalid, match="selects no organizations"):
            execute(host, "organizations", email="@")
        assert told(run) == []

    def test_a_handler_that_is_forgotten_meanwhile(
        self, host: TransactionRunner, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Gets no more jobs."""
        monkeypatch.setattr(existing, "PAGE", 1)
        handler = run(partial(find_handler, name="new"))

        def forget(stage: str, count: int, done: float) -> None:
            if count == 1:
                run_apart(lambda: run(lambda store: admin.forget_handler(store, "new")))

        with pytest.raises(HandlerUnknown):
            asyncio.run(
                run_for_existing(
                    host, handler, RowFilter(), Pacer(1e6), dry_run=False, progressed=forget
                )
            )
        assert len(told(run)) == 1


def run_apart(work: Callable[[], object]) -> None:
    """On a thread without an event loop."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_two_runs_at_once(kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, they make a job for each row."""
    monkeypatch.setattr(existing, "PAGE", 3)
    host = open_host(kind, tmp_path)

    async def body() -> None:
        users = [make.user_created(id=f"u{number:02}", at=T0).body for number in range(30)]
        await Copy(host).take(users)
        await host.run(lambda store: store.jobs.register([USERS_ONLY]))
        results = await asyncio.gather(*(_run(host, "users") for _ in range(3)))
        assert sum(result.jobs for [result] in results) == 30
        assert all(result.rows == 30 for [result] in results)
        jobs = await host.read(lambda store: store.jobs.find(JobFilter(limit=ALL)))
        assert len({job.subject for job in jobs}) == len(jobs) == 30
        await host.close()

    asyncio.run(body())


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg", "psycopg"])
def test_members_that_leave_and_join_meanwhile(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is first: each change is told, and who is told of as existing leaves afterwards."""
    monkeypatch.setattr(existing, "PAGE", 1)
    host, count = open_host(kind, tmp_path), 40
    names = [f"u{number:02}" for number in range(count)]

    async def body() -> None:
        copy = Copy(host)
        created = [make.user_created(id=name, at=T0).body for name in names]
        acme = make.organization_created(id="acme", at=T0).body
        joined = make.organization_membership_updated(id="acme", addedUserIds=names, at=T0 + 1)
        await copy.take([*created, acme, joined.body])
        await host.run(lambda store: store.jobs.register([MEMBERS]))
        await host.run(lambda store: store.set_installed_at(0))

        async def leave_and_join() -> None:
            for number, name in enumerate(names):
                for change in ("removedUserIds", "addedUserIds"):
                    at = T0 + (number + 1) * 1000 + (500 if change == "addedUserIds" else 0)
                    fields: dict[str, Any] = {change: [name], "at": at}
                    told = make.organization_membership_updated(id="acme", **fields)
                    await copy.take([told.body])

        await asyncio.gather(leave_and_join(), _run(host, "members"))

    asyncio.run(body())
    query = sa.select(jobs_table).order_by(jobs_table.c.order_at, jobs_table.c.id)
    rows = asyncio.run(host.read(lambda store: store.execute(query).all()))
    lives: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        source = msgspec.json.decode(row.payload)["source"]
        lives.setdefault(row.subject, []).append((row.event, source))
    left, back = ("LocalMemberRemoved", "webhook"), ("LocalMemberAdded", "webhook")
    here = ("LocalMemberAdded", "existing")
    assert len(lives) == count
    for life in lives.values():
        assert life in ([here, left, back], [left, back])
    asyncio.run(host.close())


async def _run(host: TransactionRunner, name: str) -> list[ExistingRows]:
    handler = await host.read(partial(find_handler, name=name))
    return await run_for_existing(
        host, handler, RowFilter(), Pacer(1e6), dry_run=False, progressed=lambda *_: None
    )


@pytest.mark.parametrize("few", [500, 0])
def test_a_backfill_with_an_applications_handlers(
    few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are known before it has started, and run for all that Logto had before, also if members
    are announced step by step."""
    monkeypatch.setattr(batch, "FEW", few)
    ran: list[tuple[str, str]] = []

    async def body() -> None:
        clock = Past()
        async with FakeLogto(now=clock.now) as fake:
            acme = fake.create_organization(name="Acme")["id"]
            people = [fake.create_user()["id"] for _ in range(2)]
            fake.add_members(acme, people)
            logto = application("sqlite", tmp_path, fake)
            await logto.migrate()
            logto.handlers = type(logto.handlers)()

            @logto.on("Local*", name="all")
            def all_(event: events.LocalEvent, delivery: Delivery) -> None:
                assert event.source == "backfill"
                ran.append((delivery.event, delivery.subject))

            clock.behind = 0
            await logto.backfill(run_handlers=True)
            async with logto.lifespan():
                await eventually(lambda: _now(ran), lambda told: len(told) >= 5)
                assert [each.jobs for each in await logto.run_handler("all")] == [0, 0, 0]
            assert sorted(ran) == sorted(
                [
                    ("LocalOrganizationCreated", f"organization:{acme}"),
                    *(("LocalUserCreated", f"user:{person}") for person in people),
                    *(("LocalMemberAdded", f"user:{person}") for person in people),
                ]
            )

    asyncio.run(body())


async def _now(ran: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return ran


@pytest.mark.parametrize("is_told_later", [True, False])
def test_members_that_are_announced_step_by_step(
    is_told_later: bool, host: TransactionRunner, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told once: by the worker that announces them, or as existing if it tells nobody."""
    monkeypatch.setattr(batch, "FEW", 0)
    register(run, NEW)
    if not is_told_later:
        run(lambda store: store.set_installed_at(T0 + 10 * DAY_MS))
    take_only_step(
        host,
        make.user_created(id="ana", at=T0),
        make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=T0 + 1),
    )
    take_only_step(host, make.organization_created(id="acme", at=T0 + 2))
    assert "acme" in {arrival.key.id for arrival in run(partial(Store.arrivals, limit=2))}
    execute(host)
    announcer = MembershipAnnouncer(host, lambda report: None, 1.0)

    async def announce() -> None:
        while await host.read(partial(Store.arrivals, limit=1)):
            announcer._look_at = 0.0
            await announcer.step()

    asyncio.run(announce())
    execute(host)
    members = [each for each in told(run) if each.event == "LocalMemberAdded"]
    source = "webhook" if is_told_later else "existing"
    assert members == [Told("LocalMemberAdded", "user:ana", source, "acme")]


def take_only_step(host: TransactionRunner, *sent: SignedRequest) -> None:
    """Apply deliveries, but announce nothing."""
    copy = Copy(host)
    copy.worker._membership_announcer._look_at = float("inf")
    asyncio.run(copy.take([request.body for request in sent]))


@pytest.mark.postgres
def test_a_locked_record_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a statement of ours waits for a lock (PostgreSQL)."""
    monkeypatch.setattr(runner, "OPEN_S", 0.2)

    class Unlocking(WrappedRunner):
        """Ends the other transaction when it was waited for in vain."""

        timed_out = 0

        async def run(self, work: Callable[[Store], T]) -> T:
            try:
                return await super().run(work)
            except TimedOut:
                self.timed_out += 1
                other.rollback()
                raise

    async def body() -> None:
        host = Unlocking(open_host("asyncpg", tmp_path))
        await Copy(host).take([BEFORE[0].body])
        await host.run(lambda store: store.jobs.register([USERS_ONLY]))
        handler = await host.read(partial(find_handler, name="users"))
        other.execute(sa.text(f"SELECT 1 FROM {postgres.schema()}.logto_records FOR UPDATE"))
        [result] = await run_for_existing(
            host, handler, RowFilter(), Pacer(1e6), dry_run=False, progressed=lambda *_: None
        )
        assert (result.rows, result.jobs, host.timed_out) == (1, 1, 1)
        await host._host.close()

    with postgres.sync_engine().connect() as other:
        asyncio.run(body())


def test_rows_that_cannot_be_counted_in_time_get_their_jobs(tmp_path: Path) -> None:
    """The count is only for the progress, which then shows no share."""

    class Slow(WrappedRunner):
        async def read_long(self, work: Callable[[Store], T]) -> T:
            raise TimedOut(problem="as with millions of rows")

    host = open_host("sqlite", tmp_path)
    progress: list[tuple[Any, ...]] = []

    async def body() -> list[ExistingRows]:
        await Copy(host).take([request.body for request in BEFORE])
        await host.run(lambda store: store.jobs.register([USERS_ONLY]))
        return await run_for_existing(
            Slow(host),
            USERS_ONLY,
            RowFilter(),
            Pacer(1e6),
            dry_run=False,
            progressed=lambda *told: progress.append(told),
        )

    [result] = asyncio.run(body())
    asyncio.run(host.close())
    assert (result.rows, result.jobs) == (2, 2)
    assert [told[1:] for told in progress] == [(0, 0.0), (2, 0.0)]


class TestPace:
    class Clock:
        """Time passes only while somebody sleeps."""

        now = 100.0

        def __init__(self) -> None:
            self.slept: list[float] = []

        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

    @pytest.mark.parametrize(("rate", "at_once"), [(0.5, 1), (7, 7), (7.9, 7), (10_000, 200)])
    def test_no_more_than_the_rate(self, rate: float, at_once: int) -> None:
        """Of what is done; what is skipped costs no time."""
        clock = self.Clock()
        pacer = Pacer(rate, lambda: clock.now, clock.sleep)
        assert pacer.at_once == at_once

        async def work() -> None:
            for _ in range(5):
                await pacer.wait()
                pacer.spend(at_once)
            await pacer.wait()
            for _ in range(5):
                await pacer.wait()
                pacer.spend(0)

        asyncio.run(work())
        assert clock.now - 100.0 == pytest.approx(5 * at_once / rate)

    @pytest.mark.parametrize("rate", [0, 0.0009, -1, float("nan"), float("inf"), "7", True, None])
    def test_what_is_no_rate_is_refused(self, rate: Any) -> None:
        with pytest.raises(SettingInvalid, match=r"isn't a number of at least 0\.001"):
            Pacer(rate)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_application_runs_its_own_handler(kind: str, tmp_path: Path) -> None:
    """Registered after the rows exist. It runs once for each, and is told why."""
    logto = on_sqlite(tmp_path) if kind == "sqlite" else on_postgres()
    ran: list[tuple[str, str, str]] = []

    async def receive(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        users = [make.user_created(id=name, email=f"{name}@example.com") for name in ("ana", "bo")]
        await send(client, *users)
        await eventually(logto.status, lambda status: status.deliveries["done"] == 2)

    live(logto, receive)

    @logto.on(events.LocalUserCreated, name="welcome")
    async def welcome(event: events.LocalUserCreated, delivery: Delivery) -> None:
        ran.append((event.user.logto_user_id, event.source, delivery.origin))

    async def run_it(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        progress: list[tuple[str, int, float]] = []
        await logto.forget_handler("welcome")  # as before the new release has started
        [dry] = await logto.run_handler("welcome", dry_run=True)
        assert (dry.rows, dry.jobs) == (2, 2)
        assert await logto.known_handlers() == []
        [done] = await logto.run_handler("welcome", progressed=lambda *told: progress.append(told))
        assert (done.event, done.rows, done.jobs) == ("LocalUserCreated", 2, 2)
        assert progress == [("users", 0, 0.0), ("users", 2, 1.0)]
        await until(all_over(2), logto)
        [again] = await logto.run_handler("welcome", user="ana@example.com")
        assert (again.rows, again.jobs, again.skipped) == (1, 0, 1)
        with pytest.raises(SettingInvalid, match="since"):
            await logto.run_handler("welcome", since=-1)
        with pytest.raises(HandlerUnknown, match="welcome"):
            await logto.run_handler("farewell")

    live(logto, run_it)
    assert sorted(ran) == [("ana", "existing", "here"), ("bo", "existing", "here")]


def test_a_second_job_of_a_coming_has_another_key(host: TransactionRunner, run: Run) -> None:
    """So that a handler without an order has a queue for each."""
    unordered = RegisteredHandler(name="new", patterns=("LocalMember*",), ordered=False)
    register(run, unordered)
    take(host, *BEFORE[:1], BEFORE[4])
    for number, change in enumerate(["addedUserIds", "removedUserIds", "addedUserIds"]):
        fields: dict[str, Any] = {change: ["ana"], "at": T0 + number * DAY_MS}
        take(host, make.organization_membership_updated(id="acme", **fields))
    query = sa.select(jobs_table.c.key, jobs_table.c.queue_key).order_by(jobs_table.c.id)
    first, left, second = run(lambda store: store.execute(query).all())
    assert first == ("LocalMemberAdded:user:ana:acme",) * 2
    assert second.key.startswith(f"{first.key}:")
    assert second.queue_key == second.key
    assert left.key.startswith("LocalMemberRemoved:user:ana:acme:")
    assert len(run(lambda store: store.jobs.find(JobFilter(limit=ALL)))) == 3
