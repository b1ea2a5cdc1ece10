"""What every store does, whatever it is made of: one suite for all of them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.apply import batch
from logto_webhooks.database import records
from logto_webhooks.database.deliveries import HUGE, may_be_apart
from logto_webhooks.database.dialect import now
from logto_webhooks.database.records import FoundRow
from logto_webhooks.database.schema import deliveries
from logto_webhooks.database.store import Checkpoint, Gap, ProcessLease, RecordedFlow, Store
from logto_webhooks.deliveries import (
    LARGE,
    ClaimedDelivery,
    DeliveryFilter,
    DeliveryOutcome,
    DeliveryState,
    NewDelivery,
    StoredDelivery,
    StoreResult,
)
from logto_webhooks.errors import ClaimLost, RowRejected
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import (
    Absent,
    Key,
    Record,
    RefetchRequest,
    Tombstone,
    Upsert,
    Value,
    membership,
)
from logto_webhooks.testing import make
from tests.integration.conftest import Run
from tests.support.plans import explain
from tests.support.stores import delivery

ANA, BO = Key("user", "ana"), Key("user", "bo")
ORG = Key("organization", "org")
OWN = {
    "username": "ana",
    "primaryEmail": "Ana@Example.com",
    "primaryPhone": "4912345",
    "name": "Ana 100% Lima",
    "avatar": None,
    "identities": {"google": {"userId": "g"}},
}
NOBODY: dict[str, Any] = {
    "username": "bo",
    "primaryEmail": None,
    "primaryPhone": None,
    "name": "Bo",
}
T0 = 1_795_485_335_917


def made(count: int = 1) -> list[NewDelivery]:
    return [delivery(make.user_created().body) for _ in range(count)]


def add(run: Run, deliveries: list[NewDelivery]) -> list[StoreResult]:
    return run(lambda store: store.add(deliveries))


def claim(
    run: Run, token: str = "t", limit: int = 10, lease_s: float = 30, quick: bool = False
) -> list[ClaimedDelivery]:
    return run(lambda store: store.claim(token, limit, 2**20, lease_s, quick=quick))


def finish(run: Run, token: str, *outcomes: DeliveryOutcome) -> None:
    run(lambda store: store.finish(token, outcomes))


def put(run: Run, *changes: Upsert | Tombstone | RefetchRequest) -> dict[Key, Record]:
    """Merge changes into the records that they are about."""

    def work(store: Store) -> dict[Key, Record]:
        records = store.lock(sorted({change.key for change in changes}))
        for change in changes:
            records[change.key] = merge(records[change.key], change)
        store.save(list(records.values()))
        return store.lock(list(records))

    return run(work)


def find(run: Run, query: str) -> list[FoundRow]:
    return run(lambda store: store.find("user", query, 10))


def drop(end: Record, store: Store) -> None:
    store.drop_memberships([end])


def user(key: Key = ANA, at: int = T0, **own: object) -> Upsert:
    return Upsert(key, {"own": Value(OWN | own, at, at, at)}, {"updatedAt": at, "createdAt": T0})


def present(at: int = T0, there: bool = True) -> Upsert:
    return Upsert(membership("org", "ana"), {"present": Value(there, at, at - 100, at)})


class TestInbox:
    def test_new_deliveries_get_ids_in_order(self, run: Run) -> None:
        """The answers come in the order of the deliveries, with growing ids."""
        answers = add(run, made(3))
        assert [answer.duplicate for answer in answers] == [False] * 3
        assert [answer.id for answer in answers] == sorted(answer.id for answer in answers)

    def test_a_duplicate_has_the_id_of_the_first(self, run: Run) -> None:
        """Also within one batch, and with other bytes of the same JSON."""
        [one] = made()
        other = delivery(b" " + one.body)
        assert other.body != one.body
        first, second = add(run, [one, other])
        [third] = add(run, [one])
        assert not first.duplicate
        assert second == third == StoreResult(first.id, duplicate=True)

    def test_a_claimed_delivery_is_whole(self, run: Run) -> None:
        """A claim gives the exact bytes, the subject, and counts the attempt."""
        [one] = made()
        [accepted] = add(run, [one])
        assert claim(run) == [
            ClaimedDelivery(
                id=accepted.id,
                body=one.body,
                event="User.Created",
                subject=one.subject,
                received_at=one.received_at,
                attempt=1,
                digest=one.digest,
                occurred_at=one.occurred_at,
                origin="webhook",
            )
        ]

    def test_nobody_else_gets_what_is_claimed(self, run: Run) -> None:
        """Two workers never hold one delivery."""
        add(run, made(3))
        assert len(claim(run, "first", limit=2)) == 2
        assert len(claim(run, "second")) == 1
        assert claim(run, "third") == []

    def test_a_claim_ends_with_its_bytes(self, run: Run) -> None:
        """A batch holds no more than so many bytes, but at least one delivery."""
        deliveries = made(3)
        add(run, deliveries)
        size = len(deliveries[0].body)
        assert len(run(lambda store: store.claim("a", 10, 1, 30))) == 1
        assert len(run(lambda store: store.claim("b", 10, size + 10, 30))) == 1

    @pytest.mark.parametrize(
        ("event", "size"), [("PostSignIn", HUGE), ("Organization.Membership.Updated", LARGE)]
    )
    def test_slow_ones_take_turns_with_others(self, event: str, size: int, run: Run) -> None:
        """Many can come at once, such as lists of members in an import, and each takes seconds:
        nobody waits for all, however many these are."""
        name = event.encode()
        slow = [b'{"event":"%s","n":%d,"pad":"%s"}' % (name, n, b"x" * size) for n in range(6)]
        small = [b'{"event":"PostSignIn","n":%d}' % n for n in range(3)]
        add(run, [delivery(body) for body in (*slow[:5], *small, slow[5])])
        claimed = []
        for quick in (False, True, False, True):
            claim_some = partial(
                Store.claim, token="t", limit=4, max_bytes=2**30, lease_s=30, quick=quick
            )
            claimed.append([may_be_apart(each) for each in run(claim_some)])
        assert claimed == [[True], [False] * 3, [True], [True]]

    def test_after_the_lease_another_worker_may_claim(self, run: Run) -> None:
        """And the first can't finish any more: nothing is applied twice."""
        add(run, made())
        [held] = claim(run, "first", lease_s=0)
        [again] = claim(run, "second")
        assert again.id == held.id
        assert again.attempt == 2
        with pytest.raises(ClaimLost):
            finish(run, "first", DeliveryOutcome(id=held.id, state=DeliveryState.DONE))
        finish(
            run, "second", DeliveryOutcome(id=held.id, state=DeliveryState.DONE, result="applied")
        )

    def test_what_may_end_its_process_holds_up_no_other(self, run: Run) -> None:
        """Deliveries whose claims are lost again and again are claimed by fewer, and for longer,
        until each is alone: the others are applied, and new ones come in turn with them."""
        add(run, made(10))
        for name in ("first", "second"):
            assert len(claim(run, name, limit=32, lease_s=0)) == 10
        some = claim(run, "third", limit=32, lease_s=0)
        others = claim(run, "fourth", limit=32, lease_s=30)
        assert len(some) == len(others) == 4
        assert len(claim(run, "fifth", limit=32, lease_s=30)) == 2
        [alone] = claim(run, "sixth", limit=32, lease_s=30)
        assert alone.id in [lost.id for lost in some]
        left = sa.select(deliveries.c.due_at - now()).where(deliveries.c.id == alone.id)
        assert run(lambda store: store.execute(left).scalar_one()) > 200_000
        [new] = add(run, made(11)[10:])
        assert [each.id for each in claim(run, "seventh", quick=True)] == [new.id]
        assert [len(claim(run, name, limit=32)) for name in "abcd"] == [1, 1, 1, 0]
        run(lambda store: store.renew("sixth", [alone.id], 30))
        assert run(lambda store: store.execute(left).scalar_one()) > 200_000

    def test_finish_is_all_or_nothing(self, run: Run) -> None:
        """One lost claim rolls the whole batch back."""
        add(run, made(2))
        [mine] = claim(run, "mine", limit=1)
        [theirs] = claim(run, "theirs", limit=1)
        outcomes = [
            DeliveryOutcome(id=each.id, state=DeliveryState.DONE) for each in (mine, theirs)
        ]
        with pytest.raises(ClaimLost):
            finish(run, "mine", *outcomes)
        assert run(lambda store: store.status()).deliveries["pending"] == 2

    def test_what_is_finished_is_not_finished_again(self, run: Run) -> None:
        """Not even by who held it."""
        add(run, made())
        [held] = claim(run)
        finish(run, "t", DeliveryOutcome(id=held.id, state=DeliveryState.DONE))
        with pytest.raises(ClaimLost):
            finish(run, "t", DeliveryOutcome(id=held.id, state=DeliveryState.DONE))

    def test_a_retry_waits_for_its_time(self, run: Run) -> None:
        """It is pending, and due later."""
        add(run, made(2))
        soon, later = claim(run)
        finish(
            run,
            "t",
            DeliveryOutcome(id=soon.id, state=DeliveryState.PENDING, error="x", retry_after_s=0),
        )
        finish(
            run,
            "t",
            DeliveryOutcome(id=later.id, state=DeliveryState.PENDING, error="x", retry_after_s=60),
        )
        assert [each.id for each in claim(run)] == [soon.id]
        assert run(lambda store: store.status()).deliveries["pending"] == 2

    def test_an_error_rolls_everything_back(self, run: Run) -> None:
        """A transaction that raises leaves no trace."""

        def work(store: Store) -> None:
            store.add(made())
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run(work)
        assert run(lambda store: store.status()).deliveries["pending"] == 0

    def test_status_counts_states(self, run: Run) -> None:
        """Each state is there, also with nothing in it."""
        empty = run(lambda store: store.status())
        assert empty.deliveries == {"pending": 0, "done": 0, "ignored": 0, "dead": 0}
        assert empty.oldest_pending_s is None
        now = time.time_ns() // 1_000_000
        add(run, [delivery(make.user_created().body, now - 5000) for _ in range(4)])
        done, dead, ignored = claim(run, limit=3)
        finish(
            run,
            "t",
            DeliveryOutcome(id=done.id, state=DeliveryState.DONE, result="applied"),
            DeliveryOutcome(id=dead.id, state=DeliveryState.DEAD, error="why"),
            DeliveryOutcome(id=ignored.id, state=DeliveryState.IGNORED, result="test"),
        )
        status = run(lambda store: store.status())
        assert status.deliveries == {"pending": 1, "done": 1, "ignored": 1, "dead": 1}


