"""What explaining costs: as much for each membership, however many there are."""

from __future__ import annotations

import cProfile
import pstats

from logto_webhooks.deliveries import DeliveryState, StoredDelivery
from logto_webhooks.explain.timeline import Timeline
from logto_webhooks.records.record import (
    DeliveryChange,
    Key,
    Record,
    Tombstone,
    Upsert,
    Value,
    membership,
)

ACME = Key("organization", "acme")


def delivery(number: int) -> StoredDelivery:
    return StoredDelivery(
        id=number,
        event="Organization.Membership.Updated",
        subject="organization:acme",
        occurred_at=number,
        received_at=number,
        origin="webhook",
        state=DeliveryState.DONE,
        result="applied",
        attempts=1,
        error=None,
        body=b"{}",
    )


def change(user_id: str, at: int, is_member: bool) -> Upsert:
    return Upsert(membership("acme", user_id), {"present": Value(is_member, at, at, at)})


def build(members: int) -> Timeline:
    """Each is added, deleted as a user, and removed, by a delivery of its own."""
    steps: list[DeliveryChange] = []
    for number in range(members):
        steps += [
            change(f"u{number}", 10 * number + 1, True),
            Tombstone(Key("user", f"u{number}"), 10 * number + 2),
            change(f"u{number}", 10 * number + 3, False),
        ]
    timeline = Timeline(ACME, {ACME: Record(ACME)})
    for number, step in enumerate(steps, 1):
        timeline.add(delivery(number), [step])
    timeline.end()
    return timeline


def count_calls(members: int) -> int:
    profile = cProfile.Profile()
    profile.runcall(build, members)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_ten_times_as_many_memberships_take_ten_times_as_long() -> None:
    """Not a hundred times: an organization can have thousands of members."""
    build(1)  # what is cached
    assert count_calls(200) < 12 * count_calls(20)


def test_each_membership_ends_once() -> None:
    """By its user's deletion, however many others there are."""
    lines = build(3).lines
    assert [line.set for line in lines] == [
        changed
        for number in range(3)
        for changed in ((f"members.u{number}",), (f"members.u{number}",), ())
    ]


def test_a_deleted_organization_ends_all_memberships() -> None:
    """Those that are newer stay."""
    timeline = Timeline(ACME, {ACME: Record(ACME)})
    for number, at in enumerate((1_000, 2_000, 99_000), 1):
        timeline.add(delivery(number), [change(f"u{number}", at, True)])
    timeline.add(delivery(4), [Tombstone(ACME, 5_000)])
    assert timeline.lines[-1].set == ("deleted_at", "members.u1", "members.u2")
