"""Every event is typed; its shape is decided by its route, never by its content."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks import events
from logto_webhooks.deliveries import identify
from logto_webhooks.errors import MalformedEvent, NotADelivery, UnknownEventName
from logto_webhooks.events import ALIASES, BY_NAME
from logto_webhooks.events.base import Event
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.records.record import Key, RefetchRequest, Tombstone, Upsert, membership
from logto_webhooks.samples import history
from logto_webhooks.samples.payloads import payload
from logto_webhooks.signing_keys import trust
from tests.support import recorded

AT = 1_795_485_335_924
OF_LOGTO_1_42 = [
    "PostRegister",
    "PostSignIn",
    "PostSignInAdaptiveMfaTriggered",
    "PostResetPassword",
    "User.Created",
    "User.Deleted",
    "User.Data.Updated",
    "User.SuspensionStatus.Updated",
    "Role.Created",
    "Role.Deleted",
    "Role.Data.Updated",
    "Role.Scopes.Updated",
    "Scope.Created",
    "Scope.Deleted",
    "Scope.Data.Updated",
    "Organization.Created",
    "Organization.Deleted",
    "Organization.Data.Updated",
    "Organization.Membership.Updated",
    "OrganizationRole.Created",
    "OrganizationRole.Deleted",
    "OrganizationRole.Data.Updated",
    "OrganizationRole.Scopes.Updated",
    "OrganizationScope.Created",
    "OrganizationScope.Deleted",
    "OrganizationScope.Data.Updated",
    "Identifier.Lockout",
    "Message.RateLimited",
    "Grant.LimitExceeded",
]
OTHERS = [
    "TrustedDevice.Created",
    "TrustedDevice.Deleted",
    "Organization.User.Added",
    "Organization.User.Removed",
]


def sample(name: str, **fields: Any) -> dict[str, Any]:
    return payload(name, {}, at=AT, rng=random.Random(1), id="theid") | fields


def parsed(made: dict[str, Any]) -> Event:
    return events.parse(trust(msgspec.json.encode(made)))


def test_all_events_are_known() -> None:
    """29 of Logto 1.42, two of a later one, two that are derived."""
    assert len(OF_LOGTO_1_42) == 29
    assert set(BY_NAME) == {*OF_LOGTO_1_42, *OTHERS}
    for cls in BY_NAME.values():
        assert getattr(events, cls.__name__) is cls


@pytest.mark.parametrize("name", BY_NAME)
def test_every_event_has_a_sample_that_is_typed(name: str) -> None:
    """With nothing odd in it, and frozen."""
    event = parsed(sample(name))
    assert type(event) is BY_NAME[name]
    assert event.odd_fields == ()
    assert event.at == AT
    with pytest.raises(AttributeError):
        event.event = "x"  # type: ignore[misc]


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_means_what_it_says(alias: str) -> None:
    """And keeps the name that was sent."""
    event = parsed(sample(alias))
    assert type(event) is BY_NAME[ALIASES[alias]]
    assert event.event == alias


def test_an_unknown_event_keeps_everything() -> None:
    """The unknown is certain: new events come with every release."""
    made = {"event": "Passkey.Created", "createdAt": 12, "new": {"a": [1]}, "params": "odd"}
    event = parsed(made)
    assert isinstance(event, events.UnknownEvent)
    assert event.payload == made
    assert event.odd_fields == ("createdAt", "params")
    assert changes_from_event(event) == []


def test_unknown_fields_are_in_the_payload() -> None:
    """They break nothing."""
    event = parsed(sample("User.Created", brandNew={"a": 1}))
    assert event.payload["brandNew"] == {"a": 1}


@pytest.mark.parametrize("each", recorded.deliveries(), ids=lambda each: each.name)
def test_every_recorded_delivery_is_typed(each: recorded.Recorded) -> None:
    """As a real Logto sends it, nothing is odd."""
    event = events.parse(trust(each.body.encode()))
    assert event.event == each.event
    assert event.odd_fields == ()
    assert isinstance(event, events.TestPayload) == ("hooktest" in each.name)
    assert not isinstance(event, events.UnknownEvent)


class TestShape:
    def test_custom_data_that_looks_like_a_user_is_custom_data(self) -> None:
        """The route decides, and the user is the one of the route."""
        forged = sample("User.Created")["data"] | {"id": "victim"}
        made = sample("User.Data.Updated", data=forged, matchedRoute="/users/:userId/custom-data")
        event = parsed(made)
        assert isinstance(event, events.UserDataUpdated)
        assert (event.user, event.custom_data, event.user_id) == (None, forged, "theid")
        [change] = changes_from_event(event)
        assert isinstance(change, Upsert)
        assert (change.key, list(change.values)) == (Key("user", "theid"), ["custom_data"])

    def test_a_profile_is_a_profile(self) -> None:
        """The same for the other part."""
        made = sample("User.Data.Updated", data={}, matchedRoute="/users/:userId/profile")
        [change] = changes_from_event(parsed(made))
        assert isinstance(change, Upsert)
        assert list(change.values) == ["profile"]

    @pytest.mark.parametrize("route", ["/users/:userId/new-thing", ["odd"], 7])
    @pytest.mark.parametrize("name", ["User.Data.Updated", "User.Created"])
    def test_an_unknown_route_asks_instead_of_guessing(self, name: str, route: Any) -> None:
        """A new Logto release never stops the copy."""
        made = sample(name, matchedRoute=route, params={"userId": "theid"})
        assert changes_from_event(parsed(made)) == [
            RefetchRequest(Key("user", "theid"), "unknown change", AT)
        ]

    @pytest.mark.parametrize("path", ["/users/:userId/custom-data", "/api/users/theid"])
    def test_a_path_without_a_route_asks_too(self, path: str) -> None:
        """Only what comes from the Management API has a path, and Logto names its route."""
        made = sample("User.Data.Updated", path=path, matchedRoute=None)
        assert changes_from_event(parsed(made | {"params": {"userId": "theid"}})) == [
            RefetchRequest(Key("user", "theid"), "unknown change", AT)
        ]

    @pytest.mark.parametrize("route", ["/organizations/:id/custom-data", None])
    @pytest.mark.parametrize("name", ["Organization.Created", "Organization.Data.Updated"])
    def test_an_organizations_unknown_route_asks_too(self, name: str, route: str | None) -> None:
        """Its customData could have a route of its own one day."""
        forged = {"id": "theid", "name": "Forged"}
        made = sample(
            name,
            path="/organizations/theid/custom-data",
            matchedRoute=route,
            params={"id": "theid"},
            data=forged,
        )
        asked = RefetchRequest(Key("organization", "theid"), "unknown change", AT)
        assert changes_from_event(parsed(made)) == [asked]

    def test_names_of_ours_cannot_be_sent(self) -> None:
        """A payload can't set what the shape decides."""
        made = sample("User.Data.Updated", data={}, matchedRoute="/users/:userId/profile")
        event = parsed(made | {"user": {"id": "victim"}, "userId": "victim", "oddFields": ["x"]})
        assert isinstance(event, events.UserDataUpdated)
        assert (event.user_id, event.user, event.odd_fields) == ("theid", None, ())

    def test_two_different_ids_are_malformed(self) -> None:
        """Logto never sends them."""
        made = sample("User.Data.Updated", params={"userId": "other"})
        with pytest.raises(MalformedEvent, match="two different ids"):
            changes_from_event(parsed(made))

    @pytest.mark.parametrize("data", [None, {"id": "theid"}, {"id": 7}, []])
    def test_a_deleted_user_needs_its_id_alone(self, data: Any) -> None:
        """Older Logto sends no data."""
        assert changes_from_event(parsed(sample("User.Deleted", data=data))) == [
            Tombstone(Key("user", "theid"), AT)
        ]

    def test_an_accepted_invitation_is_about_the_organization(self) -> None:
        """`params.id` is the invitation's."""
        made = sample("Organization.Membership.Updated", params={"id": "invitation"})
        keys = {change.key for change in changes_from_event(parsed(made))}
        assert keys == {membership("theid", made["addedUserIds"][0])}


