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

import gc
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Final

import msgspec

DEEPEST: Final = 100  # levels that `decode` decodes
# Levels of a value that reach tables and handlers. Less than DEEPEST, so that a value is cut at
# the same place wherever it stands: alone, in a delivery, or in an entry of Logto's log.
SHOWN: Final = 64
MANY: Final = 20_000  # objects and lists of a large value

_FIRST_EXPONENT: Final = 10**21  # from here on JavaScript writes 1e+21
# Every digit becomes a 0, so that 16 in a row are found fast; a regular expression takes 4 us.
_DIGITS: Final = bytes(48 if 48 <= byte <= 57 else 0 for byte in range(256))
_LONG_NUMBER: Final = b"0" * 16
# An integer that may be beyond 2**53.
_LONG_INTEGER: Final = re.compile(rb"(?<![\d.eE+-])-?[1-9]\d{15,}(?![\d.eE])")

# One step down for each bracket that opens, one up (-1) for each that closes.
_STEPS: Final = bytes({91: 1, 123: 1, 93: 255, 125: 255}.get(byte, 0) for byte in range(256))
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_SLICE: Final = 2**16  # bytes that are walked at once: other threads run in between
_SPACE: Final = b" \t\r\n"

# Bytes of no UTF-8 text: what two escapes are hidden as, and what marks the ends of deep parts.
_BACKSLASH: Final = b"\xff\xff"
_QUOTE: Final = b"\xfe\xfe"
_END: Final = b"\xfd"
# Half of a pair of surrogates without its other half.
_HALF: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def _number(text: str | bytes) -> int | float | None:
    """JavaScript knows one kind of number: 1.0, 1e0 and 1 are the same."""
    number = float(text)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < _FIRST_EXPONENT else number


_decoder = msgspec.json.Decoder(float_hook=_number)
_encoder = msgspec.json.Encoder(order="sorted")
_as_it_stands = msgspec.json.Encoder()


def decode(body: bytes | str) -> Any:
    """Decode JSON. Raises ValueError for what isn't JSON."""
    text = body.encode(errors="replace") if isinstance(body, str) else body
    brackets = _count_brackets(text)
    if brackets < MANY:
        return _decode(text, brackets)
    with no_collection():
        return _decode(text, brackets)


def encode(value: Any) -> bytes:
    """Encode what `decode` gave as canonical JSON: sorted keys, no spaces."""
    try:
        return _encoder.encode(value)
    except RecursionError:
        return _encoder.encode(_flatten(value))


def digest(value: Any) -> bytes:
    """Return the SHA-256 of the canonical JSON, 32 bytes."""
    return hashlib.sha256(encode(value)).digest()


def shown(value: Any) -> Any:
    """Return a value for tables and handlers: what is nested deeper than `SHOWN` levels is a string
    with its JSON. Return `value` itself if nothing is."""
    if not isinstance(value, dict | list):
        return value
    # Walking the text is much faster than walking the value.
    text = _encode_as_it_stands(value)
    if _count_brackets(text) <= SHOWN or not _is_deeper(_take_strings(text)[0], SHOWN):
        return value
    with no_collection():
        return _cut_and_decode(text, SHOWN, _text_of)


