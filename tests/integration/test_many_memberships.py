"""Users and organizations with very many memberships: what is read of them, and in which pieces."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import batch, membership_steps
from logto_webhooks.apply.membership_steps import MembershipAnnouncer, MembershipEnder
from logto_webhooks.database import records
from logto_webhooks.database.store import Store
from logto_webhooks.instrumentation import MembershipsDelayed, TelemetryEvent
from logto_webhooks.jobs import JobFilter, RegisteredHandler
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.reconcile import fetch
from logto_webhooks.reconcile.fetch import Fetcher
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import ApiRead, Change, Key, Tombstone, Upsert, Value, membership
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.conftest import Run
from tests.integration.test_jobs_by_hand import until_one_waits
from tests.support import postgres
from tests.support.fake import asking
from tests.support.plans import Ran, explain, noting
from tests.support.stores import ALL, WrappedRunner, memory_host, open_host

T = TypeVar("T")
SLOW = ("logto_records_pkey", "Sort", "TEMP B-TREE")  # in a plan


def joined(organization: str, user: str, at: int = 1_000, present: bool = True) -> Upsert:
    value = Value(present, at, at - 100, at)
    return Upsert(membership(organization, user), {"present": value})


def user(user_id: str, at: int = 900) -> Upsert:
    names = ("username", "primaryEmail", "primaryPhone", "name", "avatar")
    own: dict[str, object] = {**dict.fromkeys(names, None), "identities": {}}
    return Upsert(Key("user", user_id), {"own": Value(own, at, at, at)})


def apply(run: Run, *changes: Change) -> None:
    run(partial(batch.apply_reads, changes=changes, source=None))


def test_memberships_are_read_in_pages_by_one_index(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without statistics, too. A page is read in order, and no other memberships are."""
    monkeypatch.setattr(records, "LOOKED", 2)
    apply(run, *(joined(f"o{n}", "ana") for n in range(5)), joined("o1", "bo"))
    end, pages, after = Key("user", "ana"), list[list[str]](), ""
    while after is not None:
        find: Callable[[Store], Any] = partial(Store.memberships_of, end=end, after=after)
        found, after = run(find)
        pages.append([key.id for key in found])
        [plan] = run(partial(explain, work=find))
        assert "logto_records_user" in plan, plan
        assert [word for word in SLOW if word in plan] == [], plan
    assert pages == [["o0:ana", "o1:ana"], ["o2:ana", "o3:ana"], ["o4:ana"]]


