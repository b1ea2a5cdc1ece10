"""A record's life, told: who set what it has, by which call, and what came too late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks.admin import resolve_one
from logto_webhooks.apply.batch import apply_reads
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import MEMBERSHIP_EVENTS, NewDelivery, StoredDelivery
from logto_webhooks.ensure_user import ensure_user
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.explain import Explained, explain_stored
from logto_webhooks.explain.provenance import DeliveryRef, Field
from logto_webhooks.records.projection import project
from logto_webhooks.records.record import (
    ROLE,
    ROLES,
    Absent,
    ApiRead,
    Change,
    Key,
    Kind,
    Record,
    RefetchRequest,
    membership,
)
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from tests.support.stores import STORES, Copy, StoreKind, delivery, keys_of, memory_host, open_host

T0 = 1_795_485_335_917
HOLDS_NOTHING: tuple[Any, ...] = (None, {}, [], False)


class Life:
    """An inbox, what is known from it, and what explaining says."""

    def __init__(self, kind: StoreKind, folder: Path, bodies: Iterable[bytes]) -> None:
        asyncio.run(self._live(kind, folder, list(bodies)))

    async def _live(self, kind: StoreKind, folder: Path, bodies: list[bytes]) -> None:
        copy = Copy(open_host(kind, folder))
        await copy.take(bodies)
        subjects = [key for key in keys_of(bodies) if key.kind != "membership"]
        self.known, self.kept, self.told = await look(copy.host, subjects)
        await copy.host.close()


async def look(
    host: TransactionRunner, subjects: list[Key]
) -> tuple[dict[Key, Record], dict[int, StoredDelivery], dict[Key, Explained]]:
    known: dict[Key, Record] = {}
    kept: dict[int, StoredDelivery] = {}
    told: dict[Key, Explained] = {}
    for subject in subjects:
        known |= await host.read(partial(read_known, subject))
        found = await explain_stored(host, subject)
        assert found
        told[subject] = found
        for line in found.lines:
            one = await host.read(partial(read_delivery, line.id or 0))
            assert one
            kept[one.id] = one
    return known, kept, told


def read_known(subject: Key, store: Store) -> dict[Key, Record]:
    return store.inbox.known(subject)


def read_delivery(number: int, store: Store) -> StoredDelivery | None:
    return store.inbox.get(number)


def shuffled(name: Name, seed: int) -> list[bytes]:
    bodies = [each.body for each in history.load(name).deliveries]
    if seed:
        random.Random(seed).shuffle(bodies)
    return bodies


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", history.NAMES)
def test_the_credited_deliveries_hold_the_value(name: Name, seed: int, tmp_path: Path) -> None:
    """Of every field of every user and organization of a history, in any order of arrival."""
    life = Life("sqlite", tmp_path, shuffled(name, seed))
    for subject, found in life.told.items():
        for field in found.fields:
            if field.set_by is None and not field.ended_at:
                assert field.value in HOLDS_NOTHING, (subject, field)
                assert is_untold(subject, field, life), (subject, field)
                continue
            for by in filter(None, (field.set_by, field.told_by)):
                body = msgspec.json.decode(life.kept[by.id].body)
                assert holds(body, subject, field), (subject, field, by)


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
def test_every_field_of_a_row_is_explained(name: Name, tmp_path: Path) -> None:
    """With the mirror's own value; and every membership."""
    life = Life("sqlite", tmp_path, shuffled(name, 0))
    for subject, found in life.told.items():
        row = project(life.known[subject]) or {}
        fields = {field.name: field.value for field in found.fields}
        for column in row.keys() - {f"logto_{subject.kind}_id"}:
            assert fields[column] == row[column]
        pairs = {key: each for key, each in life.known.items() if key.kind == "membership"}
        mine = [key for key in pairs if subject in key.organization_and_user]
        assert sum("." in field for field in fields) == len(mine)


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
def test_the_lines_end_in_what_is_known(name: Name, tmp_path: Path) -> None:
    """In doubt is what is in doubt; and each outcome is the one that the sync wrote down."""
    life = Life("sqlite", tmp_path, shuffled(name, 0))
    for subject, found in life.told.items():
        record, last = life.known[subject], found.lines[-1]
        assert [each for each in last.doubtful if "." not in each] == record.doubts
        for line in found.lines:
            if line.event not in MEMBERSHIP_EVENTS and line.id:  # these tell of others, too
                assert line.outcome == life.kept[line.id].result


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in STORES if kind != "sqlite"])
def test_every_store_tells_the_same(kind: StoreKind, tmp_path: Path) -> None:
    """Line by line."""
    bodies = shuffled("people", 0)
    assert Life(kind, tmp_path, bodies).told == Life("sqlite", tmp_path, bodies).told


