"""The application's own code: registered, filled, run in its own transaction, retried."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import Delivery, Discard, LogtoWebhooks, RetryLater, UserRow, events
from logto_webhooks.database import deliveries, records, schema
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter, DeliveryState, NewDelivery, identify
from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.handlers.call import HandlerCaller
from logto_webhooks.instrumentation import Stalled
from logto_webhooks.jobs import JobRow
from logto_webhooks.records.record import Key, Record
from logto_webhooks.samples.request import sign_request
from logto_webhooks.samples.shapes import console_test
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, jobs, live, on_postgres, on_sqlite, send, soon, until
from tests.support.waiting import eventually


def test_a_sync_handler_shares_the_transaction_on_sqlite(tmp_path: Path) -> None:
    """What it writes commits with "done"; what raises rolls back, and is tried again."""
    logto = on_sqlite(tmp_path)
    failures = [ValueError("not yet")]

    @logto.on(events.LocalUserCreated, waits=(0.01,))
    def greet(event: events.LocalUserCreated, session: Session) -> None:
        session.execute(sa.text("INSERT INTO greeted VALUES (:e)"), {"e": event.user.email})
        if failures:
            raise failures.pop()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        file = tmp_path / "app.db"
        with sa.create_engine(f"sqlite:///{file}", poolclass=sa.NullPool).begin() as connection:
            connection.execute(sa.text("CREATE TABLE greeted (email TEXT)"))
        await send(client, make.user_created(id="ana", email="ana@example.com", at=soon()))
        [row] = await until(all_over(1), logto)
        assert (row.state, row.attempts, row.failures) == ("done", 2, 1)
        with sa.create_engine(f"sqlite:///{file}", poolclass=sa.NullPool).begin() as connection:
            assert connection.scalars(sa.text("SELECT email FROM greeted")).all() == [
                "ana@example.com"
            ]

    live(logto, body)


@pytest.mark.postgres
def test_async_handlers_share_the_transaction_on_postgresql() -> None:
    """By session and by connection; the application's tables are where it says."""
    logto = on_postgres()
    with postgres.sync_engine().begin() as connection:
        connection.execute(sa.text("CREATE TABLE IF NOT EXISTS public.logto_greeted (email TEXT)"))
        connection.execute(sa.text("TRUNCATE public.logto_greeted"))
    table = sa.Table("logto_greeted", sa.MetaData(), sa.Column("email", sa.Text))
    failures = [ValueError("not yet")]

    @logto.on(events.LocalUserCreated, waits=(0.01,))
    async def by_session(event: events.LocalUserCreated, session: AsyncSession) -> None:
        await session.execute(sa.insert(table).values(email=event.user.email))
        if failures:
            raise failures.pop()

    @logto.on("User.Created")
    async def by_connection(event: events.UserCreated, connection: AsyncConnection) -> None:
        await connection.execute(sa.insert(table).values(email="connection"))

    @logto.on("User.Created", max_attempts=1)
    async def commits(event: events.UserCreated, connection: AsyncConnection) -> None:
        await connection.commit()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", email="ana@example.com", at=soon()))
        rows = {each.handler.rpartition(".")[2]: each for each in await until(all_over(3), logto)}
        assert {name: row.state for name, row in rows.items()} == {
            "by_session": "done",
            "by_connection": "done",
            "commits": "dead",
        }
        assert "TransactionEnded" in (rows["commits"].error or "")
        with postgres.sync_engine().begin() as connection:
            found = connection.scalars(sa.text("SELECT email FROM public.logto_greeted")).all()
        assert sorted(str(each) for each in found) == ["ana@example.com", "connection"]

    live(logto, body)


def test_parameters_are_filled(tmp_path: Path) -> None:
    """By annotation, or by name; sync handlers run beside the event loop."""
    logto = on_sqlite(tmp_path)
    told: list[Any] = []

    @logto.on("User.*", "Organization.User.Added")
    def everything(
        event: events.Event,
        delivery: Delivery,
        row: UserRow | None,
        logger: logging.LoggerAdapter[logging.Logger],
        otherwise: int = 5,
    ) -> None:
        told.append((event.event, delivery.attempt, row and row.email, otherwise))

    @logto.on("*", name="all")
    async def by_name(event, delivery, user):  # type: ignore[no-untyped-def]
        told.append(("all", delivery.idempotency_key.startswith("all:"), user is None))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        at = soon()
        await send(
            client,
            make.user_created(id="ana", email="ana@example.com", at=at),
            make.organization_membership_updated(id="o", addedUserIds=["ana"], at=at + 1),
        )
        await until(all_over(4), logto)
        assert ("User.Created", 1, "ana@example.com", 5) in told
        assert ("Organization.User.Added", 1, "ana@example.com", 5) in told
        assert told.count(("all", True, False)) == 1
        assert told.count(("all", True, True)) == 1

    live(logto, body)