class ReadOnly(WrappedRunner):
    """A runner that refuses to write."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Fail."""
        raise AssertionError("it writes")


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_a_list_of_members_is_compared_without_a_write(kind: Any, tmp_path: Path) -> None:
    """Stored members whom it lacks are found, and those in doubt, but not those who left."""

    async def live() -> Sequence[Key]:
        host = open_host(kind, tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            acme = logto.create_organization(name="Acme")["id"]
            logto.add_members(acme, [logto.create_user(id="listed")["id"]])
            told: list[Change] = [
                joined(acme, "unlisted"),
                joined(acme, "left", present=False),
                joined(acme, "doubtful"),
                joined(acme, "doubtful", 1_001, present=False),
                joined(acme, "deleted"),
                Tombstone(Key("user", "deleted"), 300_000),
                joined("other", "stranger"),
            ]
            await host.run(partial(batch.apply_reads, changes=told, source=None))
            fetcher = Fetcher(api, ReadOnly(host), lambda answer: Span(1, 2))
            pieces = [piece async for piece in fetcher.fetch_members(acme)]
        await host.close()
        ids = {change.key for piece in pieces for change in piece}
        return sorted(key for key in ids if key.kind == "membership")

    users = [key.organization_and_user[1].id for key in asyncio.run(live())]
    assert users == ["doubtful", "listed", "unlisted"]


def test_what_logto_says_of_members_is_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order. The next piece is made only when it is needed, because there can be very many."""
    monkeypatch.setattr(fetch, "SORTED", 40)
    monkeypatch.setattr(fetch, "PIECE", 50)

    def count_answers() -> int:
        return sum(isinstance(each, ApiRead) for each in gc.get_objects())

    async def live() -> None:
        async with FakeLogto() as logto, asking(logto) as api:
            acme = logto.create_organization()["id"]
            users = [logto.create_user()["id"] for _ in range(230)]
            logto.add_members(acme, users)
            fetcher = Fetcher(api, memory_host(), lambda answer: Span(1, 2))
            before, found = count_answers(), list[Key]()
            async for piece in fetcher.fetch_members(acme):
                assert count_answers() - before <= 2 * 50
                found += [change.key for change in piece]
        assert found == [*sorted(membership(acme, each) for each in users), found[-1]]
        assert found[-1] == Key("organization", acme)

    asyncio.run(live())


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_a_restored_user_waits_until_all_memberships_are_read(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are stored piece by piece. A process that is killed in between reads them again."""
    monkeypatch.setattr(fetch, "PIECE", 5)

    async def live() -> None:
        host = open_host(kind, tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            ana = logto.create_user()["id"]
            for _ in range(12):
                logto.add_members(logto.create_organization()["id"], [ana])
            told: list[Change] = [
                user(ana),
                Tombstone(Key("user", ana), 300_000),
                user(ana, 400_000),
            ]
            await host.run(partial(batch.apply_reads, changes=told, source=None))
            fetcher = Fetcher(api, host, lambda answer: Span(500_000, 500_001))
            sizes, restored = list[int](), list[bool]()
            async for piece in fetcher.fetch_belongings(ana):
                await host.run(partial(batch.apply_reads, changes=piece, source=None))
                found = await host.read(lambda store: store.read_unlocked([Key("user", ana)]))
                sizes.append(len(piece))
                restored.append(found[Key("user", ana)].is_restored)
            [shown] = await host.read(partial(Store.find, kind="user", query=ana, limit=1))
        assert sizes == [5, 5, 4]  # with the roles, and the note that all were read
        assert restored == [True, True, False]
        assert len(shown.memberships) == 12
        await host.close()

    asyncio.run(live())


MANY = [f"u{number:02}" for number in range(40)]
HANDLER = RegisteredHandler(name="members", patterns=("LocalMember*",))


class Counting(WrappedRunner):
    """Counts the transactions that write."""

    count = 0

    async def run(self, work: Callable[[Store], T]) -> T:
        """Count, and run."""
        self.count += 1
        return await super().run(work)


def organization(organization_id: str) -> Upsert:
    own: dict[str, object] = {"name": organization_id, "description": None, "customData": {}}
    return Upsert(Key("organization", organization_id), {"own": Value(own, 900, 900, 900)})


@pytest.fixture
def many(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of two organizations."""
    monkeypatch.setattr(membership_steps, "LONGEST_STEP_S", 60.0)  # no step is made smaller
    run(lambda store: store.jobs.register([HANDLER]))
    run(lambda store: store.set_installed_at(0))
    told: list[Change] = [organization("o"), organization("p"), *map(user, MANY)]
    told += [joined(name, each) for name in "op" for each in MANY]
    run(partial(batch.apply_reads, changes=told, source="webhook"))


def events(run: Run, name: str) -> list[str]:
    found = run(lambda store: store.jobs.find(JobFilter(limit=ALL)))
    return sorted(job.subject for job in found if job.event == name)


def delete(run: Run, *ends: Key) -> None:
    changes = [Tombstone(end, 300_000) for end in ends]
    run(partial(batch.apply_reads, changes=changes, source="webhook"))


async def until_nothing_is_done(steps: MembershipEnder | MembershipAnnouncer) -> None:
    while await steps.step():
        pass


def test_many_deleted_users_with_few_memberships_end_together(
    many: None, host: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with an organization, of which each is a member: each membership ends once."""
    monkeypatch.setattr(batch, "FEW", 0)
    delete(run, *(Key("user", each) for each in MANY), Key("organization", "o"))
    assert run(lambda store: store.status()).memberships_to_end == 3 * len(MANY)
    counting, reports = Counting(host), list[TelemetryEvent]()
    asyncio.run(until_nothing_is_done(MembershipEnder(counting, reports.append, 60.0)))
    assert (counting.count, reports) == (2, [])
    assert events(run, "LocalMemberRemoved") == sorted(f"user:{each}" for each in MANY * 2)
    assert run(lambda store: store.status()).memberships_to_end == 0
    assert run(lambda store: store.endings(1)) == []
    for name in "op":
        [found] = run(partial(Store.find, kind="organization", query=name, limit=1))
        assert found.memberships == []


@pytest.mark.postgres
@pytest.mark.parametrize("host", ["asyncpg"], indirect=True)
def test_a_locked_user_delays_no_other(
    many: None, host: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported and tried again later, and the memberships of others end meanwhile."""
    monkeypatch.setattr(batch, "FEW", 0)
    monkeypatch.setattr(membership_steps, "LOCKED_S", 60.0)
    monkeypatch.setattr(membership_steps, "LOCK_S", 0.01)
    delete(run, *(Key("user", each) for each in MANY))
    reports: list[TelemetryEvent] = []
    lock = "SELECT 1 FROM {}.logto_records WHERE kind = 'user' AND logto_id = 'u03' FOR UPDATE"
    with postgres.sync_engine().connect() as other:
        other.execute(sa.text(lock.format(postgres.schema())))
        asyncio.run(until_nothing_is_done(MembershipEnder(host, reports.append, 60.0)))
        assert [ending.key.id for ending in run(lambda store: store.endings(9))] == ["u03"]
        [report] = reports
        assert isinstance(report, MembershipsDelayed)
        assert report.record == "user:u03"
        other.rollback()
    asyncio.run(until_nothing_is_done(MembershipEnder(host, reports.append, 60.0)))
    assert events(run, "LocalMemberRemoved") == sorted(f"user:{each}" for each in MANY * 2)


@pytest.mark.postgres
@pytest.mark.parametrize("host", ["asyncpg"], indirect=True)
def test_a_membership_ends_once_if_its_user_is_deleted_meanwhile(
    many: None, host: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a transaction that commits while a step of the organization's deletion waits for it."""
    monkeypatch.setattr(membership_steps, "FEW", 5)
    monkeypatch.setattr(membership_steps, "LOCK_S", 5.0)
    with monkeypatch.context() as context:
        context.setattr(batch, "FEW", 0)
        delete(run, Key("organization", "o"))
    engine = postgres.sync_engine().execution_options(
        schema_translate_map={None: postgres.schema()}
    )

    async def live() -> None:
        with engine.connect() as other:
            deletion = [Tombstone(Key("user", "u03"), 300_000)]
            batch.apply_reads(Store(other), deletion, "webhook")
            ender = MembershipEnder(host, lambda report: None, 60.0)
            ending = asyncio.create_task(until_nothing_is_done(ender))
            await asyncio.to_thread(until_one_waits, postgres.sync_engine())
            other.commit()
            await ending

    asyncio.run(live())
    assert events(run, "LocalMemberRemoved") == sorted(f"user:{each}" for each in (*MANY, "u03"))


def test_many_memberships_end_while_users_with_few_are_deleted(
    many: None, host: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them there are, they don't always come first."""
    monkeypatch.setattr(batch, "FEW", 0)
    monkeypatch.setattr(membership_steps, "FEW", 5)
    monkeypatch.setattr(membership_steps, "MOST", 5)
    others = [f"x{number:02}" for number in range(30)]
    apply(run, *map(user, others), *(joined("p", each) for each in others))
    delete(run, Key("organization", "o"), Key("user", others[0]))
    ender = MembershipEnder(host, lambda report: None, 60.0)
    for each in others[1:]:
        asyncio.run(ender.step())
        delete(run, Key("user", each))
    assert [ending.key.kind for ending in run(lambda store: store.endings(9))] == ["user"]
    assert len(events(run, "LocalMemberRemoved")) >= len(MANY)


def test_many_arrivals_with_few_members_are_announced_together(
    many: None, host: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pause after each, and each member once."""
    monkeypatch.setattr(batch, "FEW", 0)
    names = [f"late{number:02}" for number in range(40)]
    apply(run, *(joined(name, "u00") for name in names))
    come = partial(batch.apply_reads, changes=list(map(organization, names)), source="webhook")
    run(come)
    before = len(events(run, "LocalMemberAdded"))
    counting, reports = Counting(host), list[TelemetryEvent]()
    asyncio.run(until_nothing_is_done(MembershipAnnouncer(counting, reports.append, 60.0)))
    assert (counting.count, reports) == (2, [])
    assert len(events(run, "LocalMemberAdded")) - before == len(names)
    assert run(lambda store: store.arrivals(1)) == []


@pytest.mark.postgres
@pytest.mark.parametrize("host", ["asyncpg"], indirect=True)
def test_a_locked_member_delays_no_other_arrival(
    many: None, host: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its organization is reported, and tried again later."""
    monkeypatch.setattr(batch, "FEW", 0)
    monkeypatch.setattr(membership_steps, "LOCKED_S", 60.0)
    monkeypatch.setattr(membership_steps, "LOCK_S", 0.01)
    asyncio.run(until_nothing_is_done(MembershipAnnouncer(host, lambda report: None, 60.0)))
    names = [f"late{number:02}" for number in range(20)]
    apply(run, *(joined(name, "u00") for name in names))
    come = partial(batch.apply_reads, changes=list(map(organization, names)), source="webhook")
    run(come)
    reports: list[TelemetryEvent] = []
    lock = "SELECT 1 FROM {}.logto_records WHERE logto_id = 'late03:u00' FOR UPDATE"
    with postgres.sync_engine().connect() as other:
        other.execute(sa.text(lock.format(postgres.schema())))
        asyncio.run(until_nothing_is_done(MembershipAnnouncer(host, reports.append, 60.0)))
        assert [arrival.key.id for arrival in run(lambda store: store.arrivals(9))] == ["late03"]
        assert [getattr(report, "record", None) for report in reports] == ["organization:late03"]
        other.rollback()
    asyncio.run(until_nothing_is_done(MembershipAnnouncer(host, reports.append, 60.0)))
    assert len(events(run, "LocalMemberAdded")) == len(names)


def test_notes_are_listed_by_an_index(run: Run) -> None:
    """A few of them, the oldest first, and the next page of members who weren't announced."""
    acme = Key("organization", "acme")
    finds: list[tuple[str, Callable[[Store], object]]] = [
        ("logto_membership_steps_noted", partial(Store.endings, limit=9)),
        ("logto_membership_steps_noted", partial(Store.arrivals, limit=9, without=[acme])),
        ("logto_records_organization", partial(Store.unannounced, end=acme, after="a", limit=9)),
        ("logto_records_organization", partial(Store.newest_membership, end=acme)),
    ]
    for index, find in finds:
        [plan] = run(partial(explain, work=find))
        assert index in plan, plan
        assert [word for word in SLOW if word in plan] == [], plan


def read_contents(ran: Ran) -> list[str]:
    """Which kinds of records were read with their contents."""
    reads = [(query, values) for query, values in ran if "logto_records.data" in query]
    kinds = ("user", "organization", "membership")
    return sorted({kind for _, values in reads for kind in kinds if f"'{kind}'" in repr(values)})


def test_the_data_of_a_member_is_read_only_if_it_changes(many: None, run: Run) -> None:
    """It can be large, and there can be many: also when an organization's members are announced.
    What a later membership tells of a deleted user is kept, with the user's data."""

    def add(changes: list[Change], store: Store) -> list[str]:
        with noting(store.connection) as ran:
            batch.apply_reads(store, changes, "webhook")
        return read_contents(ran)

    known = run(lambda store: store.read_unlocked([Key("user", "u01")]))[Key("user", "u01")]
    new: list[Change] = [joined("q", each) for each in MANY]
    assert run(partial(add, new)) == ["membership"]
    assert run(partial(add, [organization("q")])) == ["membership", "organization"]
    assert events(run, "LocalMemberAdded") == [f"user:{each}" for each in MANY]
    delete(run, Key("user", "u01"))
    again: list[Change] = [joined("q", "u01", 300_500)]
    assert run(partial(add, again)) == ["membership", "user"]
    found = run(lambda store: store.read_unlocked([Key("user", "u01")]))[Key("user", "u01")]
    assert found.doubts == ["existence"]
    assert found.groups == known.groups


def test_deleted_users_without_memberships_need_no_statements(run: Run) -> None:
    """Of their own, to end memberships."""
    gone = [Key("user", each) for each in MANY]
    apply(run, *map(user, MANY), joined("o", MANY[0]))

    def count(store: Store) -> int:
        records = store.lock(gone)
        ended = [merge(records[end], Tombstone(end, 300_000)) for end in gone]
        with noting(store.connection) as ran:
            store.drop_memberships(ended)
        return len(ran)

    assert run(count) < 10


def test_memberships_to_end_are_counted_at_once(
    many: None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many users and organizations were deleted, because the status is asked often."""
    monkeypatch.setattr(batch, "FEW", 0)
    delete(run, *(Key("user", each) for each in MANY))

    def count(store: Store) -> tuple[int, int]:
        with noting(store.connection) as ran:
            return store.count_memberships_to_end(), len(ran)

    assert run(count) == (2 * len(MANY), 2)
    plans = run(partial(explain, work=Store.count_memberships_to_end))
    for plan, index in zip(plans, ("logto_organization_members_user", "_members_"), strict=True):
        assert index in plan, plan
