"""All records beside all that Logto lists."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks.clock import SystemClock
from logto_webhooks.database.records import FoundRow
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.errors import LogtoApiError, LogtoUnreachable, WrongTenant
from logto_webhooks.instrumentation import Reconciled, TelemetryEvent
from logto_webhooks.logto.api_responses import ApiResponse, make_span_clock
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.reconcile.fetch import compare_and_request_refetch
from logto_webhooks.reconcile.leader import LeaderLease
from logto_webhooks.reconcile.reconcile import ReconcileResult, Reconciliation
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.records.record import Key
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import Refusing, asking, credentials, mirroring, serving
from tests.support.service import command
from tests.support.stores import Copy, StoreKind, open_host
from tests.support.waiting import eventually

KINDS: tuple[StoreKind, ...] = ("sqlite", "asyncpg")


def told(found: ReconcileResult) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(each.kind, each.id, each.fields) for each in found.drifts]


async def users(host: TransactionRunner) -> dict[str, FoundRow]:
    found = await host.read(lambda store: store.find("user", "", 10_000))
    return {each.row["logto_user_id"]: each for each in found if each.row["deleted_at"] is None}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_database_is_filled(kind: StoreKind, tmp_path: Path) -> None:
    """Users, organizations and members; a second look finds nothing."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as logto, asking(logto) as api:
            ids = [logto.create_user()["id"] for _ in range(230)]
            acme = logto.create_organization(name="Acme")["id"]
            logto.add_members(acme, ids[:120])
            first = await Reconciliation(api, host, FrozenClock()).run()
            assert (first.users, first.organizations, first.members) == (230, 1, 120)
            assert first.drifted == 230 + 1 + 120
            assert set(await users(host)) == set(ids)
            [found] = await host.read(lambda store: store.find("organization", acme, 1))
            assert found.memberships == sorted(ids[:120])
            assert (await Reconciliation(api, host, FrozenClock()).run()).drifted == 0
        assert await host.read(lambda store: store.waiting(10)) == []
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", ["sqlite", "psycopg"])
def test_a_difference_that_is_shown_is_mended(kind: StoreKind, tmp_path: Path) -> None:
    """Comparing one user notes that Logto must be asked again, about roles, too."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            ana = logto.create_user(name="Ana")["id"]
            await Reconciliation(api, host, SystemClock()).run()
            logto.assign_role(ana, "admin")
            logto.set_identities(ana, {"google": {"userId": "g1", "details": {}}})
            sides = await compare_and_request_refetch(api, host, ana, await make_span_clock(host))
            assert sides.differ == ["identities", "roles"]
            [waiting] = await host.read(lambda store: store.waiting(10))
            assert waiting.key == Key("user", ana)
            await Refetcher(api, host, lambda report: None).drain()
            sides = await compare_and_request_refetch(api, host, ana, await make_span_clock(host))
            assert sides.differ == []
            assert await host.read(lambda store: store.waiting(10)) == []
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_what_logto_never_told_is_mended(kind: StoreKind, tmp_path: Path) -> None:
    """A change, a deletion, a member who left: a dry run tells, and changes nothing."""

    async def live() -> None:
        async with mirroring(kind, tmp_path) as (host, clock, logto, api):
            ana, bo, cy = (logto.create_user(name="Before")["id"] for _ in range(3))
            acme = logto.create_organization()["id"]
            logto.add_members(acme, [ana, bo])
            await Reconciliation(api, host, FrozenClock()).run()
            clock.tick(60)
            logto.update_user(ana, name="After")
            logto.remove_members(acme, [bo])
            logto.delete_user(cy)
            expected = {
                ("user", ana, ("name",)),
                ("user", cy, ("deleted",)),
                ("membership", f"{acme}:{bo}", ("deleted",)),
            }
            dry = await Reconciliation(api, host, FrozenClock()).run(dry_run=True)
            assert set(told(dry)) == expected
            assert (await users(host))[ana].row["name"] == "Before"
            wet = await Reconciliation(api, host, FrozenClock()).run()
            assert told(wet) == told(dry)
            now = await users(host)
            assert set(now) == {ana, bo}
            assert now[ana].row["name"] == "After"
            assert now[bo].memberships == []

    asyncio.run(live())


class Empty(ManagementClient):
    """Lists nobody, as something between Logto and us may."""

    async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        async for answered in super().users(page):
            yield ApiResponse(
                content=[], asked_at=answered.asked_at, took=0, date=answered.date, total=0
            )
            return


class Shifting(ManagementClient):
    """Somebody is deleted between two pages: the others move up, and one is in neither."""

    logto: FakeLogto
    gone: str

    async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        async for answered in super().users(page):
            yield answered
            if self.gone:
                self.logto.delete_user(self.gone)
                self.gone = ""


def test_an_empty_listing_deletes_nobody(tmp_path: Path) -> None:
    """Each is asked about alone."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        clock = FrozenClock()
        async with (
            FakeLogto(now=clock.now) as logto,
            asking(logto) as api,
            asking(logto, Empty) as empty,
        ):
            ana = logto.create_user()["id"]
            await Reconciliation(api, host, FrozenClock()).run()
            clock.tick(60)
            assert (await Reconciliation(empty, host, FrozenClock()).run()).drifted == 0
            assert set(await users(host)) == {ana}
        await host.close()

    asyncio.run(live())