class TestLooking:
    """The inbox to look at."""

    def test_a_delivery_is_whole(self, run: Run) -> None:
        """Its bytes, and what became of it; nothing, where there is no such id."""
        [one] = made()
        [accepted] = add(run, [one])
        stored = StoredDelivery(
            id=accepted.id,
            event="User.Created",
            subject=one.subject,
            occurred_at=one.occurred_at,
            received_at=one.received_at,
            origin="webhook",
            state=DeliveryState.PENDING,
            result=None,
            attempts=0,
            error=None,
            body=one.body,
        )
        assert run(lambda store: store.inbox.get(accepted.id)) == stored
        assert run(lambda store: store.inbox.get(accepted.id + 1)) is None
        claim(run)
        finish(run, "t", DeliveryOutcome(id=accepted.id, state=DeliveryState.DEAD, error="why"))
        done = replace(stored, state=DeliveryState.DEAD, attempts=1, error="why")
        assert run(lambda store: store.inbox.search(DeliveryFilter())) == [done]

    def test_pages_go_on_after_an_id(self, run: Run) -> None:
        """The newest first, or the oldest."""
        ids = [each.id for each in add(run, made(5))]
        assert search(run, limit=2) == ids[:2:-1]
        assert search(run, limit=2, after=ids[3]) == [ids[2], ids[1]]
        assert search(run, limit=2, oldest_first=True) == ids[:2]
        assert search(run, limit=9, after=ids[1], oldest_first=True) == ids[2:]

    def test_all_that_is_given_must_hold(self, run: Run) -> None:
        """Event, state, subject, when it was received, and bytes of the body."""
        ana = delivery(make.user_created(id="ana", email="ana@example.com").body, T0)
        bo = delivery(make.user_created(id="bo", customData={"näme": 'a"b%'}).body, T0 + 5)
        gone = delivery(make.user_deleted(id="ana").body, T0 + 9)
        first, second, third, fourth = (each.id for each in add(run, [ana, bo, gone, *made()]))
        claim(run, limit=3)
        states = [
            (first, DeliveryState.DONE),
            (second, DeliveryState.DEAD),
            (third, DeliveryState.IGNORED),
        ]
        finish(run, "t", *[DeliveryOutcome(id=number, state=state) for number, state in states])
        assert search(run, event="User.Deleted") == [third]
        assert search(run, event="User") == []
        assert search(run, subject="user:ana") == [third, first]
        assert search(run, since=T0 + 5, until=T0 + 7) == [second]
        assert search(run, text="ana@example.com", event="User.Created") == [first]
        assert search(run, text="NÄME") == []
        for part in ("näme", '"a\\"b%"'):
            assert search(run, text=part) == [second]
        for number, state in [*states, (fourth, DeliveryState.PENDING)]:
            assert search(run, state=state) == [number]

    def test_what_may_tell_of_a_record(self, run: Run) -> None:
        """Its own deliveries, and those that name it among the members; by id, in pages."""
        bodies = [
            make.user_created(id="ana"),
            make.user_created(id="bo", customData={"friend": "ana"}),
            make.organization_membership_updated(id="org", addedUserIds=["bo", "ana"]),
            make.organization_membership_updated(id="org", addedUserIds=["bo"]),
            make.organization_user_added(id="org", userId="ana"),
            make.organization_deleted(id="org"),
        ]
        ids = [each.id for each in add(run, [delivery(each.body) for each in bodies])]
        assert about(run, ANA) == [ids[0], ids[2], ids[4]]
        assert about(run, ORG) == ids[2:]
        assert about(run, ORG, ids[2], 2) == ids[3:5]
        assert about(run, Key("user", "nobody")) == []

    def test_what_is_known_of_a_record(self, run: Run) -> None:
        """With its memberships, ended ones included; nothing is made of what is unknown."""
        put(run, user(), present(there=False), user(BO))
        pair = membership("org", "ana")
        known = run(lambda store: store.inbox.known(ANA))
        assert known == run(lambda store: store.lock([pair, ANA]))
        assert list(run(lambda store: store.inbox.known(ORG))) == [pair]
        assert run(lambda store: store.inbox.known(Key("user", "nobody"))) == {}


