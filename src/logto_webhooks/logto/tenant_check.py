"""Check that the Management API belongs to the tenant whose records are kept here."""

from __future__ import annotations

from typing import Final

from logto_webhooks.errors import WrongTenant
from logto_webhooks.interfaces import Logto, TransactionRunner
from logto_webhooks.logto import delivery_log

_RECENT: Final = 200
SAMPLE_SIZE: Final = 20  # users, and organizations, known here of whom ours must have one


async def ensure_same_tenant(logto: Logto, host: TransactionRunner) -> None:
    """Ask, before anything of its is written here: for somebody of another Logto's, once known,
    would prove that other Logto to be ours. Raises WrongTenant, LogtoUnreachable, LogtoApiError,
    StoreUnavailable."""
    users = await host.read(lambda store: store.keys("user", SAMPLE_SIZE))
    organizations = await host.read(lambda store: store.keys("organization", SAMPLE_SIZE))
    if not users and not organizations:
        return
    recent = await host.read(lambda store: store.recent(_RECENT))
    senders = {delivery_log.read_hook_id(delivery.body) for delivery in recent}
    async for page in logto.hooks():
        if any(isinstance(hook, dict) and hook.get("id") in senders for hook in page.content):
            return
    for key in users:
        if (await logto.user(key.id)).content is not None:
            return
    for key in organizations:
        if (await logto.organization(key.id)).content is not None:
            return
    raise WrongTenant()
