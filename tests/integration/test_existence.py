"""Whether a user or an organization exists: a rule over maxima, the same in every order."""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.apply import batch
from logto_webhooks.database import open_database
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.errors import UserIsDeletedError, WrongTenant
from logto_webhooks.logto.api_responses import make_span_clock
from logto_webhooks.reconcile.fetch import compare_and_request_refetch
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import (
    NEVER,
    RESTORED,
    Absent,
    ApiRead,
    Change,
    Key,
    Kind,
    Record,
    RefetchRequest,
    Tombstone,
    Upsert,
    Value,
    membership,
)
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import asking, mirroring
from tests.support.stores import STORES, StoreKind, open_host

ANA, ACME = Key("user", "ana"), Key("organization", "acme")
PAIR = membership("acme", "ana")
T = 1_795_485_335_000
MINUTE = 60_000
OWN: dict[str, Any] = {
    "username": None,
    "primaryEmail": None,
    "primaryPhone": None,
    "name": "Ana",
    "avatar": None,
    "identities": {},
}


def whole(stamp: int, end: int | None = None, key: Key = ANA) -> Upsert:
    """A delivery with the whole record."""
    content = OWN if key.kind == "user" else {"name": "A", "description": None, "customData": {}}
    value = Value(content, stamp, stamp, stamp + 20 if end is None else end)
    return Upsert(key, {"own": value}, {"updatedAt": stamp})


def part(at: int) -> Upsert:
    """A delivery with the custom data alone."""
    return Upsert(ANA, {"custom_data": Value({"n": 1}, at, at - 100, at)})


def found(at: int, key: Key = ANA) -> ApiRead:
    """An answer of the API that has the record."""
    content = OWN if key.kind == "user" else {"name": "A", "description": None, "customData": {}}
    return ApiRead(key, {"own": content}, at, at + 5, settles=("dead delivery", "unknown change"))


def absent(at: int, answered_after: int = 0, key: Key = ANA) -> Absent:
    """An answer of the API that has no such record."""
    return Absent(key, at, at + answered_after)


def member(at: int, present: bool = True) -> Upsert:
    """A delivery that adds or removes Ana."""
    return Upsert(PAIR, {"present": Value(present, at, at - 100, at)})


def known(changes: Iterable[Change]) -> Record:
    record: Record | None = None
    for change in changes:
        record = merge(record or Record(change.key), change)
    assert record
    return record


def ways(changes: Sequence[Change]) -> list[Record]:
    """What is known after each order of them."""
    return [known(order) for order in itertools.permutations(changes)]