def search(run: Run, **sought: Any) -> list[int]:
    return [each.id for each in run(lambda store: store.inbox.search(DeliveryFilter(**sought)))]


def about(run: Run, key: Key, after: int = 0, limit: int = 9) -> list[int]:
    return [each.id for each in run(lambda store: store.inbox.about(key, (), after, limit))]


def _save_gap(store: Store, place: int, gap: Gap) -> None:
    store.save_gap(place, gap)


class TestCheckpoints:
    def test_how_far_work_has_come_is_kept(self, run: Run) -> None:
        """By name; the last that was kept counts."""
        assert run(lambda store: store.checkpoint("one")) is None
        run(lambda store: store.save_checkpoint("one", Checkpoint(5, 1)))
        run(lambda store: store.save_checkpoint("one", Checkpoint(T0, 2)))
        assert run(lambda store: store.checkpoint("one")) == Checkpoint(T0, 2)
        assert run(lambda store: store.checkpoint("other")) is None

    def test_who_holds_a_lease_is_kept(self, run: Run) -> None:
        """By name; the last that was kept counts."""
        assert run(lambda store: store.lease("one")) is None
        run(lambda store: store.save_lease("one", ProcessLease(1, T0)))
        run(lambda store: store.save_lease("one", ProcessLease(2**40, T0 + 1)))
        assert run(lambda store: store.lease("one")) == ProcessLease(2**40, T0 + 1)
        assert run(lambda store: store.lease("other")) is None

    def test_the_flow_is_kept_with_its_gaps(self, run: Run) -> None:
        """A gap takes the place of an earlier one."""
        assert run(lambda store: store.flow()) == RecordedFlow()
        known = RecordedFlow(began=T0, last=T0 + 9, silent_since=T0 + 5)
        run(lambda store: store.save_flow(known))
        for place, gap in [(1, Gap(T0, 3)), (2, Gap(T0 + 1, 4)), (1, Gap(T0 + 2, 5))]:
            run(partial(_save_gap, place=place, gap=gap))
        found = run(lambda store: store.flow())
        assert replace(found, gaps=()) == known
        assert set(found.gaps) == {Gap(T0 + 1, 4), Gap(T0 + 2, 5)}
        assert run(lambda store: store.status()).silent_since == T0 + 5

    def test_since_when_it_is_installed_is_kept(self, run: Run) -> None:
        """Till it is set."""
        run(lambda store: store.set_installed_at(T0))
        assert run(lambda store: store.installed_at()) == T0
        assert run(lambda store: store.clock()).installed == T0

    def test_what_log_brought_back_is_counted(self, run: Run) -> None:
        """And up to when the copy is complete."""
        assert run(lambda store: store.status()).complete_up_to is None
        run(lambda store: store.save_checkpoint("recover", Checkpoint(T0, 7)))
        run(lambda store: store.save_checkpoint("reconcile", Checkpoint(T0 + 1, 0)))
        status = run(lambda store: store.status())
        assert (status.complete_up_to, status.recovered) == (T0, 7)
        assert status.reconciled_at == T0 + 1

    def test_the_newest_bodies_come_first(self, run: Run) -> None:
        """No more than asked for."""
        new = [delivery(make.user_created(id=name).body) for name in ("ana", "bo", "cy")]
        run(lambda store: store.add(new))
        assert [each.body for each in run(lambda store: store.recent(2))] == [
            new[2].body,
            new[1].body,
        ]


