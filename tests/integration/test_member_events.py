"""`LocalMemberAdded` and `LocalMemberRemoved`: once per change, when both ends are here."""

from __future__ import annotations

import asyncio
import itertools
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import batch
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.jobs import JobFilter, JobState, RegisteredHandler
from logto_webhooks.records.record import MEMBERS, Absent, ApiRead, Change, Key, membership
from logto_webhooks.testing import make
from tests.integration.conftest import Run
from tests.support.jobs import claim, finish
from tests.support.stores import ALL, Copy, open_host
from tests.support.waiting import until

# Of those that wait for a lock, the ones that this transaction holds up.
BLOCKED = sa.text(
    "SELECT count(*) FROM pg_locks "
    "WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
)

SINCE = 1_000_000
OWN = {"username": None, "primaryEmail": None, "primaryPhone": None, "name": None, "avatar": None}
LOCAL = RegisteredHandler(name="local", patterns=("Local*",))
USER, ORGANIZATION = Key("user", "ana"), Key("organization", "acme")
PAIR = membership("acme", "ana")


@pytest.fixture(autouse=True)
def known(run: Run) -> None:
    know(run)


def know(run: Run, since: int = 0) -> None:
    run(lambda store: store.jobs.register([LOCAL]))
    run(lambda store: store.set_installed_at(since))


def names(store: Store) -> list[str]:
    """The events of which there are jobs, the oldest first."""
    return [job.event for job in reversed(store.jobs.find(JobFilter(limit=ALL)))]


def member_events(run: Run) -> list[str]:
    return [name for name in run(names) if "Member" in name]


def user(at: int, born: int) -> ApiRead:
    return ApiRead(USER, {"own": {**OWN, "identities": {}}}, at, at + 1, {"createdAt": born})


def organization(at: int, born: int, *, listed: bool = False) -> ApiRead:
    content: dict[str, object] = {"name": "Acme", "description": None, "customData": {}}
    settles = (MEMBERS,) if listed else ()
    return ApiRead(ORGANIZATION, {"own": content}, at, at + 1, {"createdAt": born}, settles)


def member(at: int, present: bool = True) -> ApiRead:
    return ApiRead(PAIR, {"present": present}, at, at + 1)


def read(run: Run, *changes: Change) -> list[str]:
    """Apply what Logto answered; return the events of memberships that it made."""
    before = len(member_events(run))
    run(partial(batch.apply_reads, changes=changes, source="read"))
    return member_events(run)[before:]


def change(host: TransactionRunner, at: int, **fields: Any) -> None:
    """Apply a webhook of a change of members."""
    sent = make.organization_membership_updated(id="acme", at=at, **fields)
    asyncio.run(Copy(host).take([sent.body]))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("at_once", [False, True])
def test_it_comes_with_the_last_of_the_three(
    order: tuple[int, ...], at_once: bool, host: TransactionRunner, run: Run
) -> None:
    """A user, an organization, a membership, in any order, at once or one by one."""
    bodies = [
        make.user_created(id="ana").body,
        make.event("Organization.Created", id="acme", name="Acme").body,
        make.event(
            "Organization.Membership.Updated", organizationId="acme", addedUserIds=["ana"]
        ).body,
    ]
    copy = Copy(host)
    batches = [bodies] if at_once else [[bodies[number]] for number in order]
    for number, bodies in enumerate(batches):
        asyncio.run(copy.take([bodies[place] for place in order] if at_once else bodies))
        is_last = number == len(batches) - 1
        assert member_events(run) == (["LocalMemberAdded"] if is_last else [])
    made = run(names)
    for created in ("LocalUserCreated", "LocalOrganizationCreated"):
        assert made.index(created) < made.index("LocalMemberAdded")
    ran = []
    while jobs := [job for job in claim(run, names=("local",)) if job.subject == "user:ana"]:
        ran += [job.event for job in jobs]
        finish(run, jobs[0], JobState.DONE)
    assert ran == ["LocalUserCreated", "LocalMemberAdded"], "in the queue of the user"
    asyncio.run(copy.take([make.user_deleted(id="ana").body]))
    assert member_events(run) == ["LocalMemberAdded", "LocalMemberRemoved"]


def test_what_was_never_told_is_not_taken_back(host: TransactionRunner, run: Run) -> None:
    """The membership of a user who never came."""
    joined = make.event(
        "Organization.Membership.Updated", organizationId="acme", addedUserIds=["ana"]
    )
    created = make.event("Organization.Created", id="acme", name="Acme")
    copy = Copy(host)
    asyncio.run(copy.take([created.body, joined.body]))
    asyncio.run(copy.take([make.event("Organization.Deleted", id="acme").body]))
    assert member_events(run) == []


