"""Keys of hooks, and requests that no key signed: set aside, so that a rotation loses nothing.

What is set aside is not believed: it is kept within bounds, and nothing of it is used but the hook
that it names, until a key proves it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeGuard

import msgspec
from msgspec import Struct

OVERLAP_MS: Final = 600_000  # how long a key that was replaced is still accepted
SHORTEST: Final = 16  # characters; the keys that Logto makes have 32
_HOOK = re.compile(rb'"hookId"\s*:\s*"([A-Za-z0-9_-]{1,64})"')
_HOOK_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ASSIGNED = re.compile(r"(export\s+)?[A-Za-z_][A-Za-z0-9_]*\s*=+[^=]")
_PLACEHOLDER = re.compile(r"\$\{?\w+\}?|<.*>|\{\{.*\}\}")
_QUOTES: Final = "\"'`\u00ab\u00bb\u2018\u2019\u201c\u201d\u201e"


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
        """The keys that Logto told; what can't be a key is left out."""

    def learn(self, keys: Sequence[HookKey]) -> None:
        """Keep keys; the others of the same hooks end after the overlap, unless they do before.
        What can't be a key isn't kept."""

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


class _Sender(Struct, rename="camel"):
    hook_id: Any = None


def problem_of_key(key: str) -> str | None:
    """Say why a text can't be the signing key of a webhook; None if it can be. The key itself
    isn't quoted."""
    if not key.strip():
        return "it is empty"
    if (problem := problem_of_secret(key)) is not None:
        return problem
    if len(key) < SHORTEST:
        return f"it has fewer than {SHORTEST} characters, so it can be guessed"
    return None


def problem_of_secret(key: str) -> str | None:
    """Say what a text has that no key or secret of Logto's has, such as quotes around it."""
    if not key:
        return None
    if _ASSIGNED.match(key):
        return "it is a whole NAME=value line: give what stands after the ="
    if key[0] in _QUOTES or key[-1] in _QUOTES:
        return "it has quotes around it, which would be part of the key: remove them"
    if any(each in _QUOTES for each in key):
        return "it has quotes in it, and no key has: copy it again"
    if _PLACEHOLDER.fullmatch(key):
        return "it is a placeholder: put the key in its place"
    if any(each.isspace() for each in key):
        return "it has spaces or line breaks in it, and no key has: copy it again"
    if not (key.isascii() and key.isprintable()):
        return "it holds characters that no key has: copy it again"
    return None


def is_key(value: object) -> TypeGuard[str]:
    """Whether a value, such as one that an API answered, can be a signing key."""
    return isinstance(value, str) and problem_of_key(value) is None


def hook_of_sender(body: bytes) -> str | None:
    """The hook that a body names at its top level; None if it names none. It tells who sent the
    body only if the body is verified."""
    try:
        found = msgspec.json.decode(body, type=_Sender).hook_id
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) and _HOOK_ID.fullmatch(found) else None


def hooks_named(body: bytes) -> set[str]:
    """What may be the hook of an unverified body, found without parsing it: every value of a
    `hookId`, at whatever depth."""
    return {found.decode() for found in _HOOK.findall(body)}


def fingerprint(key: str) -> str:
    """By what a key is known without being told."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]
