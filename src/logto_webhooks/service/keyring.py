"""The keys that a process accepts: those that are configured, and those that Logto told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from logto_webhooks.core.keys import HookKey, fingerprint, hook_named

_LOOK_MS: Final = 1_000


class Keyring:
    """`keys` are all that are tried; `hooks` those that are known to send here."""

    def __init__(self, configured: Sequence[str]) -> None:
        self.keys = self._configured = tuple(configured)
        self.hooks: set[str] = set()
        self._used: dict[str, int] = {}
        self._looked: dict[str, int] = {}

    def learn(self, learnt: Sequence[HookKey], now: int) -> bool:
        """Take what Logto told; what has ended is accepted no more, be it configured. Say whether
        a key is new."""
        before = set(self.keys)
        over = {each.key for each in learnt if each.until is not None and each.until <= now}
        known = (*self._configured, *(each.key for each in learnt))
        self.keys = tuple(dict.fromkeys(key for key in known if key not in over))
        self.hooks |= {each.hook for each in learnt}
        return not before.issuperset(self.keys)

    def note_use(self, key: str, body: bytes, at: int) -> None:
        """Note that a key proved a body (ms), and now and then which hook it is of."""
        if at - self._looked.get(key, 0) > _LOOK_MS:
            self._looked[key] = at
            if hook := hook_named(body):
                self.hooks.add(hook)
        self._used[key] = at

    def take_uses(self) -> dict[str, int]:
        """When keys were used since this was last asked, by their fingerprints."""
        used, self._used = self._used, {}
        return {fingerprint(key): at for key, at in used.items()}