Life = tuple[list[Change], bool, bool]  # what is told, whether it exists, whether that is in doubt
LIVES: dict[str, Life] = {
    "a plain deletion": ([whole(T), Tombstone(ANA, T + 1000)], False, False),
    "an older update that comes late": (
        [whole(T), whole(T + 900), Tombstone(ANA, T + 1000)],
        False,
        False,
    ),
    "an update that is told of after the deletion, but was made before": (
        [whole(T), whole(T + 990, end=T + 1100), Tombstone(ANA, T + 1000)],
        False,
        False,
    ),
    "an update soon after the deletion": (
        [whole(T), Tombstone(ANA, T + 1000), whole(T + 1000 + MINUTE)],
        False,
        True,
    ),
    "a part after the deletion": (
        [whole(T), Tombstone(ANA, T + 1000), part(T + 90_000)],
        False,
        True,
    ),
    "an unknown change after the deletion": (
        [whole(T), Tombstone(ANA, T + 1000), RefetchRequest(ANA, "unknown change", T + 2000)],
        False,
        True,
    ),
    "restored, and updated": (
        [whole(T), Tombstone(ANA, T + 1000), whole(T + 1001 + MINUTE)],
        True,
        True,
    ),
    "restored, and found": ([whole(T), Tombstone(ANA, T + 1000), found(T + 9000)], True, False),
    "restored, updated, and found": (
        [whole(T), Tombstone(ANA, T), whole(T + 2 * MINUTE), found(T + 3 * MINUTE)],
        True,
        False,
    ),
    "deleted, restored, found, deleted": (
        [Tombstone(ANA, T), found(T + 9000), Tombstone(ANA, T + 10_000)],
        False,
        False,
    ),
    "not yet": ([absent(T), whole(T + 1)], True, False),
    "not yet, and told of too early to be sure": (
        [absent(T + 10), whole(T, end=T + 20)],
        False,
        True,
    ),
    "made while it was asked": ([absent(T, 30), whole(T + 20)], True, True),
    "made after it was asked": ([absent(T, 30), whole(T + 31)], True, False),
    "found by who asked at nearly the same time": ([absent(T, 30), found(T + 20)], True, True),
    "found by who asked later": ([absent(T, 30), found(T + 31)], True, False),
    "not yet, and a part": ([absent(T), part(T + 500)], False, True),
    "not yet, and found": ([absent(T), found(T + 1)], True, False),
    "found, and gone": ([whole(T), found(T + 100), absent(T + 200)], False, False),
    "its deletion was lost": ([whole(T), absent(T + 200)], False, False),
    "its deletion came after the answer": (
        [whole(T), Tombstone(ANA, T + 100), absent(T + 200)],
        False,
        False,
    ),
    "deleted long before it was found": (
        [Tombstone(ANA, T), whole(T + 5), found(T + 100)],
        True,
        False,
    ),
    "a dead delivery after the deletion": (
        [whole(T), Tombstone(ANA, T + 10), RefetchRequest(ANA, "dead delivery", T + 20)],
        False,
        True,
    ),
    "a dead delivery, and asked": (
        [
            whole(T),
            Tombstone(ANA, T + 10),
            RefetchRequest(ANA, "dead delivery", T + 20),
            absent(T + 30),
        ],
        False,
        False,
    ),
}


@pytest.mark.parametrize("life", LIVES)
def test_a_life_ends_the_same_in_every_order(life: str) -> None:
    """Whether the record exists, and whether that is in doubt."""
    changes, exists, doubtful = LIVES[life]
    records = ways(changes)
    assert all(record == records[0] for record in records)
    assert (records[0].deleted_at is None) is exists
    assert ("existence" in records[0].doubts) is doubtful
    assert (records[0].waiting_for is None) or doubtful or exists


def test_what_was_deleted_and_found_again_lacks_its_memberships() -> None:
    """Until Logto is asked which there are, after the deletion."""
    back: list[Change] = [whole(T), Tombstone(ANA, T + 1000), found(T + 9000)]
    early = ApiRead(ANA, {}, T + 999, T + 1001, settles=(RESTORED,))
    asked = ApiRead(ANA, {}, T + 9001, T + 9002, settles=(RESTORED,))
    assert {record.waiting_for for record in ways([*back, early])} == {"restored"}
    assert {record.waiting_for for record in ways([*back, asked])} == {None}
    assert {record.waiting_for for record in ways([whole(T), Tombstone(ANA, T + 1000)])} == {None}


def test_an_answer_settles_fields_that_were_told_alone() -> None:
    """Two deliveries without all fields race; the answer has all of them."""
    racing: list[Change] = [
        Upsert(ANA, {"own.name": Value(name, T, T, T + 20)}) for name in ("Ana", "Anna")
    ]
    assert {record.waiting_for for record in ways(racing)} == {"doubtful: own.name"}
    settled: list[Change] = [*racing, found(T + 20)]
    assert {record.waiting_for for record in ways(settled)} == {None}
    late: list[Change] = [*racing, found(T + 10)]
    assert {record.waiting_for for record in ways(late)} == {"doubtful: own.name"}


