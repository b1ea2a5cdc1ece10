"""One JSON for the whole product: decode strictly, encode canonically, digest.

Logto's log returns a body with another order of keys and another spelling of numbers, so a
delivery and a value are identified by a digest of their canonical JSON, not of their bytes.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any, Final

import msgspec

_LARGEST_EXACT: Final = 2**53
_LONG_NUMBER = re.compile(rb"[0-9]{16}")


def _number(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    # JavaScript knows one kind of number: 1.0, 1e0 and 1 are the same.
    if number.is_integer() and abs(number) < _LARGEST_EXACT:
        return int(number)
    return number


_decoder = msgspec.json.Decoder(float_hook=_number)
_encoder = msgspec.json.Encoder(order="sorted")


def decode(body: bytes | str) -> Any:
    """Decode JSON; raises ValueError for whatever msgspec refuses, too deep nesting included."""
    try:
        return _decoder.decode(body)
    except RecursionError:
        raise ValueError("the nesting is too deep") from None


def encode(value: Any) -> bytes:
    """Encode as canonical JSON: sorted keys, no spaces, JavaScript's numbers."""
    text = _encoder.encode(value)
    return _encoder.encode(_as_javascript(value)) if _LONG_NUMBER.search(text) else text


def digest(value: Any) -> bytes:
    """Return the SHA-256 of the canonical JSON, 32 bytes."""
    return hashlib.sha256(encode(value)).digest()


def _as_javascript(value: Any) -> Any:
    """Turn integers beyond 2**53 into the floats that JavaScript would hold."""
    if isinstance(value, dict):
        return {key: _as_javascript(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_javascript(item) for item in value]
    if isinstance(value, int) and abs(value) >= _LARGEST_EXACT:
        return _number(str(value))
    return value