def test_who_shifts_between_pages_is_found(tmp_path: Path) -> None:
    """Also if nothing of them is known here: the total fell, so the page before is read again."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path, Shifting) as (host, _, logto, api):
            ids = [logto.create_user()["id"] for _ in range(150)]
            assert isinstance(api, Shifting)
            api.logto, api.gone = logto, ids[-1]
            found = await Reconciliation(api, host, FrozenClock()).run()
            assert (found.users, found.doubts) == (150, [])
            # Who was deleted after being listed is for its own webhook to tell.
            assert set(await users(host)) == set(ids)
            records = await host.run(lambda store: store.lock([Key("user", each) for each in ids]))
            assert all(record.read_at for record in records.values())

    asyncio.run(live())


def test_one_user_can_be_looked_at_alone(tmp_path: Path) -> None:
    """And what differs is told."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path) as (host, _, logto, api):
            ana: dict[str, Any] = logto.create_user(name="Ana")
            found = await Reconciliation(api, host, FrozenClock()).one_user(ana["id"])
            assert told(found) == [("user", ana["id"], ("missing",))]
            assert (await Reconciliation(api, host, FrozenClock()).one_user(ana["id"])).drifted == 0

    asyncio.run(live())


@pytest.mark.process
def test_the_command_tells_what_differed(tmp_path: Path) -> None:
    """As JSON and as a table; one user by email; nobody twice."""

    async def run(logto: FakeLogto, *arguments: str) -> str:
        given = credentials(logto)
        done = await asyncio.to_thread(command, "reconcile", *arguments, folder=tmp_path, **given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def live() -> None:
        await asyncio.to_thread(command, "migrate", folder=tmp_path)
        async with FakeLogto() as logto:
            ana = logto.create_user(primaryEmail="ana@example.com", name="Ana")["id"]
            assert "1" in await run(logto, "--dry-run")
            found = msgspec.json.decode(await run(logto, "--json"))
            [drift] = found["drifts"]
            assert (drift["id"], drift["fields"]) == (ana, ["missing"])
            assert "delivery was lost" in drift["reason"]
            assert msgspec.json.decode(await run(logto, "--json"))["drifted"] == 0
            one = msgspec.json.decode(await run(logto, "--user", "ana@example.com", "--json"))
            assert one["users"] == 1

    asyncio.run(live())


def test_another_logto_deletes_nobody(tmp_path: Path) -> None:
    """A wrong endpoint is likelier than that everybody is gone."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as ours, asking(ours) as api:
            ids = {ours.create_user()["id"] for _ in range(5)}
            await Reconciliation(api, host, FrozenClock()).run()
        clock.tick(60)
        async with FakeLogto(now=clock.now, seed=9) as other, asking(other) as wrong:
            stranger = other.create_user()["id"]
            for _ in range(2):
                with pytest.raises(WrongTenant, match="LOGTO_ENDPOINT"):
                    await Reconciliation(wrong, host, FrozenClock()).run()
                for one in (stranger, min(ids)):
                    with pytest.raises(WrongTenant):
                        await Reconciliation(wrong, host, FrozenClock()).one_user(one)
        assert ids == set(await users(host))
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_silently_comes_along(kind: StoreKind, tmp_path: Path) -> None:
    """Identities, roles and members' roles, as they come and go, and with the user."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as logto, asking(logto) as api:
            ana, bo = (logto.create_user()["id"] for _ in range(2))
            acme = logto.create_organization()["id"]
            logto.add_members(acme, [ana, bo])

            async def looked() -> set[tuple[str, tuple[str, ...], str]]:
                clock.tick(60)
                found = await Reconciliation(api, host, clock).run()
                assert found.doubts == []
                return {(each.id, each.fields, each.reason) for each in found.drifts}

            await looked()
            logto.set_identities(ana, {"google": {"userId": "g1", "details": {"a": "\0b"}}})
            logto.assign_role(ana, "admin")
            logto.assign_role(ana, "guest")
            logto.assign_organization_role(acme, bo, "owner")
            silent = "Logto sends no webhook when these change"
            assert await looked() == {
                (f"{acme}:{bo}", ("organization_roles",), silent),
                (ana, ("identities",), silent),
                (ana, ("roles",), silent),
            }
            assert (await users(host))[ana].roles == ["admin", "guest"]
            sides = await compare_and_request_refetch(api, host, ana, await make_span_clock(host))
            assert sides.differ == []
            assert sides.logto
            assert sides.logto["roles"] == ["admin", "guest"]
            logto.remove_role(ana, "guest")
            assert await looked() == {(ana, ("roles",), silent)}
            assert (await users(host))[ana].roles == ["admin"]
            logto.delete_user(ana)
            assert [each[:2] for each in await looked()] == [(ana, ("deleted",))]
            assert ana not in await users(host)
            assert await host.read(
                lambda store: store.unread_keys("user", 10**13, with_roles=True)
            ) == ([], None)
        assert await host.read(lambda store: store.waiting(10)) == []
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user_id", ["nobody", "..", "x:y", "x" * 3000])
def test_nobody_is_nobody(kind: StoreKind, user_id: str, tmp_path: Path) -> None:
    """Neither known here nor at Logto: nothing is written, and it is said."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            found = await Reconciliation(api, host, FrozenClock()).one_user(user_id)
            assert (found.users, found.drifted) == (0, 0)
        key = Key("user", user_id)
        assert await host.read(lambda store: store.inbox.known(key)) == {}
        await host.close()

    asyncio.run(live())


class Swapping(ManagementClient):
    """After the first page of members one leaves, and another joins at the end."""

    logto: FakeLogto
    leaves: str
    joins: str

    async def members(self, organization_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        async for answered in super().members(organization_id, page):
            yield answered
            if self.leaves:
                self.logto.remove_members(organization_id, [self.leaves])
                self.logto.add_members(organization_id, [self.joins])
                self.leaves = ""


@pytest.mark.slow
def test_a_member_who_slips_through_stays(tmp_path: Path) -> None:
    """The total is the same: who isn't listed is asked about alone."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path, Swapping) as (host, clock, logto, api):
            assert isinstance(api, Swapping)
            ids = sorted(logto.create_user()["id"] for _ in range(251))
            acme = logto.create_organization()["id"]
            logto.add_members(acme, ids[:250])
            api.logto, api.leaves, api.joins = logto, "", ids[250]
            await Reconciliation(api, host, clock).run()
            clock.tick(60)
            api.leaves = ids[0]
            await Reconciliation(api, host, clock).run()
            [found] = await host.read(lambda store: store.find("organization", acme, 1))
            assert set(found.memberships) == set(ids[:251])  # who left is for the next look
            clock.tick(60)
            await Reconciliation(api, host, clock).run()
            [found] = await host.read(lambda store: store.find("organization", acme, 1))
            assert set(found.memberships) == set(ids[1:])

    asyncio.run(live())


def test_roles_of_who_joined_while_listed_are_there(tmp_path: Path) -> None:
    """The webhook of joining comes after the list that has the role; and who left and joined
    again later is asked about."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path) as (host, clock, logto, api):
            ana, acme = logto.create_user()["id"], logto.create_organization()["id"]
            logto.add_members(acme, [ana])
            logto.assign_organization_role(acme, ana, "owner")
            joined = clock.now()
            await Reconciliation(api, host, clock).run()
            copy = Copy(host)

            async def roles() -> dict[str, list[str]]:
                sides = await compare_and_request_refetch(
                    api, host, ana, await make_span_clock(host)
                )
                assert sides.ours
                told: dict[str, list[str]] = sides.ours["organizations"]
                return told

            def came(at: int) -> list[bytes]:
                made = make.organization_membership_updated(id=acme, at=at, addedUserIds=[ana])
                return [made.body]

            await copy.take(came(joined))
            assert await roles() == {acme: ["owner"]}
            await copy.take(came(joined + 60_000))
            assert await roles() == {acme: []}
            waiting = await host.read(lambda store: store.waiting(10))
            of_ana = ("user", "restored; unknown change")  # noted by the comparison in `roles`
            needs = {(need.key.kind, need.reason) for need in waiting}
            assert needs == {("membership", "roles"), of_ana}

    asyncio.run(live())


def test_a_dry_run_sees_a_role_that_is_gone(tmp_path: Path) -> None:
    """Beside one that is still there."""

    async def live() -> None:
        async with mirroring("sqlite", tmp_path) as (host, clock, logto, api):
            ana = logto.create_user()["id"]
            logto.assign_role(ana, "admin")
            logto.assign_role(ana, "guest")
            await Reconciliation(api, host, clock).run()
            asked = clock.now()
            clock.tick(60)
            logto.remove_role(ana, "guest")
            [drift] = (await Reconciliation(api, host, clock).run(dry_run=True)).drifts
            assert drift.fields == ("roles",)
            assert drift.since is not None
            assert drift.since <= asked

    asyncio.run(live())


class Falling(ManagementClient):
    """Before the fourth page the sixty newest are deleted; then Logto is down."""

    logto: FakeLogto
    newest: list[str]

    async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        async for answered in super().users(page):
            yield answered
            page += 1
            if page == 4 and self.newest:
                for each in self.newest:
                    self.logto.delete_user(each)
                self.newest = []
            elif page == 5 or (page == 4 and not self.newest):
                raise LogtoUnreachable(endpoint="", problem="down")


@pytest.mark.slow
def test_who_slips_away_while_it_is_killed_is_found(tmp_path: Path) -> None:
    """The fall is seen again by who goes on."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as logto:
            ids = [logto.create_user()["id"] for _ in range(1000)]
            async with asking(logto, Falling) as api:
                assert isinstance(api, Falling)
                api.logto, api.newest = logto, ids[-60:]
                with pytest.raises(LogtoUnreachable):
                    await Reconciliation(api, host, clock).run()
            clock.tick(10)
            async with asking(logto) as api:
                found = await Reconciliation(api, host, clock).run()
            assert found.resumed
            assert set(ids[:-60]) <= set(await users(host))
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_a_record_that_a_comparison_would_have_listed_is_doubtful(
    kind: StoreKind, tmp_path: Path
) -> None:
    """Its creation is applied, or recovered, after the comparison; its deletion was lost."""

    async def live() -> None:
        async with mirroring(kind, tmp_path) as (host, clock, logto, api):
            bo = logto.create_user(name="Bo")["id"]
            await Reconciliation(api, host, clock).run()
            clock.tick(60)
            ana = make.user_created(id="ana", at=clock.now())
            acme = make.event("Organization.Created", id="acme", at=clock.now())
            clock.tick(60)
            await Reconciliation(api, host, clock).run()
            later = make.user_created(id="later", at=clock.now() + 60_000)
            await Copy(host).take([each.body for each in (ana, acme, later)])
            waiting = await host.read(lambda store: store.waiting(10))
            needs = {need.key.id: need.reason for need in waiting}
            assert needs == {"ana": "doubtful: unlisted", "acme": "doubtful: unlisted"}
            clock.tick(60)
            await Refetcher(api, host, lambda report: None).drain()
            assert set(await users(host)) == {bo, "later"}
            assert await host.read(lambda store: store.waiting(10)) == []

    asyncio.run(live())


@pytest.mark.slow
def test_a_command_resumes_no_run_of_a_service(tmp_path: Path) -> None:
    """Somebody runs it after an outage, which the service's run was before."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as logto:
            ids = [logto.create_user()["id"] for _ in range(1000)]
            async with asking(logto, Falling) as api:
                assert isinstance(api, Falling)
                api.logto, api.newest = logto, []
                with pytest.raises(LogtoUnreachable):
                    await Reconciliation(api, host, clock).run()
            clock.tick(10)
            logto.update_user(ids[-1], name="Changed")
            async with asking(logto) as api:
                found = await Reconciliation(api, host, clock, name="by command").run()
                assert (found.resumed, found.users, found.fields["name"]) == (False, 1000, 1)
                assert (await Reconciliation(api, host, clock).run()).resumed
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_what_is_odd_about_one_keeps_no_other_away(kind: StoreKind, tmp_path: Path) -> None:
    """Malformed roles and custom data; deep custom data and a very long name are taken."""

    async def live() -> None:
        async with mirroring(kind, tmp_path) as (host, clock, logto, api):
            ids = [logto.create_user()["id"] for _ in range(120)]
            deep = msgspec.Raw(b'{"a":' * 1500 + b"1" + b"}" * 1500)
            logto._state.users.put(logto._state.user(ids[2]) | {"customData": deep})
            logto._state.users.put(logto._state.user(ids[3]) | {"customData": "no object"})
            long = "".join(random.Random(1).choices("0123456789abcdef", k=20_000))
            logto.update_user(ids[4], username=long)
            for name in ("A", "B"):
                acme = logto.create_organization(name=name)["id"]
                logto.add_members(acme, ids[10:12])
                odd: Any = [None, {"id": 5, "name": "x"}, {"id": "a", "name": None}]
                logto._state.members[acme][ids[10]] = odd
                logto._state.members[acme][ids[11]] = [{"id": "r", "name": "owner"}]
            found = await Reconciliation(api, host, clock).run()
            assert set(await users(host)) == set(ids) - {ids[3]}
            assert len(found.doubts) == 1
            assert (found.organizations, found.members) == (2, 4)

    asyncio.run(live())


class Cut(ManagementClient):
    """Its listing of users ends after the first page, whatever its total says."""

    async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        async for answered in super().users(page):
            yield answered
            return


def test_a_listing_that_is_cut_off_deletes_nobody(tmp_path: Path) -> None:
    """Who isn't in it is asked about alone; and it is told."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        clock = FrozenClock()
        async with (
            FakeLogto(now=clock.now) as logto,
            asking(logto) as api,
            asking(logto, Cut) as cut,
        ):
            ids = {logto.create_user()["id"] for _ in range(130)}
            logto.set_custom_data(min(ids), {"long": "x" * 3_600_000})
            await Reconciliation(api, host, clock).run()
            clock.tick(60)
            found = await Reconciliation(cut, host, clock).run()
            assert "30 users changed pages" in found.doubts[0]
            assert (set(await users(host)), found.drifted) == (ids, 0)
        await host.close()

    asyncio.run(live())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_costs_only_the_page_in_hand(kind: StoreKind, tmp_path: Path) -> None:
    """Five times in the middle; then all is there once, and the end is said to be as of the
    beginning."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as logto:
            logto.populate(950)
            acme = logto.create_organization()["id"]
            logto.add_members(acme, [f"user{number:08}" for number in range(250)])
            began = set()
            for number in range(5):
                async with asking(logto, dying_after(1 + number % 2)) as api:
                    with pytest.raises(LogtoUnreachable):
                        await Reconciliation(api, host, clock).run()
                clock.tick(10)
                reached = await host.read(lambda store: store.checkpoint("reconcile began"))
                assert reached
                began.add(reached.at)
            async with asking(logto) as api:
                found = await Reconciliation(api, host, clock).run()
            assert (found.resumed, found.doubts, began) == (True, [], {found.began})
            status = await host.read(lambda store: store.status())
            assert status.reconciled_at == found.began
            assert len(await users(host)) == 950
            [one] = await host.read(lambda store: store.find("organization", acme, 1))
            assert len(one.memberships) == 250
            async with asking(logto) as api:
                assert not (await Reconciliation(api, host, clock).run()).resumed
        await host.close()

    asyncio.run(live())


def dying_after(pages: int) -> type[ManagementClient]:
    """A client that dies when so many pages of users were read."""

    class Dying(ManagementClient):
        async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
            left = pages
            async for answered in super().users(page):
                left -= 1
                if left < 0:
                    raise LogtoUnreachable(endpoint="", problem="killed")
                yield answered

    return Dying


@pytest.mark.process
def test_serve_compares_by_itself(tmp_path: Path) -> None:
    """At its start, if it never did: an empty database is filled."""

    async def live() -> None:
        async with FakeLogto() as logto:
            ana = logto.create_user()["id"]
            every = {"LOGTO_WEBHOOKS_RECONCILE_EVERY_S": "3600"}
            async with serving(tmp_path, logto, **every) as service:
                line = await asyncio.to_thread(service.wait_for_log, "compared all records")
                assert "users=1" in line
                assert service.rows("SELECT logto_user_id FROM logto_users") == [(ana,)]

    asyncio.run(live())


@pytest.mark.slow
def test_one_of_two_asks(tmp_path: Path) -> None:
    """The other stands by, and takes over when the first ends."""

    async def live() -> None:
        host, clock = open_host("sqlite", tmp_path), FrozenClock()
        at_work: list[int] = []

        async def work(number: int) -> None:
            at_work.append(number)
            await asyncio.Event().wait()

        def turn(number: int) -> asyncio.Task[None]:
            kept = LeaderLease(host, clock, number).keep(lambda: work(number), lambda report: None)
            return asyncio.create_task(kept)

        async def worked() -> list[int]:
            return at_work

        first, second = turn(1), turn(2)
        await eventually(worked, lambda found: found == [1])
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await eventually(worked, lambda found: found == [1, 2])
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await host.close()

    asyncio.run(live())


@pytest.mark.process
def test_backfill_and_both_sides_of_one(tmp_path: Path) -> None:
    """As commands: one fills, the other shows what differs, and changes nothing."""

    async def run(logto: FakeLogto, *arguments: str) -> Any:
        given = credentials(logto)
        done = await asyncio.to_thread(command, *arguments, folder=tmp_path, **given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def live() -> None:
        await asyncio.to_thread(command, "migrate", folder=tmp_path)
        async with FakeLogto() as logto:
            ana = logto.create_user(primaryEmail="ana@example.com", name="Ana")["id"]
            logto.assign_role(ana, "admin")
            filled = msgspec.json.decode(await run(logto, "backfill", "--json"))
            assert (filled["users"], filled["roles"], filled["doubts"]) == (1, 1, [])
            assert "admin" in await run(logto, "users", "ana@example.com")
            logto.update_user(ana, name="Anna")
            query = ("users", "ana@example.com", "--ask-logto")
            for _ in range(2):
                sides = msgspec.json.decode(await run(logto, *query, "--json"))
                assert sides["differ"] == ["name"]
                assert (sides["ours"]["name"], sides["logto"]["name"]) == ("Ana", "Anna")
            assert "differs" in await run(logto, *query)
            assert "likely reason" in await run(logto, "reconcile", "--report")
            logto.delete_user(ana)
            sides = msgspec.json.decode(await run(logto, *query, "--json"))
            assert sides["logto"] is None

    asyncio.run(live())


@pytest.mark.process
def test_backfill_tells_what_it_deleted(tmp_path: Path) -> None:
    """In a database that isn't empty: whom this Logto doesn't have."""

    async def live() -> None:
        await asyncio.to_thread(command, "migrate", folder=tmp_path)
        async with FakeLogto() as logto:
            ids = [logto.create_user()["id"] for _ in range(3)]
            for deleted in ([], [("deleted", "2")]):
                given = credentials(logto)
                done = await asyncio.to_thread(command, "backfill", folder=tmp_path, **given)
                pairs = [tuple(line.split()) for line in done.stdout.splitlines()]
                assert [pair for pair in pairs if pair[0] == "deleted"] == deleted, done
                while len(ids) > 1:
                    logto.delete_user(ids.pop())

    asyncio.run(live())


class Odd(ManagementClient):
    """Lists items that no Logto has."""

    async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        async for answered in super().users(page):
            odd: list[Any] = [None, "x", {}, {"id": 5}, {"id": "a:b"}, {"id": "u", "name": 5}]
            odd += [{"id": []}, {"id": {}}]
            yield msgspec.structs.replace(answered, content=[*answered.content, *odd])


def test_an_odd_item_stops_nothing(tmp_path: Path) -> None:
    """It is told, and all others are compared."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        async with FakeLogto() as logto, asking(logto, Odd) as api:
            ana = logto.create_user()["id"]
            logto.create_organization()
            found = await Reconciliation(api, host, FrozenClock()).run()
            assert len(found.doubts) == 8
            assert (found.organizations, set(await users(host))) == (1, {ana})
        await host.close()

    asyncio.run(live())


class Slow(ManagementClient):
    """Its second page takes long, and each question about one user alone is counted."""

    asked = 0

    async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        took = 0
        async for answered in super().users(page):
            yield msgspec.structs.replace(answered, took=took)
            took = 5_000

    async def user(self, user_id: str) -> ApiResponse:
        self.asked += 1
        return await super().user(user_id)


def test_who_is_on_a_slow_page_was_listed(tmp_path: Path) -> None:
    """And isn't asked about again."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        async with FakeLogto() as logto, asking(logto, Slow) as api:
            for _ in range(150):
                logto.create_user()
            assert isinstance(api, Slow)
            found = await Reconciliation(api, host, FrozenClock()).run()
            assert (found.drifted, found.doubts, api.asked) == (150, [], 0)
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize(
    "error",
    [
        LogtoUnreachable(endpoint="e", problem="it answers 500"),
        LogtoApiError(endpoint="e", problem="it answers 403 (forbidden)", hint="h"),
    ],
    ids=["a server error", "a refusal"],
)
def test_what_logto_refuses_about_one_ends_no_run(error: Exception, tmp_path: Path) -> None:
    """A user whom no list names, an organization's members, the holders of a role: each is told of,
    and all others are compared."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        clock = FrozenClock()
        async with FakeLogto(now=clock.now) as logto, asking(logto, Refusing) as api:
            assert isinstance(api, Refusing)
            ana, bo = (logto.create_user()["id"] for _ in range(2))
            acme, other = (logto.create_organization(name="old")["id"] for _ in range(2))
            logto.assign_role(ana, "admin")
            [admin] = [role["id"] for role in logto._state.all_roles()]
            reconciliation = Reconciliation(api, host, clock)
            await reconciliation.run()
            clock.tick(10)
            logto.delete_user(bo)
            for organization in (acme, other):
                logto.update_organization(organization, name="new")
                logto.add_members(organization, [ana])
            api.refused, api.error = {bo, f"organizations/{acme}/users", f"roles/{admin}"}, error
            result = await reconciliation.run()
            assert (result.not_compared, len(result.doubts)) == (3, 3), result.doubts
            for name in (f"the user {bo}", f"the organization {acme}", f"the role {admin}"):
                [doubt] = [doubt for doubt in result.doubts if doubt.startswith(name)]
                assert "wasn't compared" in doubt
            found = await host.read(lambda store: store.find("organization", "", 9))
            assert {row.row["name"] for row in found} == {"new"}
            memberships = {row.row["logto_organization_id"]: row.memberships for row in found}
            assert memberships == {acme: [], other: [ana]}

            api.refused |= {"hooks"}
            with pytest.raises(type(error)):
                await reconciliation.run()
        await host.close()

    asyncio.run(live())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_just_before_is_compared(kind: StoreKind, tmp_path: Path) -> None:
    """A date of Logto's is of a second: who was read in it, and is gone or has lost a role since,
    is asked about all the same, also by a run that was killed."""

    async def compare(
        host: TransactionRunner, logto: FakeLogto, cls: type[ManagementClient] = ManagementClient
    ) -> ReconcileResult:
        now = SystemClock()
        api = cls(logto.url, logto.app_id, logto.app_secret, now=now, budget=100_000)
        try:
            return await Reconciliation(api, host, now).run()
        finally:
            await api.close()

    async def live() -> None:
        host = open_host(kind, tmp_path)
        async with FakeLogto() as logto:
            ids = [logto.create_user()["id"] for _ in range(120)]
            acme = logto.create_organization()["id"]
            for user in ids[:2]:
                logto.assign_role(user, "admin")
            await compare(host, logto)
            with pytest.raises(LogtoUnreachable):
                await compare(host, logto, dying_after(1))
            logto.delete_user(ids[-1])
            logto.delete_organization(acme)
            logto.remove_role(ids[0], "admin")
            compared = await compare(host, logto)
            assert (compared.resumed, compared.doubts) == (True, [])
            logto.remove_role(ids[1], "admin")
            compared = await compare(host, logto)
            assert (compared.resumed, compared.doubts) == (False, [])
            assert set(here := await users(host)) == set(ids[:-1])
            assert [user for user in ids[:2] if here[user].roles] == []
            assert await host.read(lambda store: store.keys("organization", 9)) == []
        await host.close()

    asyncio.run(live())


def test_a_logto_of_another_day_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run is dated by Logto's clock: one that is an hour ahead, or behind, is no reason
    to run again and again."""
    monkeypatch.setattr("logto_webhooks.reconcile.reconcile.LOOK_S", 0.01)

    async def live(ahead_s: int) -> None:
        host, clock = open_host("sqlite", tmp_path), FrozenClock()
        reports: list[TelemetryEvent] = []

        async def count() -> int:
            return len(reports)

        async with (
            FakeLogto(now=lambda: clock.now() + ahead_s * 1000) as logto,
            asking(logto) as api,
        ):
            keeping = Reconciliation(api, host, clock).keep(1_800, reports.append)
            task = asyncio.create_task(keeping)
            await eventually(count, bool)
            await asyncio.sleep(0.3)  # thirty looks
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert [type(report) for report in reports] == [Reconciled]
        await host.close()

    for ahead_s in (3_600, -3_600):
        asyncio.run(live(ahead_s))