def holds(body: Any, subject: Key, field: Field) -> bool:
    """Whether a body says somewhere what a field has."""
    if "." in field.name:
        return holds_member(body, subject, field)
    value = field.value
    if field.name == "custom_data" and subject.kind == "user":
        value = {name: each for name, each in value.items() if name != "logtoUserId"}
        return any(same_data(each, value) for each in parts(body))
    if field.name.endswith("_at"):
        moment = datetime.fromtimestamp(value / 1000, UTC) if value is not None else None
        return any(each == value or is_moment(each, moment) for each in parts(body))
    return any(type(each) is type(value) and each == value for each in parts(body))


def holds_member(body: Any, subject: Key, field: Field) -> bool:
    kind, _, other = field.name.partition(".")
    if field.ended_at is not None:
        return str(body["event"]).endswith(".Deleted")
    user = subject.id if kind == "organizations" else other
    organization = other if kind == "organizations" else subject.id
    ids = body["addedUserIds" if field.value else "removedUserIds"]
    return bool(body["organizationId"] == organization and user in ids)


def same_data(each: Any, value: Any) -> bool:
    return isinstance(each, dict) and {k: v for k, v in each.items() if k != "logtoUserId"} == value


def is_moment(each: Any, moment: datetime | None) -> bool:
    try:
        return isinstance(each, str) and moment == datetime.fromisoformat(each)
    except (TypeError, ValueError):
        return False


def parts(value: Any) -> Iterable[Any]:
    """All values within a value."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from parts(each)


def is_untold(subject: Key, field: Field, life: Life) -> bool:
    """Whether nothing known has such a field: of an incomplete record, or one that lives."""
    record = life.known[subject]
    return (
        field.name == "deleted_at"
        or not record.complete
        or (field.name == "last_sign_in_at" and "lastSignInAt" not in record.facts)
    )


ANA, ACME = Key("user", "ana"), Key("organization", "acme")
OWN: dict[str, Any] = {"username": None, "primaryPhone": None, "avatar": None, "identities": {}}


def came(sent: SignedRequest, after_ms: int = 50) -> NewDelivery:
    made = delivery(sent.body)
    return msgspec.structs.replace(made, received_at=made.occurred_at + after_ms)


def life_of(subject: Key, *steps: SignedRequest | NewDelivery | Change) -> Explained:
    """Explain after deliveries, which came 50 ms after they were sent, and answers."""

    async def live() -> Explained | None:
        copy = Copy(memory_host())
        for step in steps:
            if isinstance(step, SignedRequest | NewDelivery):
                one = came(step) if isinstance(step, SignedRequest) else step
                await copy.host.run(partial(add, one))
                while await copy.worker.step():
                    pass
            else:
                await copy.host.run(partial(learned, step))
        return await explain_stored(copy.host, subject)

    found = asyncio.run(live())
    assert found
    return found


def add(one: NewDelivery, store: Store) -> None:
    store.add([one])


def learned(change: Change, store: Store) -> None:
    apply_reads(store, [change], None)


def field(found: Explained, name: str) -> Field:
    [one] = [each for each in found.fields if each.name == name]
    return one


def number(by: DeliveryRef | None) -> int | None:
    return by.id if by else None


def asked(at: int, **own: object) -> ApiRead:
    """Logto was asked about Ana."""
    contents = {"own": OWN | {"primaryEmail": "ana@example.com", "name": "Ana"} | own}
    return ApiRead(ANA, contents, at, at + 1)


def named(name: str, at: int, stamp: int | None = None) -> SignedRequest:
    return make.user_data_updated(id="ana", name=name, at=at, updatedAt=stamp or at)


def test_who_set_a_field_is_who_changed_it() -> None:
    """Not who only told it once more; both are named."""
    found = life_of(
        ANA,
        make.user_created(id="ana", name="Ana", at=T0),
        named("Anna", T0 + 1000),
        make.post_sign_in(id="ana", name="Anna", at=T0 + 2000),
    )
    name, email = field(found, "name"), field(found, "email")
    assert (name.value, name.set_by, name.told_by) == (
        "Anna",
        DeliveryRef(2, "User.Data.Updated", "PATCH /users/:userId", T0 + 1000),
        DeliveryRef(3, "PostSignIn", "SignIn", T0 + 2000),
    )
    assert (email.set_by, email.told_by) == (
        DeliveryRef(1, "User.Created", "POST /users", T0),
        DeliveryRef(3, "PostSignIn", "SignIn", T0 + 2000),
    )
    assert [line.set for line in found.lines][1:] == [
        ("name", "updated_at"),
        ("last_sign_in_at", "updated_at"),
    ]


def test_what_came_too_late_is_told() -> None:
    """Stale, then tombstoned; what is about somebody else isn't."""
    found = life_of(
        ANA,
        make.user_created(id="ana", name="Ana", at=T0),
        named("New", T0 + 9000),
        named("Old", T0 + 5000),
        make.user_created(id="bo", customData={"friend": "ana"}),
        make.user_deleted(id="ana", at=T0 + 20_000),
        named("Gone", T0 + 8000),
    )
    said = [(line.id, line.outcome, line.stale) for line in found.lines]
    assert said == [
        (1, "applied", ()),
        (2, "applied", ()),
        (3, "stale", ("name",)),
        (5, "applied", ()),
        (6, "tombstoned", ("name",)),
    ]
    assert field(found, "name").told_by == DeliveryRef(
        2, "User.Data.Updated", "PATCH /users/:userId", T0 + 9000
    )
    gone = field(found, "deleted_at")
    assert gone.value == T0 + 20_000
    assert number(gone.set_by) == 5


