"""Values that Logto can hold and that a parser, an index or a clock refuses: nothing is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks import canonical_json, events
from logto_webhooks.database.records import FoundRow
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import (
    FUTURE_MS,
    Clocks,
    Dated,
    DeliveryState,
    NewDelivery,
    estimate_ahead,
    identify,
)
from logto_webhooks.jobs import JobFilter, RegisteredHandler
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import (
    SECOND_MS,
    ApiResponse,
    make_span_clock,
    read_pairs,
    read_user,
)
from logto_webhooks.records.changes import LAG_MS, changes_from_event, read
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import MEMBERS, WRONG_CLOCK, Key, Record, RefetchRequest, Upsert
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import make
from tests.support.stores import STORES, Copy, StoreKind, open_host

NOW = 1_795_485_335_924


async def applied(
    kind: StoreKind, folder: Path, bodies: Sequence[bytes]
) -> tuple[list[FoundRow], list[FoundRow], dict[str, int], list[tuple[Key, str]]]:
    """Apply bodies; return users, organizations, the counts of states, and what is waited for."""
    host = open_host(kind, folder)
    try:
        await Copy(host).take(bodies)
        users = await host.read(lambda store: store.find("user", "", 100))
        organizations = await host.read(lambda store: store.find("organization", "", 100))
        status = await host.read(lambda store: store.status())
        waiting = await host.read(lambda store: store.waiting(100))
        return (
            users,
            organizations,
            status.deliveries,
            [(each.key, each.reason) for each in waiting],
        )
    finally:
        await host.close()


def _users(store: Store, *, query: str) -> list[FoundRow]:
    return store.find("user", query, 10)


def replaced(signed: SignedRequest, old: bytes, new: bytes) -> bytes:
    assert signed.body.count(old) == 1
    return signed.body.replace(old, new)


def nested(levels: int) -> bytes:
    return b'{"a":[' * levels + b'"\\ud800"' + b"]}" * levels


class TestDepth:
    @pytest.mark.parametrize("kind", STORES)
    @pytest.mark.parametrize("levels", [60, 500, 2_500])
    def test_what_is_beside_deep_values_is_applied(
        self, kind: StoreKind, levels: int, tmp_path: Path
    ) -> None:
        """Of a user and of an organization; identities and profile, too. What is too deep for a
        column is a string there with its JSON."""
        deep = b'{"x":' + nested(levels) + b"}"
        bodies = [
            make.user_created(id="ana").body,
            replaced(
                make.user_suspension_status_updated(
                    id="ana", profile={"p": 1}, identities={"i": 2}
                ),
                b'"customData":{}',
                b'"customData":' + deep,
            )
            .replace(b'{"p":1}', deep)
            .replace(b'{"i":2}', deep),
            replaced(
                make.organization_created(id="acme"), b'"customData":{}', b'"customData":' + deep
            ),
        ]
        [user], [organization], states, waiting = asyncio.run(applied(kind, tmp_path, bodies))
        assert states == {"pending": 0, "done": 3, "dead": 0, "ignored": 0}
        assert waiting == []
        assert user.row["is_suspended"] is True
        for value in (
            user.row["custom_data"],
            user.row["profile"],
            user.row["identities"],
            organization.row["custom_data"],
        ):
            text = json.dumps(value["x"], ensure_ascii=False)
            assert json.loads(text) == value["x"]
            assert text.count("[") == levels
            assert "ufffd" in text

    @pytest.mark.parametrize("route", ["custom-data", "profile"])
    def test_a_part_is_the_same_alone_and_in_the_whole(self, route: str) -> None:
        """Or the record would look changed, and in doubt."""
        name = {"custom-data": "customData", "profile": "profile"}[route]
        whole = replaced(
            make.user_data_updated(id="ana"),
            b'"%s":{}' % name.encode(),
            b'"%s":' % name.encode() + nested(700),
        )
        part = make.user_data_updated(id="ana", at=NOW).body
        payload: Any = canonical_json.decode(part)
        payload |= {
            "matchedRoute": f"/users/:userId/{route}",
            "params": {"userId": "ana"},
            "data": canonical_json.decode(nested(700)),
        }
        asked = canonical_json.decode(b'[{"id":"ana","%s":' % name.encode() + nested(700) + b"}]")
        told = [
            *read(trust(whole), 0)[1],
            *read(trust(canonical_json.encode(payload)), 0)[1],
        ]
        group = {"customData": "custom_data"}.get(name, name)
        values = [change.values[group].content for change in told if isinstance(change, Upsert)]
        answer: Any = read_user("ana", asked[0], api_responses.Span(NOW, NOW))
        assert len(values) == 2
        assert values[0] == values[1] == answer.contents[group]

    def test_a_delivery_of_any_depth_is_known_again(self) -> None:
        """What Logto's log gives back has other bytes, in another order."""
        body = b'{"event":"X", "createdAt":"2026-11-24T01:55:45.176Z","a":' + nested(3_000) + b"}"
        entry = canonical_json.decode(b'[{"payload":{"hookRequest":{"body":' + body + b"}}}]")[0]
        again = canonical_json.encode(entry["payload"]["hookRequest"]["body"])
        assert again != body
        assert identify(trust(again), NOW).digest == identify(trust(body), NOW).digest