@pytest.mark.parametrize(
    ("raised", "state"),
    [
        (Discard("of no use"), "discarded"),
        (SystemExit(3), "dead"),
        (RecursionError(), "dead"),
        (asyncio.CancelledError(), "dead"),
        (GeneratorExit(), "dead"),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
def test_whatever_it_raises_harms_nobody_else(
    raised: BaseException, state: str, is_async: bool, tmp_path: Path
) -> None:
    """Only its own job; the next of the same subject goes on."""
    logto = on_sqlite(tmp_path)

    def fails(event: events.UserCreated) -> None:
        raise raised

    async def fails_later(event: events.UserCreated) -> None:
        raise raised

    logto.on("User.Created", name="bad", max_attempts=1)(fails_later if is_async else fails)

    @logto.on("User.Created", name="good")
    def good(event: events.UserCreated) -> None:
        """Do nothing."""

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        rows = {each.handler: each for each in await until(all_over(2), logto)}
        assert (rows["bad"].state, rows["good"].state) == (state, "done")
        assert rows["bad"].error

    live(logto, body)


@pytest.mark.parametrize("reverse", [False, True])
def test_created_comes_before_all_else_of_its_user(reverse: bool, tmp_path: Path) -> None:
    """Logto dates a registration earlier than the row came to be here, by its own clock."""
    logto = on_sqlite(tmp_path)
    told: list[str] = []

    @logto.on("PostRegister", "User.Created", "User.Data.Updated", "LocalUser*")
    def tell(event: events.Event | events.LocalEvent) -> None:
        told.append(event.name if isinstance(event, events.LocalEvent) else event.event)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        host, now = logto.database.host, soon()
        await host.run(lambda store: store.set_installed_at(0))
        bodies = [
            make.post_register(id="ana", at=now - 5_000),
            make.user_created(id="ana", at=now - 4_999),
            make.user_data_updated(id="ana", name="Ana", at=now - 4_000, updatedAt=now - 4_000),
        ]
        for request in reversed(bodies) if reverse else bodies:
            await send(client, request)
        await eventually(logto.status, lambda status: status.deliveries["done"] == 3)
        await until(lambda rows: all_over(len(rows))(rows), logto)
        assert told[0] == "LocalUserCreated"
        assert {"PostRegister", "User.Created", "User.Data.Updated"} < set(told)

    live(logto, body)


def test_a_handler_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """Within its time limit; one that asks for later is tried later."""
    logto = on_sqlite(tmp_path)
    later = [RetryLater(0.01)]

    @logto.on("User.Created", max_attempts=1, time_limit=0.1, name="slow")
    async def slow(event: events.UserCreated) -> None:
        await asyncio.sleep(60)

    @logto.on("User.Created", name="later")
    async def asks_for_later(event: events.UserCreated) -> None:
        if later:
            raise later.pop()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        rows = {each.handler: each for each in await until(all_over(2), logto)}
        assert (rows["slow"].state, rows["later"].state) == ("dead", "done")
        assert "TimeLimitExceeded" in (rows["slow"].error or "")
        assert rows["later"].attempts == 2

    live(logto, body)


def test_what_is_older_than_the_installation_runs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Installing must not mail last week's sign-ups, nor run its tests; the log says so."""
    logto = on_sqlite(tmp_path)
    told: list[str] = []

    @logto.on("*", events.LocalUserCreated)
    def anything(event: events.Event | events.LocalUserCreated) -> None:
        told.append("anything")

    @logto.on_test()
    def test(event: events.Event) -> None:
        told.append("test")

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon() - 86_400_000))
        await send(client, make.console_test(at=soon() - 86_400_000))
        await eventually(logto.status, lambda status: not status.deliveries["pending"])
        assert await jobs(logto) == []
        assert told == []

    with caplog.at_level("INFO", logger="logto_webhooks"):
        live(logto, body)
    applied = [vars(each).get("logto", {}) for each in caplog.records]
    applied = [each for each in applied if "outcome" in each]
    assert [each["older_than_installation"] for each in applied] == [True, True]


