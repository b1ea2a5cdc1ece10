"""Check that the Management API belongs to the tenant whose webhooks arrive here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.deliveries import (
    DELETIONS,
    SAMPLE_WEBHOOK,
    DeliveryFilter,
    DeliveryState,
    StoredDelivery,
)
from logto_webhooks.errors import WrongTenant
from logto_webhooks.events.base import get_from
from logto_webhooks.logto import api_responses
from logto_webhooks.records.record import Key
from logto_webhooks.signing_keys import read_webhook_id

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

SAMPLE_SIZE: Final = 20  # users, and as many organizations: this Logto must know one of them
AGAIN_S: Final = 5.0
# Without deliveries from Logto's log, because they come from this same Logto.
_RECENT: Final = DeliveryFilter(origin="webhook", limit=100)
_NEWEST: Final = DeliveryFilter(origin="webhook", limit=1)


class TenantCheck:
    """Checks that the API is of the Logto that sends the webhooks. Another one knows none of the
    records, so they would all count as deleted.

    Only verified deliveries prove which Logto it is. The newest ones count, because the webhooks
    may have moved. Records count only before the first delivery, because they may have been
    imported from this same Logto.
    """

    def __init__(self, logto: ManagementClient, host: TransactionRunner) -> None:
        self._logto = logto
        self._host = host
        self._our_webhooks: set[str] = set()
        self._knows_records = False
        self._refused_until = 0.0

    async def ensure_same_tenant(self, *, by_records: bool = True) -> None:
        """Call this before writing that a record is gone, but after reading it, so that its
        delivery is in the inbox. Without `by_records`, any Logto passes before the first delivery.

        Raises WrongTenant, LogtoUnreachable, LogtoApiError, StoreUnavailable.
        """
        newest = await self._host.read(lambda store: store.inbox.search(_NEWEST, large=False))
        if newest and read_webhook_id(newest[0].body) in self._our_webhooks:
            return
        if time.monotonic() < self._refused_until:
            raise WrongTenant()
        received = await self._host.read(lambda store: store.inbox.search(_RECENT, large=False))
        deliveries = [delivery for delivery in received if _is_from_logto(delivery)]
        if deliveries:
            is_ours = await self._has_sent(deliveries)
        else:
            is_ours = not by_records or await self._has_records()
        if not is_ours:
            self._refused_until = time.monotonic() + AGAIN_S
            raise WrongTenant()

    async def _has_sent(self, deliveries: Sequence[StoredDelivery]) -> bool:
        """Whether this Logto has the webhook that sent the newest delivery, or if that was deleted,
        one of the users and organizations that its deliveries are about."""
        sender = read_webhook_id(deliveries[0].body)
        sent = [delivery for delivery in deliveries if read_webhook_id(delivery.body) == sender]
        if await self._has_webhook(sender) or await self._knows_any(_list_subjects(sent)):
            self._our_webhooks |= {sender} if sender is not None else set()
            return True
        return False

    async def _has_webhook(self, webhook_id: str | None) -> bool:
        if webhook_id is None:
            return False
        async for page in self._logto.webhooks():
            if any(get_from(webhook, "id") == webhook_id for webhook in page.content):
                return True
        return False

    async def _has_records(self) -> bool:
        """Whether this Logto has one of the stored records, if there are any."""
        users = await self._host.read(lambda store: store.keys("user", SAMPLE_SIZE))
        organizations = await self._host.read(lambda store: store.keys("organization", SAMPLE_SIZE))
        keys = users + organizations
        if keys and not self._knows_records:
            self._knows_records = await self._knows_any(keys)
        return not keys or self._knows_records

    async def _knows_any(self, keys: Sequence[Key]) -> bool:
        for key in keys:
            ask = self._logto.user if key.kind == "user" else self._logto.organization
            if (await ask(key.id)).content is not None:
                return True
        return False


def _is_from_logto(delivery: StoredDelivery) -> bool:
    """Whether it is neither a test payload nor a sample from `trigger`."""
    sender = read_webhook_id(delivery.body) or ""
    return delivery.state is not DeliveryState.IGNORED and not sender.startswith(SAMPLE_WEBHOOK)


def _list_subjects(deliveries: Sequence[StoredDelivery]) -> list[Key]:
    """List the users and organizations of deliveries, the newest first, without deletions."""
    saying = [delivery for delivery in deliveries if delivery.event not in DELETIONS]
    subjects = dict.fromkeys(delivery.subject for delivery in saying if delivery.subject)
    parts = [subject.partition(":") for subject in subjects]
    keys: list[Key] = []
    for kind in ("user", "organization"):
        ids = [logto_id for prefix, _, logto_id in parts if prefix == kind]
        usable = [logto_id for logto_id in ids if api_responses.can_be_id(logto_id)]
        keys += [Key(kind, logto_id) for logto_id in usable[:SAMPLE_SIZE]]
    return keys
