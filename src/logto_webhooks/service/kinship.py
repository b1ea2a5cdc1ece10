"""Whether a Logto is the one whose records are kept here, before it is believed that somebody is
gone: a wrong LOGTO_ENDPOINT is likelier than that all are."""

from __future__ import annotations

from typing import Final

from logto_webhooks.core import log
from logto_webhooks.core.ports import Host, Logto
from logto_webhooks.errors import AnotherLogto

_RECENT: Final = 200
FEW: Final = 20  # users, and organizations, known here of whom ours must have one


async def check(logto: Logto, host: Host) -> None:
    """Ask, before anything of its is written here: for somebody of another Logto's, once known,
    would prove that other Logto to be ours. Raises AnotherLogto, LogtoUnreachable, LogtoRefused,
    StoreUnavailable."""
    users = await host.read(lambda store: store.keys("user", FEW))
    organizations = await host.read(lambda store: store.keys("organization", FEW))
    if not users and not organizations:
        return
    recent = await host.read(lambda store: store.recent(_RECENT))
    senders = {log.hook_of(each.body) for each in recent}
    async for page in logto.hooks():
        if any(isinstance(hook, dict) and hook.get("id") in senders for hook in page.content):
            return
    for key in users:
        if (await logto.user(key.id)).content is not None:
            return
    for key in organizations:
        if (await logto.organization(key.id)).content is not None:
            return
    raise AnotherLogto()