class TestLength:
    @pytest.mark.parametrize("kind", STORES)
    def test_values_of_any_length_are_applied_and_found(
        self, kind: StoreKind, tmp_path: Path
    ) -> None:
        """No index holds them in whole, and searches are right all the same."""
        random_text = "".join(canonical_json.digest(number).hex() for number in range(150))
        long = {
            name: f"{name}-{random_text}"
            for name in ("username", "primaryEmail", "primaryPhone", "name", "avatar")
        }
        identities = {
            "github": {"userId": random_text, "details": {"x": random_text}},
            random_text: {"userId": "1"},
            random_text + "2": {"userId": "2"},
            "a\0": {"userId": "3"},
            "a": {"userId": "4"},
        }
        fields: dict[str, Any] = {"identities": identities, **long}
        one = make.user_created(id="ana", **fields).body
        other = make.user_created(id="bo", username=f"{long['username']}2").body

        async def run() -> None:
            host = open_host(kind, tmp_path)
            try:
                await Copy(host).take([one, other])
                status = await host.read(lambda store: store.status())
                assert status.deliveries[DeliveryState.DONE] == 2
                for name in ("username", "primaryEmail", "primaryPhone"):
                    found = await host.read(partial(_users, query=long[name]))
                    assert [each.row["logto_user_id"] for each in found] == ["ana"]
            finally:
                await host.close()

        asyncio.run(run())


def dated(created_at: str, **fields: Any) -> bytes:
    """A sign-in with any `createdAt`."""
    payload = msgspec.json.decode(make.post_sign_in(id="ana", at=NOW, **fields).body)
    return msgspec.json.encode(payload | {"createdAt": created_at})