times = st.integers(0, 12).map(lambda step: T + 20_000 * step)
changes = st.one_of(
    st.builds(lambda at, late: whole(at, at + late), times, st.sampled_from([0, 20, 30_000])),
    st.builds(part, times),
    st.builds(lambda at: Tombstone(ANA, at), times),
    st.builds(absent, times, st.sampled_from([0, 30_000])),
    st.builds(found, times),
    st.builds(lambda at: RefetchRequest(ANA, "unknown change", at), times),
)


@given(some=st.lists(changes, min_size=1, max_size=8), data=st.data())
def test_existence_needs_no_order(some: list[Change], data: st.DataObject) -> None:
    """Wholes, parts, deletions, early and late answers; in any order, with duplicates."""
    again = data.draw(st.lists(st.sampled_from(some), max_size=4))
    assert known(data.draw(st.permutations([*some, *again]))) == known(some)


@given(some=st.lists(changes, min_size=1, max_size=8))
def test_existence_is_what_the_rule_says(some: list[Change]) -> None:
    """Computed from all that came, and not from what is kept of it."""
    record = known(some)
    drops = [each.at for each in some if isinstance(each, Tombstone)]
    reads = [(each.at, True) for each in some if isinstance(each, ApiRead)]
    reads += [(each.at, False) for each in some if isinstance(each, Absent)]
    read_at, was_found = max(reads, default=(NEVER, True))
    puts = [value for each in some if isinstance(each, Upsert) for value in each.values.items()]
    stamps = [value.stamp for name, value in puts if name == "own" and value.end > read_at]
    gone_at = max((at for at in drops if at > read_at), default=None)
    if gone_at is not None:
        exists = any(stamp > gone_at + MINUTE for stamp in stamps)
    else:
        exists = was_found or any(stamp > read_at for stamp in stamps)
    assert (record.deleted_at is None) is exists
    told = [value.stamp for _, value in puts] + [
        e.at for e in some if isinstance(e, RefetchRequest)
    ]
    ends = [value.end for _, value in puts] + [e.at for e in some if isinstance(e, RefetchRequest)]
    if exists:
        until = max((each.end for each in some if isinstance(each, Absent)), default=NEVER)
        seen = [value.stamp for name, value in puts if name == "own"]
        seen += [each.at + 1 for each in some if isinstance(each, ApiRead)]
        doubtful = gone_at is not None or max(seen, default=until + 1) <= until
    elif gone_at is not None:
        doubtful = any(stamp > gone_at for stamp in told)
    else:
        doubtful = any(end > read_at for end in ends)
    assert ("existence" in record.doubts) is doubtful


class End(NamedTuple):
    """What a store has in the end."""

    records: dict[Key, Record]
    memberships: list[list[str]]  # of each user
    waiting: dict[Key, str]


def learned(kind: StoreKind, folder: Path, orders: Sequence[Sequence[Change]]) -> list[End]:
    """What a store has after each order, each change in a transaction of its own.

    Each order has ids of its own, in one store; they are taken off in what is returned.
    """

    async def live() -> list[End]:
        host = open_host(kind, folder)
        ends = [await _learn(host, order, number) for number, order in enumerate(orders)]
        await host.close()
        return ends

    return asyncio.run(live())


async def _learn(host: TransactionRunner, order: Sequence[Change], number: int) -> End:
    for change in order:
        mine = msgspec.structs.replace(change, key=numbered(change.key, number))
        await host.run(partial(batch.apply_reads, changes=[mine], source="read"))
    keys = {numbered(key, number): key for key in (ACME, PAIR, ANA)}
    found = await host.run(lambda store: store.lock(sorted(keys)))
    records = {
        keys[key]: msgspec.structs.replace(record, key=keys[key], announced=False, local_id="")
        for key, record in found.items()
    }
    users = await host.read(lambda store: store.find("user", numbered(ANA, number).id, 1))
    memberships = [["acme"] * len(each.memberships) for each in users]
    waiting = await host.read(lambda store: store.waiting(9_999))
    reasons = {keys[each.key]: each.reason for each in waiting if each.key in keys}
    return End(records, memberships, reasons)


