"""Sign and verify deliveries, and manage keys: configured, learned from Logto, or expired."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from math import inf
from typing import Final, TypeGuard, final

import msgspec
from msgspec import Struct

from logto_webhooks.errors import SignatureRejected

HEADER: Final = "logto-signature-sha-256"
_WELL_FORMED = re.compile(rb"[0-9a-f]{64}")
_SEAL: Final = object()
NO_KNOWN_KEY: Final = "no known key made this signature"
FEW: Final = 16  # keys that are tried at once


@final
class VerifiedBody:
    """A body that is known to come from Logto. `verify` returns it."""

    __slots__ = ("content", "key")

    def __init__(self, content: bytes, seal: object, key: str = "") -> None:
        """`key` is the key that verified it."""
        if seal is not _SEAL:
            raise TypeError("a VerifiedBody can only come from verify() or vouch()")
        self.content: bytes = content
        self.key: str = key


def sign(body: bytes, key: str) -> str:
    """Return the value of Logto's signature header for `body`."""
    # Not hmac.digest: it releases the GIL, and then waits for it while a batch is written.
    return hmac.new(key.encode(), body, "sha256").hexdigest()


def verify(body: bytes, signatures: Sequence[bytes], keys: Sequence[str]) -> VerifiedBody:
    """Verify that `body` was signed with one of `keys`, in constant time.

    `signatures` contains the values of all `logto-signature-sha-256` headers of the request. There
    must be exactly one, and it must be well-formed. Raises SignatureRejected.
    """
    if not keys:
        raise SignatureRejected(reason="no signing key is configured")
    verified = try_keys(body, read_signature(signatures), keys)
    if verified is None:
        raise SignatureRejected(reason=NO_KNOWN_KEY, well_formed=True)
    return verified


def read_signature(signatures: Sequence[bytes]) -> bytes:
    """Return the signature that a request has. Raises SignatureRejected."""
    if len(signatures) != 1:
        reason = "the header is missing" if not signatures else "the header was sent twice"
        raise SignatureRejected(reason=reason)
    signature = signatures[0].strip(b" \t")  # HTTP allows whitespace around a value
    if not _WELL_FORMED.fullmatch(signature):
        raise SignatureRejected(reason="the header is not 64 lowercase hex digits")
    return signature


def try_keys(body: bytes, signature: bytes, keys: Sequence[str]) -> VerifiedBody | None:
    """Return the body if one of `keys` made the well-formed signature, in constant time."""
    # Try every key, so that the time doesn't reveal which one matched. Ignore an empty key, because
    # anybody can sign with it.
    matches = [
        key
        for key in keys
        if hmac.compare_digest(signature, sign(body, key).encode()) and key != ""
    ]
    return VerifiedBody(body, _SEAL, matches[0]) if matches else None


def trust(body: bytes) -> VerifiedBody:
    """Treat bytes as verified. For bodies from the inbox, which were verified on arrival."""
    return VerifiedBody(body, _SEAL)


OVERLAP_MS: Final = 600_000  # how long a replaced key is still accepted
SHORTEST: Final = 16  # characters; Logto's keys have 32
_WEBHOOK_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOOK_ID: Final = b'"hookId"'
_ITS_VALUE = re.compile(rb'[ \t\r\n]{0,9}:[ \t\r\n]{0,9}"([A-Za-z0-9_-]{1,64})"')
_PLACES: Final = 4  # where a webhook's ID is looked for, from each end of a body
_ASSIGNED = re.compile(r"(export\s+)?[A-Za-z_][A-Za-z0-9_]*\s*=+[^=]")
_PLACEHOLDER = re.compile(
    r"\$\{?\w+\}?|<.*>|\{\{.*\}\}|.*\u2026.*|[.*]+|x{3,}|your[-_ ].*|change[-_ ]?(it|me)", re.I
)
_QUOTES: Final = "\"'`\u00ab\u00bb\u2018\u2019\u201c\u201d\u201e"


class WebhookKey(Struct, frozen=True, kw_only=True):
    """A key that Logto's API returned, accepted until it is replaced or `until` (ms). `learnt_at`
    is when Logto was asked."""

    webhook_id: str
    key: str
    learnt_at: int
    until: int | None = None

    def __repr__(self) -> str:
        """Leave out the key."""
        return f"WebhookKey(webhook_id={self.webhook_id!r}, until={self.until!r})"


class RejectedRequest(Struct, frozen=True, kw_only=True):
    """A request with a well-formed signature that no known key made. `known` is whether the webhook
    that it names is known to send here."""

    body: bytes
    signature: str
    received_at: int
    webhook_id: str
    known: bool
    id: int = 0


class QuarantineLimits(Struct, frozen=True):
    """How much is kept: the newest rows, up to this number, total size and age."""

    rows: int
    bytes: int
    age_ms: int


# By whether the webhook is known, so that junk can't push out requests that name a known one.
BOUNDS: Final = {
    True: QuarantineLimits(10_000, 64 * 2**20, 7 * 86_400_000),
    False: QuarantineLimits(1_000, 4 * 2**20, 86_400_000),
}


class _Sender(Struct, rename="camel"):
    hook_id: str = ""  # a value of another type is skipped, so a huge one costs no memory


def problem_of_key(key: str) -> str | None:
    """Return why a text can't be a webhook's signing key; None if it can. Doesn't quote the key."""
    if not key.strip():
        return "it is empty"
    if (problem := problem_of_secret(key)) is not None:
        return problem
    if len(key) < SHORTEST:
        problem = f"it has fewer than {SHORTEST} characters, so it is easy to guess"
        return f"{problem}: copy the key from Logto's console"
    return None


