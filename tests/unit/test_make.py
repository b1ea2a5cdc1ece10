"""What `testing.make` makes: when, and of whom."""

from __future__ import annotations

import itertools
import time
from typing import Any

import msgspec
import pytest

from logto_webhooks.deliveries import identify, sent_at_of
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import FrozenClock, SignedRequest, make

AT = 1_795_485_335_917
NEW = {"User.Created": "data", "PostRegister": "user", "Organization.Created": "data"}
KNOWN = {"User.Data.Updated": "data", "PostSignIn": "user", "Organization.Data.Updated": "data"}


def payload(signed: SignedRequest) -> dict[str, Any]:
    """What a delivery says."""
    made: dict[str, Any] = msgspec.json.decode(signed.body)
    return made


def moment(signed: SignedRequest) -> int:
    """When Logto sent it."""
    return sent_at_of(identify(trust(signed.body), 0).digest)


def test_each_is_of_now_and_later_than_the_last() -> None:
    """So far apart that none is in doubt; an application under test is no older than they are."""
    before = time.time_ns() // 1_000_000
    clock = FrozenClock().now()
    moments = [moment(make.user_created()) for _ in range(3)]
    moments += [moment(make.sign_up()[0]), moment(make.console_test())]
    times = [before, clock, *moments]
    assert all(later - sooner > 110 for sooner, later in itertools.pairwise(times))


@pytest.mark.parametrize("made", [make.user_created, make.sign_up, make.console_test])
def test_what_is_dated_by_hand_is_always_the_same_moment(made: Any) -> None:
    """`at` is taken as it is."""
    first = made(at=AT)
    assert moment(first if isinstance(first, SignedRequest) else first[0]) == AT


@pytest.mark.parametrize("name", [*NEW, *KNOWN])
def test_who_is_made_or_registers_is_new_others_were_there_before(name: str) -> None:
    """And the record's own times fit the delivery's."""
    made = payload(make.event(name, at=AT))
    record = made[(NEW | KNOWN)[name]]
    assert (record["createdAt"] == AT) == (name in NEW)
    assert record["createdAt"] <= record.get("updatedAt", AT) == AT


def test_a_first_sign_in_is_of_who_is_new_by_it() -> None:
    """Fields go where they do in others."""
    made = payload(make.first_sign_in(id="bo", email="bo@example.org", at=AT))
    user = made["user"]
    assert (made["event"], user["id"], user["primaryEmail"]) == (
        "PostSignIn",
        "bo",
        "bo@example.org",
    )
    assert user["createdAt"] == user["lastSignInAt"] == user["updatedAt"] == AT


@pytest.mark.parametrize(
    ("make_it", "fields", "says"),
    [
        (
            make.user_created,
            {"naem": "x"},
            "'naem' can't be used: User.Created has no such field; ",
        ),
        (make.user_created, {"naem": "x"}, "the closest is name."),
        (make.user_created, {"data.naem": "x"}, "'data.naem' can't be used: User.Created has no "),
        (make.user_created, {"emial": "x"}, "the closest is email."),
        (make.sign_up, {"naem": "x"}, "the closest is name."),
        (make.organization_created, {"descripton": "x"}, "the closest is description."),
        (make.organization_membership_updated, {"addedUserId": []}, "the closest is addedUserIds."),
        (make.user_created, {"id": 5}, "id can't be used: it must be a text, not 5."),
        (make.sign_up, {"id": 5}, "id can't be used: it must be a text, not 5."),
        (make.first_sign_in, {"id": 5}, "id can't be used: it must be a text, not 5."),
        (make.user_created, {"at": "now"}, "at can't be used: it must be milliseconds since 1970"),
        (make.console_test, {"at": "now"}, "at can't be used: it must be milliseconds since 1970"),
        (make.user_created, {"key": 5}, "key can't be used: it must be a text, not of type int."),
    ],
)
def test_what_logto_never_sends_is_refused(make_it: Any, fields: dict[str, Any], says: str) -> None:
    """A misspelled field, and an argument of another type."""
    with pytest.raises(SettingInvalid) as raised:
        make_it(**fields)
    assert says in str(raised.value)


def test_a_key_that_is_no_text_is_not_told() -> None:
    """It is a secret, such as one read from a file as bytes."""
    with pytest.raises(SettingInvalid) as raised:
        make.user_created(**{"key": b"the-secret-key"})  # type: ignore[arg-type]
    assert "must be a text, not of type bytes" in str(raised.value)
    assert "the-secret-key" not in f"{raised.value} {raised.value!r}"


def test_what_logto_may_send_goes_where_it_belongs() -> None:
    """Though a sample has it not."""
    joined = payload(make.organization_membership_updated(removedUserIds=["bo"]))
    assert joined["removedUserIds"] == ["bo"]
    created = payload(make.user_created(ssoIdentities=[], sessionId="s", profile={"any": 1}))
    assert created["data"]["ssoIdentities"] == []
    assert created["data"]["profile"] == {"any": 1}
    assert created["sessionId"] == "s"
    fields: dict[str, Any] = {"customData.any.name": 1, "data.name": "Ana"}
    dotted = make.user_data_updated(**fields)
    assert payload(dotted)["data"]["customData"] == {"any": {"name": 1}}
    assert payload(dotted)["data"]["name"] == "Ana"