class TestMembers:
    def members(self, **lists: list[str]) -> events.OrganizationMembershipUpdated:
        made = sample("Organization.Membership.Updated")
        del made["addedUserIds"]
        event = parsed(made | lists)
        assert isinstance(event, events.OrganizationMembershipUpdated)
        return event

    def test_one_event_is_derived_for_each_user(self) -> None:
        """Logto itself sends none of them."""
        event = self.members(addedUserIds=["a", "b"], removedUserIds=["c"])
        derived = [(type(each), each.event, each.user_id) for each in event.derived()]
        added, removed = events.OrganizationUserAdded, events.OrganizationUserRemoved
        assert derived == [
            (added, "Organization.User.Added", "a"),
            (added, "Organization.User.Added", "b"),
            (removed, "Organization.User.Removed", "c"),
        ]
        assert {each.organization_id for each in event.derived()} == {"theid"}

    def test_the_event_of_one_member_is_made_without_the_others(self) -> None:
        """Each of thousands has a job. The others aren't even checked."""
        made = sample("Organization.Membership.Updated") | {
            "addedUserIds": ["ana", "bo"],
            "removedUserIds": ["cleo", "bo"],
        }
        body = trust(json.dumps(made).encode())
        event = events.parse(body, AT)
        assert isinstance(event, events.OrganizationMembershipUpdated)
        for member in event.derived():
            assert events.parse_member(body, member.event, member.user_id, AT) == member
        odd = trust(json.dumps(made | {"addedUserIds": ["ana", "not:an:id"]}).encode())
        with pytest.raises(MalformedEvent):
            events.parse(odd, AT)
        added = events.parse_member(odd, "Organization.User.Added", "ana", AT)
        assert isinstance(added, events.OrganizationUserAdded)
        assert added.user_id == "ana"
        assert added.payload["addedUserIds"] == ["ana", "not:an:id"]

    def test_a_derived_event_sent_literally_means_what_it_says(self) -> None:
        """As users of other tools send it."""
        for name, there in (
            ("Organization.User.Added", True),
            ("Organization.User.Removed", False),
        ):
            [change] = changes_from_event(parsed(sample(name, userId="ana")))
            assert isinstance(change, Upsert)
            assert change.key == membership("theid", "ana")
            assert change.values["present"].content is there

    def test_without_ids_only_logto_can_tell(self) -> None:
        """Older Logto sends the organization alone; adding present members does, too."""
        assert changes_from_event(self.members()) == [
            RefetchRequest(Key("organization", "theid"), "members", AT)
        ]

    def test_applications_are_no_members(self) -> None:
        """Nothing is to be asked about them."""
        assert changes_from_event(self.members(addedApplicationIds=["app"])) == []

    def test_a_list_at_the_cap_may_be_cut(self) -> None:
        """What it names is applied, and the rest is asked for."""
        ids = [f"u{number}" for number in range(5000)]
        changes = changes_from_event(self.members(addedUserIds=ids))
        assert len(changes) == 5001
        assert changes[-1] == RefetchRequest(Key("organization", "theid"), "members", AT)
        assert len(changes_from_event(self.members(removedUserIds=ids[1:]))) == 4999