def numbered(key: Key, number: int) -> Key:
    """The same of another pair."""
    return Key(key.kind, ":".join(f"{part}-{number}" for part in key.id.split(":")))


PAIRS: dict[str, tuple[list[Change], list[list[str]]]] = {
    "over with the user": ([whole(T), member(T + 5), Tombstone(ANA, T + 10)], [[]]),
    "over with the organization": ([whole(T), member(T + 5), Tombstone(ACME, T + 10)], [[]]),
    "over with a user whose deletion was lost": (
        [whole(T), member(T + 5), absent(T + 10)],
        [[]],
    ),
    "over, and the user is back": (
        [whole(T), member(T + 5), Tombstone(ANA, T + 10), found(T + 9000)],
        [[]],
    ),
    "over, the user is back, and listed as a member": (
        [
            whole(T),
            member(T + 5),
            Tombstone(ANA, T + 10),
            found(T + 9000),
            ApiRead(PAIR, {"present": True, "roles": {}}, T + 9001, T + 9002),
        ],
        [["acme"]],
    ),
    "added again after the organization came back": (
        [whole(T), Tombstone(ACME, T + 10), whole(T + 90_000, key=ACME), member(T + 90_005)],
        [["acme"]],
    ),
}


@pytest.mark.parametrize("life", PAIRS)
@pytest.mark.parametrize("kind", STORES)
def test_a_membership_is_over_with_either_end(life: str, kind: StoreKind, tmp_path: Path) -> None:
    """In every order, in every store: the same records, rows and questions."""
    changes, members = PAIRS[life]
    orders = list(itertools.permutations(changes))
    orders = random.Random(7).sample(orders, min(len(orders), 24 if kind == "sqlite" else 5))
    ends = learned(kind, tmp_path, orders)
    assert all(end == ends[0] for end in ends)
    assert ends[0].memberships == members


@pytest.mark.parametrize("kind", STORES)
def test_a_membership_tells_of_a_deleted_user(kind: StoreKind, tmp_path: Path) -> None:
    """Who is added after the deletion may be back: Logto is asked, of the membership, too."""
    changes: list[Change] = [whole(T), Tombstone(ANA, T + 10), member(T + 9000)]
    for end in learned(kind, tmp_path, list(itertools.permutations(changes))):
        assert end.waiting[ANA] == "doubtful: existence"
        assert end.waiting[PAIR] == "doubtful: existence"


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_every_life_ends_the_same_in_every_store(kind: StoreKind, tmp_path: Path) -> None:
    """Some orders of each, through a real database."""
    lives = list(LIVES.values())
    rng = random.Random(3)
    orders = [rng.sample(changes, len(changes)) for changes, *_ in lives * 2]
    for (changes, exists, _), end in zip(lives * 2, learned(kind, tmp_path, orders), strict=True):
        assert end.records[ANA] == known(changes)
        assert (end.records[ANA].deleted_at is None) is exists


