"""The jobs of a delivery's event."""

from __future__ import annotations

from typing import ClassVar

from logto_webhooks.deliveries import ClaimedDelivery
from logto_webhooks.events import parse
from logto_webhooks.handlers.enqueue import jobs_for_event
from logto_webhooks.jobs import RegisteredHandler
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import make


class Counting(RegisteredHandler, frozen=True, kw_only=True):
    """Counts how often it is asked for what it wants."""

    asked: ClassVar[list[str]] = []

    def wants(self, event_name: str) -> bool:
        self.asked.append(event_name)
        return super().wants(event_name)


def test_handlers_are_chosen_once_for_all_members() -> None:
    """A delivery can add thousands."""
    users = [f"u{number}" for number in range(500)]
    made = make.organization_membership_updated(
        organizationId="acme",
        addedUserIds=users,
        removedUserIds=["gone"],
    )
    handlers = [
        Counting(name="all", patterns=("Organization.*", "Organization.User.*")),
        Counting(name="added", patterns=("Organization.User.Added",)),
        Counting(name="other", patterns=("User.*",)),
    ]
    claimed = ClaimedDelivery(
        id=1,
        body=made.body,
        event="Organization.Membership.Updated",
        subject="organization:acme",
        received_at=0,
        attempt=1,
        digest=b"d",
        occurred_at=0,
        origin="webhook",
    )
    jobs = jobs_for_event(parse(trust(made.body)), claimed, handlers)
    added = [job.subject for job in jobs if job.handler == "added"]
    assert added == [f"user:{user}" for user in users]
    assert [job.event for job in jobs if job.handler == "all"] == [
        "Organization.Membership.Updated",
        *["Organization.User.Added"] * 500,
        "Organization.User.Removed",
    ]
    assert not [job for job in jobs if job.handler == "other"]
    assert len(Counting.asked) <= 3 * len(handlers)
