"""The keys that a process accepts: those that are configured, and those that Logto told."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final

from logto_webhooks.core.keys import HookKey, fingerprint, hook_of_sender, is_key

_LOOK_MS: Final = 1_000
_LARGEST: Final = 256 * 2**10  # of a body that is parsed for its hook's id


class Keyring:
    """`hooks` are those that are known to send here."""

    def __init__(self, configured: Sequence[str]) -> None:
        self._keys = self._configured = tuple(configured)
        self._learnt: Sequence[HookKey] = ()
        self._next_end = inf
        self.hooks: set[str] = set()
        self._used: dict[str, int] = {}
        self._looked: dict[str, int] = {}

    def at(self, now: int) -> tuple[str, ...]:
        """The keys that are accepted now (ms); one that has ended isn't, be it configured."""
        if now >= self._next_end:
            self._choose(now)
        return self._keys

    def learn(self, learnt: Sequence[HookKey], now: int) -> bool:
        """Take what Logto told. Say whether a key is new."""
        before = set(self._keys)
        self._learnt = [each for each in learnt if is_key(each.key)]
        self.hooks |= {each.hook for each in self._learnt}
        self._choose(now)
        return not before.issuperset(self._keys)

    def _choose(self, now: int) -> None:
        ends = {each.key: each.until for each in self._learnt if each.until is not None}
        known = (*self._configured, *(each.key for each in self._learnt))
        self._keys = tuple(dict.fromkeys(key for key in known if ends.get(key, inf) > now))
        self._next_end = min((end for end in ends.values() if end > now), default=inf)

    def note_use(self, key: str, body: bytes, at: int) -> None:
        """Note that a key proved a body (ms), and now and then which hook it is of."""
        if at - self._looked.get(key, 0) > _LOOK_MS:
            self._looked[key] = at
            if len(body) <= _LARGEST and (hook := hook_of_sender(body)):
                self.hooks.add(hook)
        self._used[key] = at

    def take_uses(self) -> dict[str, int]:
        """When keys were used since this was last asked, by their fingerprints."""
        used, self._used = self._used, {}
        return {fingerprint(key): at for key, at in used.items()}