async def rows(host: TransactionRunner, kind: Kind) -> dict[str, Any]:
    found = await host.read(lambda store: store.find(kind, "", 99))
    return {each.row[f"logto_{kind}_id"]: each for each in found if not each.row["deleted_at"]}


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_reconcile_mends_what_is_deleted_here_and_alive_there(
    kind: StoreKind, tmp_path: Path
) -> None:
    """A user and an organization, with memberships and roles; whole or one user alone."""

    async def live() -> None:
        async with mirroring(kind, tmp_path) as (host, clock, logto, api):
            ana, bo = (logto.create_user()["id"] for _ in range(2))
            acme = logto.create_organization()["id"]
            logto.add_members(acme, [ana, bo])
            logto.assign_role(ana, "admin")
            look = Reconciliation(api, host, clock)
            await look.run()
            clock.tick(60)
            before = await rows(host, "user")
            for end in (Key("user", ana), Key("organization", acme)):
                await host.run(
                    partial(batch.apply_reads, changes=[Tombstone(end, clock.now())], source=None)
                )
            assert set(await rows(host, "user")) == {bo}
            clock.tick(600)
            dry = await look.run(dry_run=True)
            missing = {(each.kind, each.id) for each in dry.drifts if each.fields == ("missing",)}
            assert {("user", ana), ("organization", acme)} < missing
            assert set(await rows(host, "user")) == {bo}
            alone = await look.one_user(ana)
            assert alone.fields["missing"] >= 1
            clock.tick(60)
            assert (await look.run()).drifted >= 1
            clock.tick(60)
            assert (await look.run()).drifted == 0
            users, organizations = await rows(host, "user"), await rows(host, "organization")
            assert users[ana].row["id"] == before[ana].row["id"]
            assert (users[ana].memberships, users[ana].roles) == ([acme], ["admin"])
            assert organizations[acme].memberships == sorted([ana, bo])
            assert await host.read(lambda store: store.waiting(9)) == []

    asyncio.run(live())


