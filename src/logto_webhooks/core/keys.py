"""Keys of hooks, and requests that no key signed: set aside, so that a rotation loses nothing.

What is set aside is not believed: it is kept within bounds, and nothing of it is used but the hook
that it names, until a key proves it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final, Protocol

from msgspec import Struct

OVERLAP_MS: Final = 600_000  # how long a key that was replaced is still accepted
_HOOK = re.compile(rb'"hookId":\s*"([A-Za-z0-9_-]{1,64})"')


class HookKey(Struct, frozen=True, kw_only=True):
    """A key as Logto told it, accepted until it is replaced or `until` (ms)."""

    hook: str
    key: str
    learnt_at: int
    until: int | None = None


class Stranger(Struct, frozen=True, kw_only=True):
    """A request whose signature is well-formed, and of no key that was known; `known` is whether
    the hook that it names has sent something before."""

    body: bytes
    signature: str
    received_at: int
    hook: str
    known: bool
    id: int = 0


class Bounds(Struct, frozen=True):
    """How much is kept: the newest of so many rows and bytes, and nothing older."""

    rows: int
    bytes: int
    age_ms: int


# By whether the hook is known: junk that names none of ours can't push out what does.
BOUNDS: Final = {
    True: Bounds(10_000, 64 * 2**20, 7 * 86_400_000),
    False: Bounds(1_000, 4 * 2**20, 86_400_000),
}


class Keys(Protocol):
    """What a database knows of keys, and what is set aside, within one transaction."""

    def learnt(self) -> list[HookKey]:
        """The keys that Logto told."""

    def learn(self, keys: Sequence[HookKey]) -> None:
        """Keep keys; the others of the same hooks end after the overlap, unless they do before."""

    def used(self, marks: dict[str, int]) -> dict[str, int]:
        """Note when keys were last used (ms), by their fingerprints; return that of all."""

    def set_aside(self, strangers: Sequence[Stranger]) -> None:
        """Keep requests, and of all that are kept what is within the bounds."""

    def strangers(self, after: int, limit: int) -> list[Stranger]:
        """List what is set aside, the oldest first."""

    def release(self, ids: Sequence[int]) -> None:
        """Forget what was set aside."""

    def aside(self, since: int = 0, *, known: bool = False) -> int:
        """Count what is set aside, received after a moment (ms); of `known` hooks, or of any."""


def hook_named(body: bytes) -> str | None:
    """The hook that an unverified body names, without parsing it; None if it names none."""
    found = _HOOK.search(body, max(0, body.rfind(b'"hookId"')))
    return found[1].decode() if found else None


def fingerprint(key: str) -> str:
    """By what a key is known without being told."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]