@pytest.mark.postgres
def test_ends_that_come_in_two_transactions_at_once(tmp_path: Path) -> None:
    """The later one waits for the earlier, and sees its end (PostgreSQL)."""

    async def body() -> None:
        host, other = open_host("postgres-thread", tmp_path), open_host("postgres-thread", tmp_path)
        await host.run(lambda store: store.jobs.register([LOCAL]))
        await host.run(lambda store: store.set_installed_at(0))
        await host.run(partial(batch.apply_reads, changes=[member(5)], source="read"))
        applied = threading.Event()

        def slowly(store: Store) -> None:
            batch.apply_reads(store, [user(6, born=6)], "read")
            applied.set()
            until(lambda: bool(store._connection.scalar(BLOCKED)))

        first = asyncio.create_task(host.run(slowly))
        await asyncio.to_thread(applied.wait)
        change = organization(6, born=6)
        await other.run(partial(batch.apply_reads, changes=[change], source="read"))
        await first
        assert (await host.read(names)).count("LocalMemberAdded") == 1
        await host.close()
        await other.close()

    asyncio.run(body())


class TestReadsAfterAnInstallation:
    """No comparison of all records came before."""

    @pytest.fixture(autouse=True)
    def installed(self, known: None, run: Run) -> None:
        know(run, SINCE)

    def test_members_of_before_are_quiet(self, run: Run) -> None:
        """So are they when one end, which was before the installation, comes here later."""
        old = SINCE - 10
        assert read(run, organization(SINCE + 5, old), member(SINCE + 5)) == []
        assert read(run, user(SINCE + 6, old)) == []

    def test_who_was_not_in_an_earlier_list_has_joined(self, run: Run) -> None:
        old = SINCE - 10
        ends = [user(SINCE + 5, old), organization(SINCE + 5, old, listed=True)]
        assert read(run, *ends) == []
        assert read(run, member(SINCE + 9)) == ["LocalMemberAdded"]
        assert read(run, member(SINCE + 12, present=False)) == ["LocalMemberRemoved"]
        assert read(run, member(SINCE + 15)) == ["LocalMemberAdded"]

    def test_a_new_user_joined_after_it(self, run: Run) -> None:
        """In whichever order they are read."""
        assert read(run, organization(SINCE + 5, SINCE - 10), member(SINCE + 5)) == []
        assert read(run, user(SINCE + 6, SINCE + 2)) == ["LocalMemberAdded"]

    def test_whose_member_was_known_has_left(self, run: Run) -> None:
        """An answer said so after the installation; also when the user is found to be gone."""
        old = SINCE - 10
        read(run, user(SINCE + 5, old), organization(SINCE + 5, old), member(SINCE + 5))
        assert read(run, Absent(USER, SINCE + 9, SINCE + 9)) == ["LocalMemberRemoved"]
        assert "LocalUserDeleted" in run(names)

    @pytest.mark.parametrize("gone", [USER, ORGANIZATION])
    @pytest.mark.parametrize("few", [500, 0])
    def test_who_joined_after_it_has_left(
        self,
        run: Run,
        host: TransactionRunner,
        gone: Key,
        few: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Also if only the membership shows that a user or an organization of before was deleted
        after it."""
        monkeypatch.setattr(batch, "FEW", few)
        old = SINCE - 10
        read(run, user(SINCE - 9, old), organization(SINCE - 9, old))
        change(host, at=SINCE + 100, addedUserIds=["ana"])
        read(run, Absent(gone, SINCE + 900, SINCE + 900))
        asyncio.run(Copy(host).take([]))  # ends those that are ended in steps
        assert member_events(run) == ["LocalMemberAdded", "LocalMemberRemoved"]
        assert run(names)[1].endswith("Deleted")

    def test_who_left_after_it_has_joined_again(self, run: Run, host: TransactionRunner) -> None:
        """Whenever the first time was."""
        old = SINCE - 1000
        read(run, user(old, old), organization(old, old))
        change(host, at=SINCE - 500, addedUserIds=["ana"])
        change(host, at=SINCE + 500, removedUserIds=["ana"])
        assert member_events(run) == ["LocalMemberRemoved"]
        assert read(run, member(SINCE + 900)) == ["LocalMemberAdded"]

    def test_whose_user_was_restored_after_it_has_joined_again(
        self, run: Run, host: TransactionRunner
    ) -> None:
        """It was deleted after the installation, and so were its memberships."""
        old = SINCE - 1000
        read(run, user(old, old), organization(old, old), member(old))
        asyncio.run(Copy(host).take([make.user_deleted(id="ana", at=SINCE + 100).body]))
        assert member_events(run) == ["LocalMemberRemoved"]
        back = SINCE + 100_000
        assert read(run, user(back, old), member(back)) == ["LocalMemberAdded"]
        assert run(names)[-2] == "LocalUserCreated"

    def test_what_changed_before_it_is_quiet(self, run: Run) -> None:
        """Known from a delivery of before, and then found to be otherwise: nobody knows since
        when."""
        old = SINCE - 10
        read(run, user(SINCE - 9, old), organization(SINCE - 9, old), member(SINCE - 9))
        assert read(run, member(SINCE + 5, present=False)) == []