def add_dead(store: Store, delivery: NewDelivery) -> None:
    """Add a delivery that can't be applied."""
    store.add([delivery])
    store.connection.execute(
        sa.update(schema.deliveries)
        .where(schema.deliveries.c.digest == delivery.digest)
        .values(state="dead")
    )


def test_what_comes_later_than_the_replay_window_is_applied_and_runs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A signed body may be somebody's copy. What is younger, what Logto's log brings back, and what
    is replayed by hand runs handlers."""
    logto = on_sqlite(tmp_path, replay_window_s=3 * 86_400)
    told: list[str] = []

    @logto.on(events.UserCreated, events.LocalUserCreated)
    def anything(event: events.UserCreated | events.LocalUserCreated) -> None:
        told.append(event.name if isinstance(event, events.LocalUserCreated) else "User.Created")

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        host, now = logto.database.host, soon()
        await host.run(lambda store: store.set_installed_at(0))
        await send(client, make.user_created(id="old", at=now - 4 * 86_400_000))
        await eventually(logto.status, lambda status: status.deliveries["done"] == 1)
        assert [each.row["logto_user_id"] for each in await logto.users("old")] == ["old"]
        assert await jobs(logto) == []
        [[old]] = [[each.id for each in await logto.deliveries()]]
        await logto.replay([old])
        await until(all_over(1), logto)
        await send(client, make.user_created(id="young", at=now - 2 * 86_400_000))
        await until(all_over(3), logto)
        logged = make.user_created(id="logged", at=now - 5 * 86_400_000).body
        delivery = identify(trust(logged), now, origin="log")
        await host.run(lambda store: store.add([delivery]))
        await until(all_over(5), logto)
        assert sorted(told) == ["LocalUserCreated"] * 2 + ["User.Created"] * 3
        dead = identify(trust(make.user_created(id="dead", at=now - 4 * 86_400_000).body), now)
        await host.run(lambda store: add_dead(store, dead))
        [newest] = await logto.deliveries(DeliveryFilter(state=DeliveryState.DEAD))
        assert (await logto.replay([newest.id])).jobs == 1
        await until(all_over(7), logto)
        assert sorted(told[-2:]) == ["LocalUserCreated", "User.Created"]
        [again] = [each for each in await logto.deliveries() if each.id == newest.id]
        assert (again.state, again.origin) == ("done", "replay")

    with caplog.at_level("INFO", logger="logto_webhooks"):
        live(logto, body)
    applied = [vars(each).get("logto", {}) for each in caplog.records]
    late = {each["subject"] for each in applied if each.get("later_than_replay_window")}
    assert late == {"user:old"}


def test_a_test_is_for_who_wants_it(tmp_path: Path) -> None:
    """`on_test` gets nothing else, `test=True` gets it too, others never do."""
    logto = on_sqlite(tmp_path)

    def nothing(event: events.Event) -> None: ...

    logto.on("*", name="never")(nothing)
    logto.on("User.*", name="too", test=True)(nothing)
    logto.on_test(name="only")(nothing)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(
            client, sign_request(console_test("User.Created", "webhook", soon()), SIGNING_KEY)
        )
        rows = await until(all_over(2), logto)
        assert {each.handler for each in rows} == {"too", "only"}
        await send(client, make.user_created(id="ana", at=soon()))
        rows = (await until(all_over(4), logto))[:2]
        assert {each.handler for each in rows} == {"too", "never"}

    live(logto, body)


def test_not_started_is_a_503(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And an error line, never silence."""
    logto = on_sqlite(tmp_path)

    async def run() -> None:
        transport = httpx2.ASGITransport(app=logto)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
            delivery = make.user_created()
            answer = await client.post(
                f"{logto.path}/", content=delivery.body, headers=dict(delivery.headers)
            )
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert (await client.get("/elsewhere")).status_code == 404

    asyncio.run(run())
    assert "logto-webhooks isn't running" in caplog.text