class TestClocks:
    @pytest.mark.parametrize(
        "created_at",
        [
            "2099-01-01T00:00:00.000Z",
            "9999-12-31T23:59:59.999Z",
            "+010000-01-01T00:00:00.000Z",
            "-000001-01-01T00:00:00.000Z",
            "0000-01-01T00:00:00.000Z",
            "1960-01-01T00:00:00.000Z",
            "10000-01-01T00:00:00.000Z",
        ],
    )
    def test_a_date_beyond_belief_is_the_receipt_and_a_doubt(self, created_at: str) -> None:
        """It is applied; what comes later wins over it."""
        delivery = identify(trust(dated(created_at)), NOW)
        assert delivery.occurred_at == NOW
        _, changes = read(trust(delivery.body), delivery.occurred_at)
        record = Record(Key("user", "ana"))
        for change in changes:
            record = merge(record, change)
        assert record.doubts == [WRONG_CLOCK]
        assert all(group.end <= NOW for group in record.groups.values())
        later = make.user_data_updated(id="ana", name="Later", at=NOW + 1_000).body
        for change in read(trust(later), NOW + 1_000)[1]:
            record = merge(record, change)
        assert record.own["name"] == "Later"

    @given(
        created=st.integers(0, 253_402_300_799_999),
        updated=st.integers(-(10**18), 10**18),
        last=st.integers(-(10**18), 10**18),
        ahead=st.integers(0, 10**8),
    )
    def test_nothing_told_is_later_than_it_can_have_been_sent(
        self, created: int, updated: int, last: int, ahead: int
    ) -> None:
        """Whatever the dates in it are."""
        made = make.user_data_updated(id="ana", at=created, updatedAt=updated, lastSignInAt=last)
        delivery = identify(trust(made.body), NOW, ahead=ahead)
        latest = NOW + ahead + FUTURE_MS
        believed = created <= latest
        assert delivery.occurred_at == (created if believed else NOW + ahead)
        for change in read(trust(delivery.body), delivery.occurred_at)[1]:
            if isinstance(change, Upsert):
                for value in change.values.values():
                    assert 0 <= value.stamp <= value.end <= latest
                    assert value.start <= value.stamp
                assert all(0 <= fact <= latest for fact in change.facts.values())
            else:
                assert isinstance(change, RefetchRequest)
                assert not believed

    def test_members_of_a_wrong_date_are_in_doubt_until_a_list_tells(self) -> None:
        """A list of the user's organizations settles it."""
        made = make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=NOW)
        payload = msgspec.json.decode(made.body) | {"createdAt": "2099-01-01T00:00:00.000Z"}
        record = Record(Key("membership", "acme:ana"))
        for change in read(trust(msgspec.json.encode(payload)), NOW)[1]:
            record = merge(record, change)
        assert record.doubts == [WRONG_CLOCK]
        [answer] = read_pairs([record.key], {}, api_responses.Span(NOW + 1, NOW + 2))
        assert merge(record, answer).waiting_for is None

    def test_a_deletion_of_a_wrong_date_is_applied_and_asked_about(self) -> None:
        """Logto may have the user again: an answer that it hasn't ends the doubt."""
        payload = msgspec.json.decode(make.user_deleted(id="ana").body)
        body = msgspec.json.encode(payload | {"createdAt": "2099-01-01T00:00:00.000Z"})
        record = Record(Key("user", "ana"))
        for change in read(trust(body), NOW)[1]:
            record = merge(record, change)
        assert (record.deleted_at, record.doubts) == (NOW, [WRONG_CLOCK])
        assert (
            merge(record, read_user("ana", None, api_responses.Span(NOW + 1, NOW + 2))).doubts == []
        )

    def test_one_delivery_doesnt_shift_the_clock(self) -> None:
        """Two that agree do, if there are no others; those in the past never do."""

        def ahead(*offsets: int, database: int = 0) -> int:
            recent = [Dated(NOW + offset, NOW, NOW) for offset in offsets]
            return estimate_ahead(NOW, Clocks(NOW + database, recent))

        hour = 3_600_000
        assert ahead() == ahead(10**12) == ahead(0, 10**12) == ahead(-hour, -hour, -hour) == 0
        assert ahead(hour, hour) == ahead(hour, hour, 10**12) == hour
        assert ahead(database=hour) == ahead(hour, hour, database=hour) == hour
        assert ahead(-hour, -hour, database=-hour) == -hour
        late = [Dated(NOW + hour, NOW, NOW, "log")] * 3
        assert estimate_ahead(NOW, Clocks(NOW, late)) == 0

    @pytest.mark.parametrize("kind", STORES)
    def test_what_isnt_believed_tells_nothing_about_clocks(
        self, kind: StoreKind, tmp_path: Path
    ) -> None:
        """And each answer is dated by itself: a page can be asked for early and looked at late."""
        wrong = identify(trust(dated("2099-01-01T00:00:00.000Z")), NOW + 3_600_000)
        right = identify(trust(make.user_created(at=NOW).body), NOW + 3_600_000)

        async def when(deliveries: list[NewDelivery], *asked: ApiResponse) -> list[int]:
            host: TransactionRunner = open_host(kind, tmp_path)
            try:
                await host.run(lambda store: store.add(deliveries))
                tell = await make_span_clock(host)
                return [tell(each).at for each in asked]
            finally:
                await host.close()

        asked = ApiResponse(content=None, asked_at=NOW + 3_600_500, took=0)
        assert asyncio.run(when([right, wrong], asked)) == [NOW + 500 - SECOND_MS - 1]
        early = ApiResponse(content=None, asked_at=NOW + 9_000, took=0, date=NOW + 9_000)
        late = ApiResponse(content=None, asked_at=NOW, took=0, date=NOW)
        at = asyncio.run(when([], early, late))
        assert at[1] == NOW - SECOND_MS - 1, "whatever was looked at before it"