def _count_brackets(text: bytes) -> int:
    """Count those that open."""
    return text.count(b"{") + text.count(b"[")


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking a large value: that takes many times as long as
    decoding it, and other threads stand still."""
    if not gc.isenabled():
        yield
        return
    gc.collect(1)  # what is garbage by now would else become old, too
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # What is new goes to the oldest generation, which is seldom walked.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def _decode(text: bytes, brackets: int) -> Any:
    try:
        # Brackets in strings count, too: this is an estimate.
        if brackets > DEEPEST and _is_deeper(text, DEEPEST):
            return _cut_and_decode(_repair(text), DEEPEST, msgspec.Raw)
        return _decoder.decode(_round_long_integers(text))
    except (RecursionError, ValueError):
        # Slow, and seldom: what no strict parser reads.
        return _cut_and_decode(_repair(text), DEEPEST, msgspec.Raw)


def _cut_and_decode(text: bytes, levels: int, replace: Callable[[bytes], Any]) -> Any:
    """Decode valid UTF-8, with what `replace` makes of each part that is nested deeper than so many
    levels."""
    pieces = _cut(text, levels)
    deep = map(replace, pieces[1::2])
    # A number that stands in no text that can be made; the hook for numbers gets it as it is spelt.
    digits = str(int(hashlib.sha256(text).hexdigest(), 16))
    mark = f"0.{digits[:15]}e{digits[15:30]}"

    def read(number: str) -> Any:
        return next(deep) if number == mark else _number(number)

    decoder = msgspec.json.Decoder(float_hook=read)
    return decoder.decode(_round_long_integers(mark.encode().join(pieces[::2])))


def _cut(text: bytes, levels: int) -> list[bytes]:
    """Cut a text where it becomes deeper than so many levels, and where it comes up again: every
    other piece is too deep, the first is not. Those have no spaces."""
    structure, strings = _take_strings(text)
    flags = b"".join(
        bytes(map(levels.__lt__, depths)) for depths in _walk(structure.translate(_STEPS))
    )
    pieces, start = [], 0
    for run in _RUN.finditer(flags):
        begin, end = run.start(), run.end() + 1  # with the bracket that closes it
        pieces.append(structure[start:begin])
        pieces.append(structure[begin:end].translate(None, _SPACE))
        start = end
    pieces.append(structure[start:])
    return _put_strings(_END.join(pieces), strings).split(_END)


_RUN: Final = re.compile(rb"\x01+")


def _is_deeper(text: bytes, levels: int) -> bool:
    steps = text.translate(_STEPS, _NOT_BRACKETS)
    return any(max(depths) > levels for depths in _walk(steps))


def _walk(steps: bytes) -> Iterator[list[int]]:
    """Return how deep the text is after each step, slice by slice."""
    depth = 0
    for start in range(0, len(steps), _SLICE):
        taken = memoryview(steps)[start : start + _SLICE].cast("b")
        depths = list(accumulate(taken, initial=depth))
        depth = depths[-1]
        yield depths[1:]


def _take_strings(text: bytes) -> tuple[bytes, list[bytes]]:
    """Take the strings out of a text, so that its brackets and numbers can be found at once: each
    leaves one quote. In the strings, some escapes are hidden."""
    valid = text if text.isascii() else text.decode(errors="replace").encode()
    pieces = valid.replace(rb"\\", _BACKSLASH).replace(rb"\"", _QUOTE).split(b'"')
    return b'"'.join(pieces[::2]), pieces[1::2]


def _put_strings(structure: bytes, strings: list[bytes]) -> bytes:
    """Undo `_take_strings`."""
    between = structure.split(b'"')
    pieces = [b""] * (len(between) + len(strings))
    pieces[::2], pieces[1::2] = between, strings
    return b'"'.join(pieces).replace(_QUOTE, rb"\"").replace(_BACKSLASH, rb"\\")


def _round_long_integers(text: bytes) -> bytes:
    """Turn integers beyond 2**53 into what JavaScript would hold."""
    if _LONG_NUMBER not in text.translate(_DIGITS):
        return text
    structure, strings = _take_strings(text)
    if _LONG_NUMBER not in structure.translate(_DIGITS):  # most often, it is an id
        return text
    return _put_strings(_LONG_INTEGER.sub(_round, structure), strings)


def _round(integer: re.Match[bytes]) -> bytes:
    number = _number(integer[0])
    return b"null" if number is None else repr(number).encode()


def _repair(text: bytes) -> bytes:
    """Write U+FFFD for what no Unicode text holds."""
    valid = text.decode(errors="replace").encode()
    if b"\\u" not in valid:
        return valid
    hidden = valid.replace(rb"\\", _BACKSLASH)
    return _HALF.sub(rb"\\ufffd", hidden).replace(_BACKSLASH, rb"\\")


def _encode_as_it_stands(value: Any) -> bytes:
    try:
        return _as_it_stands.encode(value)
    except RecursionError:
        return _as_it_stands.encode(_flatten(value))


def _text_of(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _flatten(value: Any) -> Any:
    """Copy a value that is deeper than functions may call each other, as nothing is that `decode`
    gave, with JSON in the place of what is below `DEEPEST` levels."""
    whole: list[Any] = [value]
    containers: list[tuple[Any, int]] = [(whole, 0)]
    while containers:
        container, depth = containers.pop()
        for place, item in _items(container):
            if depth == DEEPEST and isinstance(item, dict | list):
                container[place] = msgspec.Raw(_write(item))
            elif isinstance(item, dict | list):
                container[place] = item.copy()
                containers.append((container[place], depth + 1))
    return whole[0]


def _write(value: Any) -> bytes:
    """Encode a value of any depth, its keys in their order."""
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


def _items(container: Any) -> Any:
    return list(container.items()) if isinstance(container, dict) else enumerate(container)