def test_an_answer_settles_a_doubt() -> None:
    """A line of its own; the value is told by a delivery, and confirmed by the answer."""
    racing = named("One", T0, T0), named("Two", T0 + 1, T0)
    found = life_of(ANA, *racing, asked(T0 + 5000, name="One"))
    _, second, answer = found.lines
    assert (second.doubtful, second.settled) == (("own",), ())
    assert (answer.id, answer.event, answer.occurred_at) == (None, "asked Logto", T0 + 5000)
    assert (answer.outcome, answer.doubtful) == ("settled", ())
    assert "own" in answer.settled
    name = field(found, "name")
    assert (name.value, name.asked_at, name.doubtful) == ("One", T0 + 5000, False)
    assert number(name.told_by) == 1


def test_what_only_an_answer_told_is_credited_to_no_delivery() -> None:
    """Its webhook was lost."""
    created = make.user_created(id="ana", name="Ana", at=T0, email="ana@example.com")
    found = life_of(ANA, created, asked(T0 + 5000, name="Lost"))
    name, email = field(found, "name"), field(found, "email")
    assert (name.value, name.set_by, name.asked_at) == ("Lost", None, T0 + 5000)
    assert number(email.set_by) == 1
    assert found.lines[-1].set == ("name",)


def test_who_set_a_field_has_a_line_though_an_answer_told_it_before() -> None:
    """A delivery that was brought back after the answer: it changed nothing here, but at Logto."""
    created = make.user_created(id="ana", name="Ana", at=T0)
    late = came(named("New", T0 + 1000), after_ms=9000)
    found = life_of(ANA, created, asked(T0 + 5000, name="New"), late).only("name")
    assert number(found.fields[0].set_by) == 2
    assert [line.id for line in found.lines] == [1, None, 2]


def test_a_later_delivery_wins_over_an_answer() -> None:
    """What was answered isn't known any more, but that it settled."""
    racing = named("One", T0, T0), named("Two", T0 + 1, T0)
    found = life_of(ANA, *racing, asked(T0 + 5000, name="One"), named("New", T0 + 9000))
    assert [line.outcome for line in found.lines[2:]] == ["settled", "applied"]
    assert "own" in found.lines[2].settled
    name = field(found, "name")
    assert (number(name.told_by), name.asked_at) == (3, None)


def test_who_is_gone_at_logto_is_told() -> None:
    """By an answer alone."""
    found = life_of(ANA, make.user_created(id="ana", at=T0), Absent(ANA, T0 + 7000, T0 + 7000))
    assert (found.lines[-1].event, found.lines[-1].set) == ("asked Logto", ("deleted_at",))
    gone = field(found, "deleted_at")
    assert (gone.value, gone.set_by, gone.asked_at) == (T0 + 7000, None, T0 + 7000)


def test_a_dead_delivery_credits_nothing() -> None:
    """It leaves the record in doubt, until Logto is asked."""
    created = make.user_created(id="ana", name="Ana", at=T0)
    broken = make.user_data_updated(id="ana", name="No", isSuspended="odd", at=T0 + 1000)
    found = life_of(ANA, created, broken)
    assert (found.lines[-1].outcome, found.lines[-1].doubtful) == ("dead", ("dead delivery",))
    assert field(found, "name").value == "Ana"
    settles = msgspec.structs.replace(asked(T0 + 5000), settles=("dead delivery",))
    assert life_of(ANA, created, broken, settles).lines[-1].doubtful == ()