class TestLeftOut:
    def test_an_absent_field_keeps_what_is_known(self) -> None:
        """In every order; null is a value. Logto is asked about the rest."""
        whole = make.user_created(id="ana", username="ana", name="Ana", at=NOW).body
        payload = msgspec.json.decode(make.user_data_updated(id="ana", at=NOW + 1_000).body)
        payload["data"] = {"id": "ana", "name": None, "updatedAt": NOW + 900}
        part = msgspec.json.encode(payload)
        changes = [*read(trust(whole), 0)[1], *read(trust(part), 0)[1]]
        for order in (changes, changes[::-1]):
            record = Record(Key("user", "ana"))
            for change in order:
                record = merge(record, change)
            assert (record.own["name"], record.own["username"]) == (None, "ana")
            assert record.waiting_for == "unknown change"
        about = read_user(
            "ana", payload["data"] | {"name": "B"}, api_responses.Span(NOW + 2_000, NOW + 2_001)
        )
        settled = merge(record, about)
        assert (settled.own["name"], settled.waiting_for) == ("B", None)

    @pytest.mark.parametrize("field", ["customData", "profile", "isSuspended"])
    @pytest.mark.parametrize("event", ["User.Data.Updated", "PostSignIn"])
    def test_a_user_without_a_group_is_asked_about(self, event: str, field: str) -> None:
        """Its last value may have changed. Logto is right, also if it has no such field."""
        payload = msgspec.json.decode(make.event(event, id="ana", at=NOW).body)
        user = payload["user" if event == "PostSignIn" else "data"]
        del user[field]
        record = Record(Key("user", "ana"))
        for change in read(trust(msgspec.json.encode(payload)), 0)[1]:
            record = merge(record, change)
        assert record.waiting_for == "unknown change"
        answer = read_user("ana", user, api_responses.Span(NOW + 2_000, NOW + 2_001))
        assert merge(record, answer).waiting_for is None

    def test_an_older_organization_has_no_custom_data(self) -> None:
        """What is known of it stays."""
        first = make.organization_created(id="acme", customData={"plan": "pro"}, at=NOW).body
        payload = msgspec.json.decode(
            make.organization_data_updated(id="acme", name="New", at=NOW + 1_000).body
        )
        del payload["data"]["customData"]
        record = Record(Key("organization", "acme"))
        for body in (first, msgspec.json.encode(payload)):
            for change in read(trust(body), 0)[1]:
                record = merge(record, change)
        assert record.own["name"] == "New"
        assert record.own["customData"] == {"plan": "pro"}