def problem_of_secret(key: str) -> str | None:
    """Return why a text can't be a key or secret of Logto, such as quotes around it."""
    if not key:
        return None
    if _ASSIGNED.match(key):
        return "it is a whole NAME=value line: use only the part after the ="
    if key[0] in _QUOTES or key[-1] in _QUOTES:
        return "it has quotes around it: remove them"
    if any(character in _QUOTES for character in key):
        return "it contains quotes: copy it again"
    if _PLACEHOLDER.fullmatch(key):
        return "it is a placeholder: replace it with the key"
    if any(character.isspace() for character in key):
        return "it contains spaces or line breaks: copy it again"
    if not (key.isascii() and key.isprintable()):
        return "it contains characters that no key has: copy it again"
    return None


def is_key(value: object) -> TypeGuard[str]:
    """Whether a value, such as one from an API, can be a signing key."""
    return isinstance(value, str) and problem_of_key(value) is None


def read_webhook_id(body: bytes) -> str | None:
    """Return the ID of the webhook that a body names; None if it names none. Only in a verified
    body is it sure to be the sender."""
    try:
        webhook_id = msgspec.json.decode(body, type=_Sender).hook_id
    except (ValueError, RecursionError):
        return None
    return webhook_id if _WEBHOOK_ID.fullmatch(webhook_id) else None


def guess_webhook_ids(body: bytes) -> list[str]:
    """Return the IDs after the first and the last few `"hookId"` of a body, at any level.

    Nothing is parsed, so this is quick for any body: anybody can send it.
    """
    places: list[int] = []
    first, last = -1, len(body)
    for _ in range(_PLACES):
        first = body.find(_HOOK_ID, first + 1)
        last = body.rfind(_HOOK_ID, 0, last)
        if not 0 <= first <= last:  # the others are known
            break
        places += [first, last]
    values = (_ITS_VALUE.match(body, place + len(_HOOK_ID)) for place in places)
    return list(dict.fromkeys(value[1].decode() for value in values if value))


def fingerprint(key: str) -> str:
    """Return a text that identifies a key without revealing it."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


_LOOK_MS: Final = 1_000
_LARGEST: Final = 16 * 2**10  # larger bodies aren't parsed for their webhook's ID


class Keyring:
    """The signing keys. `webhook_ids` are the IDs of webhooks that are known to send here."""

    def __init__(self, configured: Sequence[str]) -> None:
        self._keys = self._configured = tuple(configured)
        self._learnt: Sequence[WebhookKey] = ()
        self._by_webhook: dict[str, list[str]] = {}  # the learnt keys
        self._verified: dict[str, str] = {}  # the key that verified a body, by its webhook
        self._next_end = inf
        self._accepted = frozenset(configured)
        self.webhook_ids: set[str] = set()
        self._used: dict[str, int] = {}
        self._looked: dict[str, int] = {}

    def at(self, now: int) -> tuple[str, ...]:
        """Return the keys that are accepted at `now` (ms). An expired key isn't, even if it is
        configured."""
        if now >= self._next_end:
            self._choose(now)
        return self._keys

    def guess(self, body: bytes, now: int) -> Sequence[str]:
        """Return the keys to try first: all of them if they are few. Otherwise, some configured
        ones, and those of the webhooks that the body, which nobody has verified, names.

        Others may have signed it, too: what these don't verify must be tried with all.
        """
        keys = self.at(now)
        if len(keys) <= FEW:
            return keys
        first = list(keys[: min(FEW, len(self._configured))])
        for webhook_id in guess_webhook_ids(body):
            of_webhook = (*self._by_webhook.get(webhook_id, ()), self._verified.get(webhook_id))
            first += [key for key in of_webhook if key in self._accepted]
        return list(dict.fromkeys(first))

    def learn(self, learnt: Sequence[WebhookKey], now: int) -> bool:
        """Replace the keys from Logto's API. Return whether one is new."""
        before = set(self._keys)
        self._learnt = [key for key in learnt if is_key(key.key)]
        by_webhook: dict[str, list[str]] = {}
        for known in self._learnt:
            by_webhook.setdefault(known.webhook_id, []).append(known.key)
        self._by_webhook = by_webhook
        self.webhook_ids |= by_webhook.keys()
        self._choose(now)
        return not before.issuperset(self._keys)

    def _choose(self, now: int) -> None:
        ends = {learnt.key: learnt.until for learnt in self._learnt if learnt.until is not None}
        all_keys = (*self._configured, *(learnt.key for learnt in self._learnt))
        self._keys = tuple(dict.fromkeys(key for key in all_keys if ends.get(key, inf) > now))
        self._next_end = min((end for end in ends.values() if end > now), default=inf)
        self._accepted = frozenset(self._keys)

    def find_ended(self, now: int) -> dict[str, int]:
        """Return the configured keys that a rotation has ended, by their fingerprints, and when
        (ms). They aren't accepted."""
        ends = {key.key: key.until for key in self._learnt if key.until is not None}
        return {
            fingerprint(key): ends[key] for key in self._configured if ends.get(key, inf) <= now
        }

    def note_use(self, key: str, body: bytes, at: int) -> None:
        """Note when a key verified a body (ms), and at most once a second, the body's webhook."""
        if at - self._looked.get(key, 0) > _LOOK_MS:
            self._looked[key] = at
            if len(body) <= _LARGEST and (webhook := read_webhook_id(body)):
                self.webhook_ids.add(webhook)
                self._verified[webhook] = key
        self._used[key] = at

    def take_uses(self) -> dict[str, int]:
        """Return when keys were used since the last call, by their fingerprints."""
        used, self._used = self._used, {}
        return {fingerprint(key): at for key, at in used.items()}