def test_members_and_roles_are_told() -> None:
    """Who was added, removed, or ended with the organization; roles only by answers."""
    pair = membership("acme", "ana")
    steps = (
        make.organization_created(id="acme", at=T0),
        make.organization_membership_updated(id="acme", addedUserIds=["ana", "bo"], at=T0 + 1000),
        ApiRead(pair, {"present": True, ROLES: {"r": "admin"}}, T0 + 4000, T0 + 4001),
        make.organization_membership_updated(
            id="acme", addedUserIds=[], removedUserIds=["bo"], at=T0 + 9000
        ),
    )
    found = life_of(ACME, *steps)
    assert found.lines[1].set == ("members.ana", "members.bo")
    assert found.lines[2].settled == ("members.ana", "members.ana.roles")
    ana, bo = field(found, "members.ana"), field(found, "members.bo")
    assert (ana.value, ana.asked_at, bo.value) == (True, T0 + 4000, False)
    assert (number(ana.set_by), number(bo.set_by)) == (2, 3)
    assert field(found, "members.ana.roles").value == ["admin"]
    ended = life_of(ACME, *steps, make.organization_deleted(id="acme", at=T0 + 20_000))
    assert set(ended.lines[-1].set) == {"members.ana", "deleted_at"}
    ana = field(ended, "members.ana")
    assert (ana.value, ana.ended_at) == (False, T0 + 20_000)
    assert number(ana.set_by) == 4
    of_ana = life_of(ANA, *steps).only("organizations")
    assert [line.id for line in of_ana.lines] == [2, None]
    assert {each.name for each in of_ana.fields} == {
        "organizations.acme",
        "organizations.acme.roles",
    }


def joined(at: int) -> SignedRequest:
    return make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=at)


def test_a_membership_is_credited_to_the_deletion_that_ended_it() -> None:
    """The organization's, though the user was deleted later; seen from both ends."""
    steps = (
        make.user_created(id="ana", at=T0),
        make.organization_created(id="acme", at=T0),
        joined(T0 + 1000),
        make.user_created(id="bo", at=T0),
        make.organization_deleted(id="acme", at=T0 + 5000),
        make.user_deleted(id="ana", at=T0 + 9000),
    )
    found = life_of(ANA, *steps)
    ended = field(found, "organizations.acme")
    assert (ended.value, number(ended.set_by), ended.ended_at) == (False, 5, T0 + 5000)
    assert [(line.id, line.set) for line in found.lines[-2:]] == [
        (5, ("organizations.acme",)),
        (6, ("deleted_at",)),
    ]
    other = field(life_of(ACME, *steps), "members.ana")
    assert (number(other.set_by), other.ended_at) == (5, T0 + 5000)
    # The same the other way round: what an organization shows of a user who was deleted first.
    late = (*steps[:4], make.user_deleted(id="ana", at=T0 + 3000), *steps[4:5])
    of_acme = field(life_of(ACME, *late), "members.ana")
    assert (number(of_acme.set_by), of_acme.ended_at) == (5, T0 + 3000)


def test_roles_stay_what_logto_answered() -> None:
    """Of a user who was deleted since, and of a membership that is over."""
    roles = ApiRead(ANA, {ROLES: None, f"{ROLE}r": "admin"}, T0 + 2000, T0 + 2001, all_of=ROLE)
    there = {"present": True, ROLES: {"o": "owner"}}
    pair = ApiRead(membership("acme", "ana"), there, T0 + 2000, T0 + 2001)
    deleted = make.user_deleted(id="ana", at=T0 + 9000)
    found = life_of(ANA, make.user_created(id="ana", at=T0), joined(T0 + 10), roles, pair, deleted)
    own, of_member = field(found, "roles"), field(found, "organizations.acme.roles")
    assert (own.value, own.asked_at) == (["admin"], T0 + 2000)
    assert (of_member.value, of_member.asked_at) == (["owner"], T0 + 2000)


