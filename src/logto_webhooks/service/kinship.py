"""Whether a Logto is the one whose records are kept here, before it is believed that somebody is
gone: a wrong LOGTO_ENDPOINT is likelier than that all are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from logto_webhooks.core import log
from logto_webhooks.core.ports import Host, Logto
from logto_webhooks.core.record import Key
from logto_webhooks.errors import AnotherLogto

_RECENT: Final = 200


async def check(logto: Logto, host: Host, known: Iterable[Key]) -> None:
    """Ask about hooks, and about users of whom it may have one. Raises AnotherLogto,
    LogtoUnreachable, LogtoRefused, StoreUnavailable."""
    recent = await host.read(lambda store: store.recent(_RECENT))
    senders = {log.hook_of(each.body) for each in recent}
    async for page in logto.hooks():
        if any(isinstance(hook, dict) and hook.get("id") in senders for hook in page.content):
            return
    for key in known:
        if (await logto.user(key.id)).content is not None:
            return
    raise AnotherLogto()
