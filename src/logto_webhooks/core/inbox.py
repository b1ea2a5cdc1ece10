"""Looking at what came, and at what is known from it; and having it applied again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from msgspec import Struct

from logto_webhooks.core.delivery import Origin
from logto_webhooks.core.events import (
    OrganizationDeleted,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    UserDeleted,
)
from logto_webhooks.core.events.parsing import payload_of
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.record import Key, Record
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import NotADelivery

# What tells of a user's memberships has an organization as its subject.
MEMBERSHIP_EVENTS: Final = tuple(
    each.name
    for each in (OrganizationMembershipUpdated, OrganizationUserAdded, OrganizationUserRemoved)
)
DELETIONS: Final = (UserDeleted.name, OrganizationDeleted.name)


class Accepted(Struct, frozen=True):
    """Where a delivery stands in the inbox; a duplicate has the id of the first."""

    id: int
    duplicate: bool


class Claimed(Struct, frozen=True, kw_only=True):
    """A delivery that a worker holds; `attempt` counts this one."""

    id: int
    body: bytes
    event: str
    subject: str | None
    received_at: int
    attempt: int
    digest: bytes = b""
    occurred_at: int = 0
    origin: str = "webhook"


class Received(Struct, frozen=True):
    """A delivery as it came; times in milliseconds, `occurred_at` on Logto's clock."""

    body: bytes
    occurred_at: int
    received_at: int


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a claimed delivery; `retry_after_s` only when it is pending again."""

    id: int
    state: State
    result: str | None = None
    error: str | None = None
    retry_after_s: float = 0


class Kept(Struct, frozen=True, kw_only=True):
    """A delivery in the inbox, and where it stands; times in milliseconds since the epoch.

    `result` is the outcome of the sync, None until then; `error` what last went wrong.
    """

    id: int
    event: str
    subject: str | None
    occurred_at: int
    received_at: int
    origin: Origin
    state: State
    result: str | None
    attempts: int
    error: str | None
    body: bytes

    @property
    def call(self) -> str:
        """The call of Logto's API, or the interaction, that it tells of; "" where Logto doesn't
        say, as with the account API."""
        return call_of(self.body)


def call_of(body: bytes) -> str:
    """The call, or the interaction, that a body tells of."""
    try:
        payload = payload_of(vouch(body))
    except NotADelivery:
        return ""
    method, route = payload.get("method"), payload.get("matchedRoute")
    if isinstance(method, str) and isinstance(route, str):
        return f"{method} {route}"
    interaction = payload.get("interactionEvent")
    return interaction if isinstance(interaction, str) else ""


class DeliveryFilter(Struct, frozen=True, kw_only=True):
    """Which deliveries to list: all that is given must hold.

    `subject` is `kind:id`; `since` and `until` (not included) are when it was received, in
    milliseconds; `text` stands in the body as it is. The list is of the newest first, or of the
    `oldest_first`, and goes on `after` an id.
    """

    event: str | None = None
    state: State | None = None
    subject: str | None = None
    since: int | None = None
    until: int | None = None
    text: str | None = None
    after: int | None = None
    oldest_first: bool = False
    limit: int = 20


class Inbox(Protocol):
    """The inbox to look at, and the records that follow from it; nothing of them is held."""

    def search(self, sought: DeliveryFilter) -> list[Kept]:
        """List deliveries."""

    def get(self, delivery_id: int) -> Kept | None:
        """Return one delivery; None if there is no such id."""

    def again(self, ids: Sequence[int]) -> int:
        """Make deliveries pending again, but those that are; return how many."""

    def about(self, key: Key, others: Sequence[Key], after: int, limit: int) -> list[Kept]:
        """List what may tell of a user or an organization, or of its memberships, by id; of the
        `others`, at the other ends of these, only their deletions.

        A user's membership stands in an organization's delivery: those come that hold the
        user's id as text.
        """

    def known(self, key: Key) -> dict[Key, Record]:
        """Return a user's or an organization's record, if there is one, and those of all its
        memberships, ended ones included."""
