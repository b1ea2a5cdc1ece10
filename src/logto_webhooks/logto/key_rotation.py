"""Change the signing key of a webhook without losing a delivery."""

from __future__ import annotations

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.interfaces import Clock, Logto, Store, TransactionRunner
from logto_webhooks.logto.webhooks import Webhook, note_on_failure, parse_created
from logto_webhooks.signing_keys import WebhookKey, fingerprint

_CHANGED: Final = "the key is changed at Logto, so run this again"


class RotationResult(Struct, frozen=True, kw_only=True):
    """A webhook with a new key; times in milliseconds since the epoch.

    `signing_key` is the new key. The old one needn't be set beside it: it is in the database.
    """

    hook: str
    url: str
    signing_key: str
    old_ends_at: int
    old_used_at: int | None

    def __repr__(self) -> str:
        """Without the keys."""
        return f"RotationResult(hook={self.hook!r}, url={self.url!r})"


async def rotate_key(
    logto: Logto, host: TransactionRunner, clock: Clock, hook: Webhook, overlap_ms: int
) -> RotationResult:
    """Change the key at Logto, and let every process on the database know of both.

    The old one is written down before: whatever fails then, what it signs is accepted, unless it
    can't be a key. Raises WebhookChanged, KeyNotTold, LogtoUnreachable, LogtoApiError,
    StoreUnavailable.
    """
    old = WebhookKey(hook=hook.id, key=hook.signing_key, learnt_at=clock.now())
    await host.run(lambda store: store.keys_of_hooks.learn([old]))
    with note_on_failure("the key may be another all the same, so run this again"):
        changed = parse_created((await logto.rotate_key(hook.id)).content, hook.name)
    now = clock.now()
    new = WebhookKey(hook=hook.id, key=changed.signing_key, learnt_at=now)
    ending = replace(old, until=now + overlap_ms)

    def learn(store: Store) -> dict[str, int]:
        store.keys_of_hooks.learn([ending, new])
        return store.keys_of_hooks.used({})

    try:
        used = await host.run(learn)
    except StoreUnavailable as error:
        raise StoreUnavailable(problem=f"{error.problem}; {_CHANGED}") from None
    return RotationResult(
        hook=hook.id,
        url=hook.url,
        signing_key=new.key,
        old_ends_at=now + overlap_ms,
        old_used_at=used.get(fingerprint(old.key)),
    )