def test_a_user_who_is_back_is_told() -> None:
    """Which delivery, or which answer, said so."""
    first, gone = make.user_created(id="ana", at=T0), make.user_deleted(id="ana", at=T0 + 1000)
    later = named("Back", T0 + 90_000)
    back = life_of(ANA, first, gone, later)
    assert "deleted_at" in back.lines[-1].set
    assert back.lines[-1].doubtful == ("existence",)
    deleted = field(back, "deleted_at")
    assert (deleted.value, deleted.doubtful) == (None, True)
    answered = life_of(ANA, first, gone, asked(T0 + 90_000))
    assert "deleted_at" in answered.lines[-1].set
    assert not field(answered, "deleted_at").doubtful
    early = life_of(ANA, Absent(ANA, T0 - 500, T0 - 500), first)
    assert [line.event for line in early.lines] == ["asked Logto", "User.Created"]
    assert field(early, "deleted_at").value is None


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_an_email_that_is_used_again_names_the_living(kind: StoreKind, tmp_path: Path) -> None:
    """Whoever had it before; of two deleted ones none is named."""

    async def live() -> None:
        copy = Copy(open_host(kind, tmp_path))
        email = "reused@example.com"
        sent = [
            make.user_created(id="a", email=email, at=T0),
            make.user_created(id="b", email=email, at=T0),
            make.user_deleted(id="a", at=T0 + 1000),
            make.user_deleted(id="b", at=T0 + 1000),
        ]
        await copy.take([each.body for each in sent])
        with pytest.raises(SettingInvalid):
            await copy.host.read(lambda store: resolve_one(store, "user", email))
        await copy.take([make.user_created(id="z", email=email, at=T0 + 2000).body])
        found = await copy.host.read(lambda store: store.find("user", email, 9))
        assert found[0].row["logto_user_id"] == "z"
        assert await copy.host.read(lambda store: resolve_one(store, "user", email)) == Key(
            "user", "z"
        )
        await copy.host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_an_exact_id_wins(kind: StoreKind, tmp_path: Path) -> None:
    """Over whoever has it as a username or a name, also if its own user is deleted or incomplete.
    Anyone can choose such a name."""

    async def live() -> None:
        copy = Copy(open_host(kind, tmp_path))

        async def resolve(kind: Kind, query: str) -> Key:
            return await copy.host.read(lambda store: resolve_one(store, kind, query))

        sent = [
            make.user_created(id="victim", email="v@example.com", at=T0),
            make.user_created(id="mallory", username="victim", at=T0),
            make.organization_created(id="acme", name="Acme", at=T0),
            make.organization_created(id="evil", name="acme", at=T0),
        ]
        await copy.take([each.body for each in sent])
        assert await resolve("user", "victim") == Key("user", "victim")
        assert await resolve("organization", "acme") == ACME
        found = await copy.host.read(lambda store: store.find("user", "victim", 9))
        assert [each.row["logto_user_id"] for each in found] == ["victim", "mallory"]
        local_id = str(found[0].row["id"])
        named = make.organization_created(id="other", name=local_id, at=T0)
        of_local = make.user_created(id="other", username=local_id, at=T0)
        await copy.take([named.body, of_local.body])
        assert await resolve("user", local_id.upper()) == Key("user", "victim")
        await copy.take([make.user_deleted(id="victim", at=T0 + 1000).body])
        assert await resolve("user", "victim") == Key("user", "victim")
        assert await resolve("user", local_id) == Key("user", "victim")
        assert await resolve("user", "V@example.com") == Key("user", "victim")
        await copy.host.run(partial(add_part, "partly"))
        await copy.take([make.user_created(id="eve", username="partly", at=T0).body])
        assert await resolve("user", "partly") == Key("user", "partly")
        assert await resolve("user", "eve") == Key("user", "eve")
        await copy.host.close()

    asyncio.run(live())


def add_part(user_id: str, store: Store) -> None:
    apply_reads(store, [RefetchRequest(Key("user", user_id), "incomplete", T0)], None)


def test_of_whom_nothing_came_nothing_is_told() -> None:
    """None, not an empty life."""

    async def live() -> None:
        copy = Copy(memory_host())
        await copy.take([make.user_created(id="bo", customData={"friend": "ana"}).body])
        assert await explain_stored(copy.host, ANA) is None

    asyncio.run(live())


def test_what_a_token_claimed_is_told(tmp_path: Path) -> None:
    """As long as nothing else says it."""
    copy = Copy(open_host("sqlite", tmp_path))
    claims = {"sub": "ana", "email": "ana@example.com"}

    async def claimed() -> bool:
        found = await explain_stored(copy.host, Key("user", "ana"))
        assert found
        return found.only("email").fields[0].claimed

    async def run() -> None:
        await copy.host.run(lambda store: ensure_user(store, claims))
        assert await claimed()
        await copy.take([make.user_created(id="ana", email="ana@example.com").body])
        assert not await claimed()
        await copy.host.close()

    asyncio.run(run())