class TestStrictness:
    @pytest.mark.parametrize(
        ("name", "field", "odd"),
        [
            ("User.Created", "primaryEmail", 7),
            ("User.Created", "name", ["Ana"]),
            ("User.Created", "identities", "google"),
            ("User.Created", "customData", []),
            ("User.Created", "isSuspended", "no"),
            ("User.Created", "updatedAt", "2026-01-01"),
            ("PostSignIn", "lastSignInAt", "now"),
            ("Organization.Created", "name", None),
        ],
    )
    def test_what_the_sync_needs_is_strict(self, name: str, field: str, odd: Any) -> None:
        """The error names the field, and quotes nothing of the payload."""
        made = sample(name)
        made["user" if name == "PostSignIn" else "data"][field] = odd
        with pytest.raises(MalformedEvent, match=rf"`\$\..*{field}`") as caught:
            parsed(made)
        assert "example.com" not in str(caught.value)

    @pytest.mark.parametrize("odd", ["", 7, None, {}, "x" * 300, "a:b", "a\0b"])
    @pytest.mark.parametrize("name", ["User.Created", "Organization.Created"])
    def test_an_id_is_strict(self, name: str, odd: Any) -> None:
        """It is text, and not empty."""
        with pytest.raises(MalformedEvent, match=r"(?i)id`"):
            parsed(sample(name, data=sample(name)["data"] | {"id": odd}))

    @pytest.mark.parametrize("name", ["User.Created", "Organization.Deleted", "PostSignIn"])
    def test_without_its_time_an_event_of_the_sync_is_malformed(self, name: str) -> None:
        """There is no stamp then."""
        made = sample(name)
        del made["createdAt"]
        with pytest.raises(MalformedEvent, match="createdAt"):
            changes_from_event(parsed(made))

    @pytest.mark.parametrize("at", ["9999-12-31T23:59:59-23:59", "1969-12-31T23:59:59Z"])
    def test_a_time_that_no_timestamp_holds_is_malformed(self, at: str) -> None:
        """It would spoil the record for all that comes after."""
        with pytest.raises(MalformedEvent, match="out of range"):
            changes_from_event(parsed(sample("User.Deleted", createdAt=at)))

    @pytest.mark.parametrize(
        ("field", "odd"),
        [
            ("ip", 7),
            ("userAgent", ["x"]),
            ("status", "OK"),
            ("application", {"id": 7}),
            ("application", "app"),
            ("sessionId", {}),
            ("hookId", None),
            ("interactionEvent", 1.5),
        ],
    )
    @pytest.mark.parametrize("name", ["PostSignIn", "User.Created", "Role.Created"])
    def test_anything_else_is_kept_raw(self, name: str, field: str, odd: Any) -> None:
        """With its name in `odd_fields`, and the copy goes on."""
        event = parsed(sample(name, **{field: odd}))
        assert event.payload[field] == odd
        assert event.odd_fields == (() if odd is None else (field,))

    def test_an_odd_role_is_no_failure(self) -> None:
        """The sync doesn't need it."""
        event = parsed(sample("Role.Created", data={"id": 7}))
        assert isinstance(event, events.RoleCreated)
        assert (event.role, event.role_id) == (None, None)
        assert set(event.odd_fields) == {"role", "roleId"}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["createdAt", "params", "matchedRoute", "data", "user", "userId", "organizationId", "path"]


