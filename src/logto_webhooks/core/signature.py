"""Logto's signature: `sign` and, beside it, `verify`, whose result alone can be parsed.

Logto sends the lowercase hex HMAC-SHA256 of the raw body, keyed with the hook's signing key
as UTF-8 text, in one header.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from typing import Final, final

from logto_webhooks.errors import SignatureRejected

HEADER: Final = "logto-signature-sha-256"
_WELL_FORMED = re.compile(rb"[0-9a-f]{64}")
_SEAL: Final = object()


@final
class VerifiedBody:
    """A body that Logto is known to have sent; only `verify` and `vouch` make one."""

    __slots__ = ("content", "key")

    def __init__(self, content: bytes, seal: object, key: int = -1) -> None:
        """`key` is the place of the one that proved it, among those that were tried."""
        if seal is not _SEAL:
            raise TypeError("a VerifiedBody comes from verify() or vouch()")
        self.content: bytes = content
        self.key: int = key


def sign(body: bytes, key: str) -> str:
    """Return the value of Logto's signature header for `body`."""
    # Not hmac.digest: it gives up Python's lock, and waits for it while a batch is written.
    return hmac.new(key.encode(), body, "sha256").hexdigest()


def verify(body: bytes, signatures: Sequence[bytes], keys: Sequence[str]) -> VerifiedBody:
    """Prove that `body` was signed with one of `keys`, in constant time.

    `signatures` holds the value of every `logto-signature-sha-256` header of the request:
    anything but exactly one well-formed value is refused. Raises SignatureRejected.
    """
    if not keys:
        raise SignatureRejected(reason="no signing key is configured")
    if len(signatures) != 1:
        reason = "the header is missing" if not signatures else "the header was sent twice"
        raise SignatureRejected(reason=reason)
    given = signatures[0].strip(b" \t")  # HTTP allows blanks around a value
    if not _WELL_FORMED.fullmatch(given):
        raise SignatureRejected(reason="the header is not 64 lowercase hex digits")
    # Every key is tried, so that the time doesn't tell which one matched. An empty key proves
    # nothing: anybody can sign with it.
    matches = [hmac.compare_digest(given, sign(body, key).encode()) and key != "" for key in keys]
    if not any(matches):
        reason = "no configured key gives this signature"
        raise SignatureRejected(reason=reason, well_formed=True)
    return VerifiedBody(body, _SEAL, matches.index(True))


def vouch(body: bytes) -> VerifiedBody:
    """Take bytes as verified: for what the inbox holds, which was verified on its way in."""
    return VerifiedBody(body, _SEAL)