class TestRecords:
    def test_of_an_unknown_record_there_is_an_empty_stub(self, run: Run) -> None:
        """Saved, it has a local id that it keeps, and waits for all."""
        stub = run(lambda store: store.lock([ANA]))[ANA]
        assert stub == Record(ANA, local_id=stub.local_id)
        run(lambda store: store.save([stub]))
        kept = run(lambda store: store.lock([ANA]))[ANA]
        assert kept == Record(ANA, local_id=kept.local_id)
        assert kept.kept
        run(lambda store: store.save([kept]))
        assert run(lambda store: store.lock([ANA])) == {ANA: kept}
        assert [each.key for each in run(lambda store: store.waiting(9))] == [ANA]

    def test_a_record_that_was_read_without_its_contents_is_not_saved(self, run: Run) -> None:
        """It would lose them."""
        put(run, user(at=T0, name="Ana"))
        head = run(lambda store: store.read_heads([ANA]))[ANA]
        with pytest.raises(RowRejected):
            run(lambda store: store.save([head]))
        assert put(run, user(at=T0 - 5, name="older"))[ANA].groups["own"].content["name"] == "Ana"

    def test_a_record_is_read_as_it_was_written(self, run: Run) -> None:
        """Groups, rivals, facts, needs and the tombstone."""
        part = Upsert(ANA, {"custom_data": Value({"a": [1, None, "ü\0"]}, T0, T0 - 100, T0)})
        older = user(at=T0 - 5, name="older")
        written = put(
            run, user(), part, older, RefetchRequest(ANA, "members", T0), Tombstone(ANA, T0 + 1)
        )
        assert written[ANA].groups["own"].ends[0] != written[ANA].groups["own"].ends[1]
        assert run(lambda store: store.lock([ANA])) == written

    def test_many_records_can_be_locked_at_once(self, run: Run) -> None:
        """More than a database takes as parameters of one statement."""
        keys = [Key("user", f"u{number:05}") for number in range(5_100)]
        assert list(run(lambda store: store.lock(keys))) == keys

    def test_memberships_end_with_either_end(self, run: Run) -> None:
        """At the time of the deletion, the later of two; nothing is asked about them."""
        keys = [membership("org", "ana"), membership("org", "bo"), membership("other", "ana")]
        values = {"present": Value(True, T0, T0 - 100, T0)}
        put(run, user(), *[Upsert(key, values) for key in keys])
        put(run, Upsert(keys[0], {"present": Value(False, T0 + 1, T0 - 99, T0 + 1)}))
        for end, at in ((ORG, T0 + 7), (ANA, T0 + 5)):
            dropped = put(run, Tombstone(end, at))[end]
            run(partial(drop, dropped))
        records = run(lambda store: store.lock(keys))
        ended = [records[key].deleted_at for key in keys]
        assert ended == [T0 + 7, T0 + 7, T0 + 5]
        assert not [each for each in run(lambda store: store.waiting(9)) if each.key in keys]
        assert find(run, "ana")[0].memberships == []
        assert find(run, "ana")[0].memberships_in_doubt == []

    def test_waiting_lists_who_waits_longest_first(self, run: Run) -> None:
        """And says why; nobody who is complete and undoubted."""
        put(run, Upsert(ANA, {"profile": Value({}, T0, T0, T0)}))
        put(run, user(BO, name="one"), user(BO, name="two"))
        ana, bo = run(lambda store: store.waiting(10))
        assert (ana.key, ana.reason, ana.doubtful) == (ANA, "incomplete", False)
        assert (bo.key, bo.reason, bo.doubtful) == (BO, "doubtful: own", True)
        assert len(run(lambda store: store.waiting(1))) == 1
        status = run(lambda store: store.status())
        assert (status.doubtful, status.refetch) == (1, 2)
        put(run, user())
        assert [each.key for each in run(lambda store: store.waiting(10))] == [BO]

    def test_waiting_reads_in_the_order_of_its_indexes(self, run: Run) -> None:
        """However many wait: each step reads the first of them, and all organizations to list."""
        put(run, Upsert(ANA, {"profile": Value({}, T0, T0, T0)}))
        longest, organizations = run(partial(explain, work=lambda store: store.waiting(1)))
        assert "logto_records_refetch" in longest
        assert "logto_records_refetch_kind" in organizations
        for plan in (longest, organizations):
            assert "Sort" not in plan, plan
            assert "TEMP B-TREE" not in plan, plan