@given(
    name=st.sampled_from(sorted({*BY_NAME, *ALIASES, "Unknown.Event"})),
    odd=st.dictionaries(st.sampled_from([*FIELDS, "ip", "addedUserIds"]), json_values, max_size=4),
)
def test_no_payload_makes_another_error(name: str, odd: dict[str, Any]) -> None:
    """Whatever is signed is stored, and then planned or malformed; nothing else is raised."""
    base = sample(name) if name != "Unknown.Event" else {"event": name}
    body = trust(msgspec.json.encode(base | odd))
    identify(body, received_at=AT)
    with contextlib.suppress(MalformedEvent):
        assert isinstance(changes_from_event(events.parse(body)), list)


@pytest.mark.parametrize("name", history.NAMES)
def test_every_delivery_of_a_history_has_its_subject(name: history.Name) -> None:
    """A label for people: who it is about."""
    for each in history.load(name).deliveries:
        delivery = identify(trust(each.body), AT)
        kinds = {"User": "user", "Post": "user", "Orga": "organization"}
        if delivery.event[:4] in kinds and b"fake-id" not in each.body:
            assert delivery.subject
            assert delivery.subject.startswith(kinds[delivery.event[:4]] + ":")


def test_what_names_no_event_is_no_delivery() -> None:
    """It isn't stored."""
    for body in (b"[]", b"{}", b'{"event":7}', b"{", b'{"event":""}'):
        with pytest.raises(NotADelivery):
            identify(trust(body), AT)


def test_a_wrong_name_gets_the_nearest() -> None:
    """For who mistypes one."""
    with pytest.raises(UnknownEventName, match=r"Did you mean User\.Created\?"):
        events.named("User.Create")
    with pytest.raises(UnknownEventName, match=r"Known events: PostRegister"):
        events.named("zzzzzzzz")