def test_a_setting_that_there_is_not_is_refused(tmp_path: Path) -> None:
    """A wrong name is never silently ignored."""
    misspelt: Any = {"shema": "logto"}
    with pytest.raises(TypeError, match="shema"):
        LogtoWebhooks(signing_key="k", database_url=f"sqlite:///{tmp_path / 'app.db'}", **misspelt)


@pytest.mark.postgres
def test_a_handler_may_end_while_leases_are_renewed() -> None:
    """The runner goes on; its lease is held up here by a lock."""
    reports: list[object] = []
    started, release = asyncio.Event(), asyncio.Event()
    schema = postgres.emptied_schema()
    logto = LogtoWebhooks(
        signing_key=SIGNING_KEY,
        engine=create_async_engine(postgres.server_url().set(drivername="postgresql+asyncpg")),
        schema=schema,
        observe=reports.append,
    )

    @logto.on("User.Created")
    async def waits(event: events.UserCreated) -> None:
        started.set()
        await release.wait()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        await started.wait()
        assert logto._service is not None
        runner = logto._service._workers.job_worker
        with postgres.sync_engine().connect() as other:
            other.execute(sa.text(f"SELECT id FROM {schema}.logto_lines FOR UPDATE"))
            blocker = other.scalar(sa.text("SELECT pg_backend_pid()"))
            runner._renewed = float("-inf")
            blocked = sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))"
            )

            async def is_blocked() -> int:
                with postgres.sync_engine().connect() as looking:
                    return int(looking.scalar(blocked, {"pid": blocker}) or 0)

            await eventually(is_blocked)
            release.set()

            async def ended() -> bool:
                return not runner._held

            await eventually(ended)
            other.rollback()
        await until(all_over(1), logto)
        assert not [each for each in reports if isinstance(each, Stalled)]

    live(logto, body)


def test_started_again_it_is_the_same_database(tmp_path: Path) -> None:
    """Although SQLite's files beside it are others than before."""
    reports: list[object] = []
    logto = LogtoWebhooks(
        signing_key=SIGNING_KEY,
        engine=sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}"),
        observe=reports.append,
    )

    async def run() -> None:
        for number in range(2):
            async with logto.lifespan():
                await logto.ensure_user({"sub": f"user{number}"})
            for taken in range(4):  # what the files were stored in
                (tmp_path / f"{number}-{taken}").touch()

    asyncio.run(run())
    assert not [each for each in reports if isinstance(each, Stalled)]


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_connection_that_was_lost_before_a_handler_is_no_failure(driver: str) -> None:
    """PostgreSQL was restarted, or a firewall forgot the connection, while the pool had it."""
    schema, url = postgres.emptied_schema(), postgres.server_url()
    url = url.set(drivername=f"postgresql+{driver}")
    is_async = driver == "asyncpg"
    engine: Any = create_async_engine(url) if is_async else sa.create_engine(url)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    pids: list[int] = []
    find_pid = sa.text("SELECT pg_backend_pid()")

    async def run_async(event: events.UserCreated, session: AsyncSession) -> None:
        pids.append((await session.execute(find_pid)).scalar_one())

    def run_sync(event: events.UserCreated, session: Session) -> None:
        pids.append(session.execute(find_pid).scalar_one())

    logto.on("User.Created", name="once", max_attempts=1)(run_async if is_async else run_sync)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        await until(all_over(1), logto)
        other = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        with other.connect() as connection:
            end = sa.text("SELECT pg_terminate_backend(:pid, 5000)")
            assert connection.scalar(end, {"pid": pids[0]})
        other.dispose()
        await send(client, make.user_created(id="bo", at=soon()))
        rows = await until(all_over(2), logto)
        assert {row.state for row in rows} == {"done"}
        assert len(set(pids)) == 2

    live(logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_own_documents_keep_their_numbers(driver: str) -> None:
    """On an engine that `database_url` makes. Logto's numbers are JavaScript's, others aren't."""
    schema, url = postgres.emptied_schema(), postgres.server_url()
    url = url.set(drivername=f"postgresql+{driver}")
    database_url = url.render_as_string(hide_password=False)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, database_url=database_url, schema=schema)
    own = sa.Table("own_documents", sa.MetaData(schema="app"), sa.Column("document", sa.JSON))
    document = {"discord": 1234567890123456789, "far": 10**400, "ü": [[[None]]]}

    @logto.on("User.Created", name="counts")
    async def counts(event: events.UserCreated, session: AsyncSession) -> None:
        read = (await session.execute(sa.select(own.c.document))).scalar_one()
        await session.execute(sa.update(own).values(document=read | {"count": 1}))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        assert {job.state for job in await until(all_over(1), logto)} == {"done"}

    with postgres.sync_engine().begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA IF NOT EXISTS app"))
        own.drop(connection, checkfirst=True)
        own.create(connection)
        connection.execute(sa.insert(own).values(document=document))
    live(logto, body)
    with postgres.sync_engine().begin() as connection:
        assert connection.scalar(sa.select(own.c.document)) == document | {"count": 1}


