"""One JSON for the whole product: decode, encode canonically, digest.

Logto's log returns a body with another order of keys and another spelling of numbers, so a
delivery and a value are identified by a digest of their canonical JSON, not of their bytes.

`decode` reads all that Node and PostgreSQL can write, also where msgspec refuses it:

- What is nested deeper than `DEEPEST` levels stays undecoded JSON text (`msgspec.Raw`), which
  `encode` writes out again. So no function here or after it recurses deeper than that.
- Half of a surrogate pair, escaped or not, and bytes that aren't UTF-8 become U+FFFD.
- A number that is out of range is null, as in JavaScript's own JSON.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Final

import msgspec

DEEPEST: Final = 100  # levels that `decode` decodes
# Levels of a value that reach tables and handlers. Less than DEEPEST, so that a value is cut at
# the same place wherever it stands: alone, in a delivery, or in an entry of Logto's log.
SHOWN: Final = 64

_LARGEST_EXACT: Final = 2**53
_FIRST_EXPONENT: Final = 10**21  # from here on JavaScript writes 1e+21
# Every digit becomes a 0, so that 16 in a row are found fast; a regular expression takes 4 us.
_DIGITS: Final = bytes(48 if 48 <= byte <= 57 else 0 for byte in range(256))
_LONG_NUMBER: Final = b"0" * 16
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

_BRACKETS: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]+|[\]}]+', re.DOTALL)
_SPACE: Final = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")|[ \t\r\n]+', re.DOTALL)
_ANY_SPACE: Final = re.compile(rb"[ \t\r\n]")
_ESCAPES: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole pair: kept
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\(?!u[dD][89a-fA-F])."
)


def _number(text: str | int) -> int | float | None:
    """JavaScript knows one kind of number: 1.0, 1e0 and 1 are the same."""
    try:
        number = float(text)
    except OverflowError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < _FIRST_EXPONENT else number


_decoder = msgspec.json.Decoder(float_hook=_number)
_encoder = msgspec.json.Encoder(order="sorted")
_as_it_stands = msgspec.json.Encoder()


def decode(body: bytes | str) -> Any:
    """Decode JSON. Raises ValueError for what isn't JSON."""
    text = body.encode(errors="replace") if isinstance(body, str) else body
    try:
        value = _cut_and_decode(text) if _is_deep(text) else _decoder.decode(text)
    except (RecursionError, ValueError):
        # Slow, and seldom: what no strict parser reads.
        value = _cut_and_decode(_repaired(text))
    return _as_javascript(value) if _LONG_NUMBER in text.translate(_DIGITS) else value


def encode(value: Any) -> bytes:
    """Encode what `decode` gave as canonical JSON: sorted keys, no spaces."""
    try:
        return _encoder.encode(value)
    except RecursionError:
        return _encoder.encode(_cut(value, DEEPEST, msgspec.Raw))


def digest(value: Any) -> bytes:
    """Return the SHA-256 of the canonical JSON, 32 bytes."""
    return hashlib.sha256(encode(value)).digest()


def shown(value: Any) -> Any:
    """Return a value for tables and handlers: what is nested deeper than `SHOWN` levels is a string
    with its JSON. Return `value` itself if nothing is."""
    return value if _is_shallow(value) else _cut(value, SHOWN, _text_of)


def _is_deep(text: bytes) -> bool:
    """Estimate whether a text nests deeper than `DEEPEST`; brackets in its strings count, too."""
    if text.count(b"{") + text.count(b"[") <= DEEPEST:
        return False
    brackets = text.translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > DEEPEST