class TestOlderMemberships:
    def call(self, method: str, route: str, params: dict[str, str], **more: Any) -> list[Any]:
        payload = msgspec.json.decode(make.organization_membership_updated(id="acme").body)
        del payload["addedUserIds"]
        payload |= {"method": method, "matchedRoute": route, "params": params, "status": 404}
        return read(trust(msgspec.json.encode(payload | more)), 0)[1]

    def test_the_call_names_who_was_removed(self) -> None:
        """Only where no list does; an application that was removed is nobody's membership."""
        users = "/organizations/:id/users/:userId"
        ids = {"id": "acme", "userId": "ana"}
        [gone] = self.call("DELETE", users, ids)
        assert (gone.key, gone.values["present"].content) == (Key("membership", "acme:ana"), False)
        [listed] = self.call("DELETE", users, ids, removedUserIds=["bo"])
        assert listed.key == Key("membership", "acme:bo")
        applications = "/organizations/:id/applications/:applicationId"
        assert self.call("DELETE", applications, {"id": "acme", "applicationId": "x"}) == []
        for method, route in (("PUT", users), ("DELETE", f"{users}/roles"), ("POST", users)):
            [asks] = self.call(method, route, ids)
            assert isinstance(asks, RefetchRequest)
            assert asks.why == MEMBERS


def test_who_is_meant_by_events_of_no_route() -> None:
    """A device has its user in `data`; a limit of messages has none."""
    assert (
        identify(trust(make.trusted_device_deleted(userId="ana").body), NOW).subject == "user:ana"
    )
    assert identify(trust(make.message_rate_limited().body), NOW).subject is None
    assert identify(trust(make.grant_limit_exceeded(id="ana").body), NOW).subject == "user:ana"
    assert [
        type(each)
        for each in changes_from_event(
            read(trust(make.post_sign_in_adaptive_mfa_triggered(id="ana").body), 0)[0], LAG_MS
        )
    ] == [Upsert]


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg", "psycopg"])
def test_a_cut_list_is_asked_for_before_the_members_that_it_names(
    kind: StoreKind, tmp_path: Path
) -> None:
    """However many of them wait, and since when."""
    created = make.organization_created(id="acme").body
    ids = [f"user{number}" for number in range(5_000)]
    cut = make.organization_membership_updated(id="acme", addedUserIds=ids).body

    async def first() -> Key:
        host = open_host(kind, tmp_path)
        try:
            await Copy(host).take([make.user_data_updated(id="ana", customData={}).body])
            await Copy(host).take([created, cut])
            return (await host.read(lambda store: store.waiting(500)))[0].key
        finally:
            await host.close()

    assert asyncio.run(first()) == Key("organization", "acme")


@pytest.mark.parametrize("kind", STORES)
def test_an_unknown_event_with_nul_in_its_name_has_jobs(kind: StoreKind, tmp_path: Path) -> None:
    """PostgreSQL stores no NUL in text."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        every = RegisteredHandler(name="every", patterns=("*",))
        await host.run(lambda store: store.jobs.register([every]))
        await host.run(lambda store: store.set_installed_at(0))
        body = {"event": "Odd\0Event", "createdAt": "2026-11-28T00:00:00.000Z", "hookId": "h"}
        await Copy(host).take([msgspec.json.encode(body)])
        [job] = await host.read(lambda store: store.jobs.find(JobFilter()))
        assert (job.event, job.subject) == ("OddEvent", "event:OddEvent")
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", STORES)
def test_a_delivery_called_like_a_local_event_has_no_jobs(kind: StoreKind, tmp_path: Path) -> None:
    """Logto has no such event, and a body isn't what its handlers take."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        welcome = RegisteredHandler(name="welcome", patterns=("LocalUserCreated",))
        await host.run(lambda store: store.jobs.register([welcome]))
        await host.run(lambda store: store.set_installed_at(0))
        body = {"event": "LocalUserCreated", "createdAt": "2026-11-28T00:00:00.000Z"}
        await Copy(host).take([msgspec.json.encode(body)])
        assert await host.read(lambda store: store.jobs.find(JobFilter())) == []
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("odd", [[], {}, None, 1])
def test_members_are_added_whatever_the_call_was(odd: Any) -> None:
    """A later Logto may name it in another way."""
    body = make.organization_membership_updated(id="acme", addedUserIds=["ana"]).body
    odd_one = json.loads(body) | {"method": odd, "matchedRoute": odd}
    event = events.from_payload(odd_one)
    assert isinstance(event, events.OrganizationMembershipUpdated)
    assert event.added_user_ids == ["ana"]