def test_jobs_of_an_event_that_was_removed_from_their_handler(tmp_path: Path) -> None:
    """They wait while a release that wants them may run, and then hold up nobody's queue."""

    def release(*wanted: str, fails: bool = False) -> LogtoWebhooks:
        logto = on_sqlite(tmp_path)

        @logto.on(*wanted, name="greets", waits=[0.1])
        async def greets(event: events.Event) -> None:
            if fails:
                raise ConnectionError

        return logto

    def states(rows: list[JobRow]) -> dict[str, str]:
        return {row.event: row.state for row in rows}

    async def fail(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_data_updated(id="ana", at=soon()))
        await until(lambda rows: [row.failures > 0 for row in rows] == [True], logto)

    async def wait_for_the_other_release(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_deleted(id="ana", at=soon()))
        rows = await until(
            lambda rows: len(rows) == 2 and "another release" in (rows[-1].error or ""), logto
        )
        assert states(rows) == {"User.Data.Updated": "waiting", "User.Deleted": "waiting"}

    async def go_on(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        rows = await until(all_over(2), logto)
        assert states(rows) == {"User.Data.Updated": "discarded", "User.Deleted": "done"}
        assert "no release that runs" in (rows[-1].error or "")

    live(release("User.Data.Updated", "User.Deleted", fails=True), fail)
    live(release("User.Deleted"), wait_for_the_other_release)
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    with engine.begin() as connection:
        earlier = "UPDATE logto_handlers SET seen_at = seen_at - 360000 WHERE options LIKE '%Data%'"
        connection.execute(sa.text(earlier))
    engine.dispose()
    live(release("User.Deleted"), go_on)


def test_a_user_costs_a_claim_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many organizations the user is in: the claim delays accepting on SQLite."""
    logto = on_sqlite(tmp_path)
    given: list[str | None] = []

    @logto.on("User.Data.Updated", name="greets")
    async def greets(event: events.UserDataUpdated, user: UserRow | None) -> None:
        given.append(user.name if user else None)

    ids = [f"org{number}" for number in range(50)]
    memberships = [
        make.organization_membership_updated(id=id_, addedUserIds=["ana"]) for id_ in ids
    ]
    read: list[Key] = []

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()), *memberships)
        await eventually(logto.status, lambda status: not status.deliveries["pending"])
        for module in (records, deliveries):
            monkeypatch.setattr(module, "from_row", partial(_note_read, records.from_row, read))
        await send(client, make.user_data_updated(id="ana", name="Ana", at=soon()))
        await until(all_over(1), logto)

    live(logto, body)
    assert given == ["Ana"]
    assert {key.kind for key in read} == {"user"}


def _note_read(from_row: Any, read: list[Key], row: Any) -> Record:
    record: Record = from_row(row)
    read.append(record.key)
    return record


def test_a_claim_that_takes_too_long_claims_fewer_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, it would take too long again, for ever."""
    logto, claim = on_sqlite(tmp_path), HandlerCaller.claim
    most = 4

    def claim_some(caller: HandlerCaller, store: Store, token: str, room: Any, **how: Any) -> Any:
        if sum(room.values()) > most:
            raise StoreUnavailable(problem="no answer within 10 s")
        return claim(caller, store, token, room, **how)

    monkeypatch.setattr(HandlerCaller, "claim", claim_some)

    @logto.on("User.Created", name="greets")
    async def greets(event: events.UserCreated) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *(make.user_created(id=f"u{number}", at=soon()) for number in range(5)))
        rows = await until(all_over(5), logto)
        assert {row.state for row in rows} == {"done"}

    live(logto, body)