def test_an_answer_that_came_too_early_gives_way(tmp_path: Path) -> None:
    """And serve's own reads bring back who was restored, with the memberships."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path) as (host, clock, logto, api):
            ana = logto.create_user()["id"]
            acme = logto.create_organization()["id"]
            logto.add_members(acme, [ana])
            await Reconciliation(api, host, clock).run()
            user = Key("user", ana)
            reads = Refetcher(api, host, lambda report: None)
            for told in (partial(absent, key=user), partial(Tombstone, user)):
                clock.tick(600)
                early = told(clock.now())
                await host.run(partial(batch.apply_reads, changes=[early], source=None))
                assert ana not in await rows(host, "user")
                clock.tick(600)
                later = RefetchRequest(user, "unknown change", clock.now())
                await host.run(partial(batch.apply_reads, changes=[later], source=None))
                clock.tick(60)
                await reads.drain()
                assert (await rows(host, "user"))[ana].memberships == [acme]

    asyncio.run(live())


def test_coming_back_runs_handlers_once_more(tmp_path: Path) -> None:
    """LocalUserCreated with `restored`, each time; the first time without."""
    logto = LogtoWebhooks(
        signing_key=testing.SIGNING_KEY, database_url=f"sqlite:///{tmp_path / 'app.db'}"
    )
    got: list[tuple[str, bool | None]] = []

    @logto.on("LocalUser*", "LocalOrganization*")
    def note(event: events.LocalEvent) -> None:
        got.append((event.name, getattr(event, "restored", None)))

    app = testing.app(logto)
    app.deliver(make.user_created(id="ana", at=T))
    app.deliver(make.user_deleted(id="ana", at=T + 1000))
    app.deliver(make.user_data_updated(id="ana", name="late", at=T + 900))
    app.deliver(make.user_data_updated(id="ana", name="back", at=T + 90_000))
    app.deliver(make.organization_created(id="acme", at=T))
    app.deliver(make.organization_deleted(id="acme", at=T + 1000))
    app.deliver(make.organization_created(id="acme", at=T + 90_000))
    assert got == [
        ("LocalUserCreated", False),
        ("LocalUserDeleted", None),
        ("LocalUserCreated", True),
        ("LocalOrganizationCreated", False),
        ("LocalOrganizationDeleted", None),
        ("LocalOrganizationCreated", True),
    ]


@pytest.mark.parametrize("organizations", [False, True])
def test_another_logto_deletes_nobody(organizations: bool, tmp_path: Path) -> None:
    """A new and empty one answers 404 to all that is asked of it, and lists no members."""

    async def live() -> None:
        host, clock = open_host("sqlite", tmp_path), FrozenClock()
        known = Key("organization", "acme") if organizations else ANA
        changes: list[Change] = [whole(T, key=known), RefetchRequest(known, "members", T + 1)]
        for change in changes:
            await host.run(partial(batch.apply_reads, changes=[change], source=None))
        async with FakeLogto(now=clock.now) as logto, asking(logto) as api:
            await Refetcher(api, host, lambda report: None).step()
            with pytest.raises(WrongTenant):
                await Reconciliation(api, host, clock).run()
            with pytest.raises(WrongTenant):
                await Reconciliation(api, host, clock).one_user("ana")
            sides = await compare_and_request_refetch(
                api, host, "ana", await make_span_clock(host)
            )  # it changes nothing
            assert sides.logto is None
        assert list(await rows(host, known.kind)) == [known.id]
        await host.close()

    asyncio.run(live())


def test_a_token_of_after_the_deletion_brings_back_only_who_is_there(tmp_path: Path) -> None:
    """Logto is asked; a token of before isn't worth a question."""

    async def run() -> None:
        async with FakeLogto() as fake:
            ana = fake.create_user(primaryEmail="ana@example.com")
            logto = LogtoWebhooks(
                signing_key=testing.SIGNING_KEY,
                database_url=f"sqlite:///{tmp_path / 'app.db'}",
                endpoint=fake.url,
                app_id=fake.app_id,
                app_secret=fake.app_secret,
                reconcile_every_s=0,
            )
            now = time.time_ns() // 1_000_000
            async with logto.lifespan():
                for user_id in (ana["id"], "nobody"):
                    drop = Tombstone(Key("user", user_id), now - 60_000)
                    await logto.database.host.run(
                        partial(batch.apply_reads, changes=[drop], source=None)
                    )
                    with pytest.raises(UserIsDeletedError):
                        await logto.ensure_user({"sub": user_id, "iat": now // 1000 - 90})
                with pytest.raises(UserIsDeletedError):
                    await logto.ensure_user({"sub": "nobody", "iat": now // 1000})
                row = await logto.ensure_user({"sub": ana["id"], "iat": now // 1000})
                assert row.email == "ana@example.com"

    asyncio.run(run())


def test_a_row_of_an_older_release_is_read_rightly(tmp_path: Path) -> None:
    """It has only `deleted_at`: the user is deleted until Logto has it again."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        await host.run(
            partial(batch.apply_reads, changes=[whole(T), Tombstone(ANA, T + 10)], source=None)
        )
        await host.close()
        with sqlite3.connect(tmp_path / "copy.db") as connection:
            connection.execute(
                "UPDATE logto_records SET gone_at = NULL, absent_at = NULL, stamp = NULL, "
                "told_at = NULL, told_end = NULL"
            )
        connection.close()
        host = open_database(f"sqlite:///{tmp_path / 'copy.db'}").host
        record = (await host.run(lambda store: store.lock([ANA])))[ANA]
        assert (record.deleted_at, record.doubts) == (T + 10, [])
        await host.run(partial(batch.apply_reads, changes=[found(T + 9000)], source=None))
        assert list(await rows(host, "user")) == ["ana"]
        await host.close()

    asyncio.run(live())


def test_each_role_that_differs_has_a_line(tmp_path: Path) -> None:
    """With its name, and since when: when Logto was last asked about that role."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path) as (host, clock, logto, api):
            ana = logto.create_user()["id"]
            logto.assign_role(ana, "guest")
            look = Reconciliation(api, host, clock)
            await look.run()
            first = clock.now()
            clock.tick(600)
            logto.assign_role(ana, "admin")
            logto.assign_role(ana, "owner")
            logto.remove_role(ana, "guest")
            found = await look.run()
            assert {each.role for each in found.drifts} == {"admin", "owner", "guest"}
            assert {each.fields for each in found.drifts} == {("roles",)}
            since = [each.since for each in found.drifts if each.role == "guest"]
            assert all(first - 5_000 <= (each or 0) <= first + 5_000 for each in since)

    asyncio.run(live())