class TestMirror:
    def test_a_user_is_found_by_all_its_names(self, run: Run) -> None:
        """Logto id, local id, email in any case, phone, username; else by a part of them."""
        local_id = put(run, user(), user(BO, **NOBODY))[ANA].local_id
        for query in ("ana", local_id, "ana@example.COM", "4912345", "100%", "exAMPle", "ana@"):
            [found] = find(run, query)
            assert found.row["id"] == local_id
        assert find(run, "nobody") == []
        assert len(run(lambda store: store.find("user", "", 10))) == 2
        assert len(run(lambda store: store.find("user", "", 1))) == 1

    def test_a_row_has_all_columns(self, run: Run) -> None:
        """Times in milliseconds, Logto's customData with the user's id in it."""
        put(run, user(), Upsert(ANA, {"custom_data": Value({"n": 1}, T0, T0, T0)}))
        [found] = find(run, "ana")
        row = dict(found.row)
        assert row.pop("id")
        assert row == {
            "logto_user_id": "ana",
            "username": "ana",
            "email": "Ana@Example.com",
            "phone": "4912345",
            "name": "Ana 100% Lima",
            "avatar": None,
            "identities": {"google": {"userId": "g"}},
            "profile": {},
            "custom_data": {"n": 1, "logtoUserId": "ana"},
            "is_suspended": False,
            "last_sign_in_at": None,
            "created_at": T0,
            "updated_at": T0,
            "deleted_at": None,
        }

    def test_a_changed_row_keeps_its_local_id(self, run: Run) -> None:
        """An application can point to it for ever."""
        local_id = put(run, user())[ANA].local_id
        put(run, user(at=T0 + 1000, name="New"))
        [found] = find(run, "ana")
        assert (found.row["id"], found.row["name"]) == (local_id, "New")

    def test_an_organization_lists_its_members(self, run: Run) -> None:
        """And a user its organizations, as long as they are members."""
        content = {"name": "Org", "description": None, "customData": {"n": 1}}
        organization = Upsert(ORG, {"own": Value(content, T0, T0, T0)}, {"updatedAt": T0})
        put(run, organization, user(), present())
        [found] = run(lambda store: store.find("organization", "org", 10))
        assert (found.row["name"], found.memberships) == ("Org", ["ana"])
        [found] = find(run, "ana")
        assert found.memberships == ["org"]
        put(run, present(T0 + 1000, there=False))
        [found] = run(lambda store: store.find("organization", "org", 10))
        assert found.memberships == []

    def test_a_deleted_user_keeps_its_row(self, run: Run) -> None:
        """With the time of its deletion."""
        put(run, user(), Tombstone(ANA, T0 + 5))
        [found] = find(run, "ana")
        assert found.row["deleted_at"] == T0 + 5

    def test_a_user_of_whom_only_a_part_is_known_has_no_row(self, run: Run) -> None:
        """It waits for a read instead."""
        put(run, Upsert(ANA, {"custom_data": Value({}, T0, T0, T0)}))
        assert find(run, "ana") == []


def test_unread_records_are_looked_for_in_pieces(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among a million that were read, a query for those that weren't would take minutes."""
    monkeypatch.setattr(records, "LOOKED", 3)
    keys = [Key("user", f"u{number}") for number in range(8)]
    read_at = {key: T0 if key.id in ("u1", "u6", "u7") else T0 + 10 for key in keys}
    reads = [Absent(key, at, at) for key, at in read_at.items()]
    run(lambda store: batch.apply_reads(store, reads, None))
    pieces: list[list[str]] = []
    after: str | None = ""
    while after is not None:
        found, after = run(partial(Store.unread_keys, kind="user", since=T0 + 5, after=after))
        pieces.append([key.id for key in found])
    assert pieces == [["u1"], [], ["u6", "u7"]]