def _cut_and_decode(text: bytes) -> Any:
    """Decode, with a marked number in the place of each part that is too deep."""
    deep = list(_deep_parts(text))
    if not deep:
        return _decoder.decode(text)
    mark = hashlib.sha256(text).hexdigest()  # which stands in no text that can be made
    pieces, end = [], 0
    for number, (start, stop) in enumerate(deep):
        pieces += [text[end:start], b'{"%s":%d}' % (mark.encode(), number)]
        end = stop
    value = [_decoder.decode(b"".join([*pieces, text[end:]]))]
    parts = [msgspec.Raw(_repaired(_without_space(text[start:stop]))) for start, stop in deep]
    containers: list[Any] = [value]
    while containers:
        container = containers.pop()
        for place, item in _items(container):
            if isinstance(item, dict) and mark in item:
                container[place] = parts[item[mark]]
            elif isinstance(item, dict | list):
                containers.append(item)
    return value[0]


def _without_space(text: bytes) -> bytes:
    return _SPACE.sub(rb"\1", text) if _ANY_SPACE.search(text) else text


def _deep_parts(text: bytes) -> Iterator[tuple[int, int]]:
    """Find the parts of a JSON text below `DEEPEST` levels. Raises DecodeError."""
    depth = start = 0
    for found in _BRACKETS.finditer(text):
        first, length = text[found.start()], found.end() - found.start()
        if first in b"[{":
            if depth <= DEEPEST < depth + length:
                start = found.start() + DEEPEST - depth
            depth += length
        elif first in b"]}":
            if depth - length <= DEEPEST < depth:
                yield start, found.start() + depth - DEEPEST
            depth -= length
    if depth > DEEPEST:
        raise msgspec.DecodeError("Input data was truncated")


def _cut(value: Any, levels: int, replace: Any) -> Any:
    """Copy a value, with what is below so many levels replaced by what `replace` makes of its
    JSON."""
    whole: list[Any] = [value]
    containers: list[tuple[Any, int]] = [(whole, 0)]
    while containers:
        container, depth = containers.pop()
        for place, item in _items(container):
            if isinstance(item, msgspec.Raw) or (depth == levels and isinstance(item, dict | list)):
                container[place] = replace(_flat(item))
            elif isinstance(item, dict | list):
                container[place] = item.copy()
                containers.append((container[place], depth + 1))
    return whole[0]


def _flat(value: Any) -> bytes:
    """Encode a value of any depth, its keys in their order."""
    try:
        return _as_it_stands.encode(value)
    except RecursionError:
        parts: list[Any] = [value]  # what is still to write, the next one last
        written: list[bytes] = []
        while parts:
            part = parts.pop()
            if isinstance(part, bytes):
                written.append(part)
            elif isinstance(part, dict | list):
                parts += reversed(list(_pieces(part)))
            else:
                written.append(_as_it_stands.encode(part))
        return b"".join(written)


def _pieces(container: Any) -> Iterator[Any]:
    yield b"{" if isinstance(container, dict) else b"["
    for number, (place, item) in enumerate(_items(container)):
        if number:
            yield b","
        if isinstance(container, dict):
            yield _as_it_stands.encode(place) + b":"
        yield item
    yield b"}" if isinstance(container, dict) else b"]"


def _text_of(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(SHOWN):
        level = [
            item
            for container in level
            for item in (
                container.values()
                if isinstance(container, dict)
                else container
                if isinstance(container, list)
                else ()
            )
            if isinstance(item, dict | list | msgspec.Raw)
        ]
        if not level:
            return True
    return False


def _repaired(text: bytes) -> bytes:
    """Write U+FFFD for what no Unicode text holds."""
    valid = text.decode(errors="replace").encode()
    return _ESCAPES.sub(lambda found: rb"\ufffd" if found[1] else found[0], valid)


def _items(container: Any) -> Any:
    return list(container.items()) if isinstance(container, dict) else enumerate(container)


def _as_javascript(value: Any) -> Any:
    """Turn integers beyond 2**53 into what JavaScript would hold; in place, however deep."""
    whole = [value]
    containers: list[Any] = [whole]
    while containers:
        container = containers.pop()
        for place, item in _items(container):
            if isinstance(item, dict | list):
                containers.append(item)
            elif isinstance(item, int) and abs(item) >= _LARGEST_EXACT:
                container[place] = _number(item)
    return whole[0]
