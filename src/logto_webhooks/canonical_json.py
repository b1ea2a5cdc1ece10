"""Decode JSON, encode it canonically, and compute digests. The whole package uses these functions.

Logto's log returns a body with another order of keys and other spellings of numbers. So deliveries
and values are identified by a digest of their canonical JSON, not of their bytes.

`decode` reads everything that Node and PostgreSQL can write, even if msgspec refuses it:

- Values nested deeper than `DEEPEST` levels stay undecoded JSON text (`msgspec.Raw`), which
  `encode` writes again. So no function here or later recurses deeper than that.
- An unpaired surrogate, escaped or not, and bytes that aren't UTF-8 become U+FFFD.
- A number that is out of range becomes null, as in JavaScript's JSON.
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
# the same level wherever it is: alone, in a delivery, or in an entry of Logto's log.
SHOWN: Final = 64
MANY: Final = 20_000  # objects and lists in a large value

_FIRST_EXPONENT: Final = 10**21  # from here on, JavaScript writes 1e+21
# Every digit becomes 0, so that 16 in a row are found fast: a regular expression takes 4 µs.
_DIGITS: Final = bytes(48 if 48 <= byte <= 57 else 0 for byte in range(256))
_LONG_NUMBER: Final = b"0" * 16
# An integer that may be beyond 2**53.
_LONG_INTEGER: Final = re.compile(rb"(?<![\d.eE+-])-?[1-9]\d{15,}(?![\d.eE])")

# The change of depth at each byte: 1 for an opening bracket, -1 for a closing one.
_STEPS: Final = bytes({91: 1, 123: 1, 93: 255, 125: 255}.get(byte, 0) for byte in range(256))
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_SLICE: Final = 2**16  # bytes processed at once; other threads can run in between
_SPACE: Final = b" \t\r\n"

# Bytes that no UTF-8 text has. They replace two escapes, and mark the ends of deep parts.
_BACKSLASH: Final = b"\xff\xff"
_QUOTE: Final = b"\xfe\xfe"
_END: Final = b"\xfd"
_UNPAIRED_SURROGATE: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def _read_number(text: str | bytes) -> int | float | None:
    """Read a number as JavaScript does: 1.0, 1e0 and 1 are equal."""
    number = float(text)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < _FIRST_EXPONENT else number


_decoder = msgspec.json.Decoder(float_hook=_read_number)
_encoder = msgspec.json.Encoder(order="sorted")
_unsorted_encoder = msgspec.json.Encoder()


def decode(body: bytes | str) -> Any:
    """Decode JSON. Raises ValueError if it isn't JSON."""
    text = body.encode(errors="replace") if isinstance(body, str) else body
    brackets = _count_brackets(text)
    if brackets < MANY:
        return _decode(text, brackets)
    with no_collection():
        return _decode(text, brackets)


def encode(value: Any) -> bytes:
    """Encode a value from `decode` as canonical JSON: sorted keys, no spaces."""
    try:
        return _encoder.encode(value)
    except RecursionError:
        return _encoder.encode(_flatten(value))


def digest(value: Any) -> bytes:
    """Return the SHA-256 of a value's canonical JSON, 32 bytes."""
    return hashlib.sha256(encode(value)).digest()


def is_equal(left: Any, right: Any) -> bool:
    """Whether two values are the same JSON. Python takes `True` for 1 and `False` for 0. JSON
    doesn't, but 1 and 1.0 are one number, as `decode` reads them."""
    pairs = [(left, right)]  # no recursion, because an application's values can be of any depth
    while pairs:
        one, other = pairs.pop()
        if one is other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(value, other[name]) for name, value in one.items()]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif not _is_same_scalar(one, other):
            return False
    return True


def _is_same_scalar(one: Any, other: Any) -> bool:
    if isinstance(one, bool) is not isinstance(other, bool):
        return False
    return bool(one == other or _is_float_of(one, other) or _is_float_of(other, one))


def _is_float_of(one: Any, other: Any) -> bool:
    """Whether a float is 1e300, for example, and the other value the integer with 300 digits that a
    database returns for it."""
    return isinstance(one, float) and type(other) is int and one == _read_number(str(other))


def shown(value: Any) -> Any:
    """Return a value for tables and handlers: parts nested deeper than `SHOWN` levels become
    strings with their JSON. Return `value` itself if there are none."""
    if not isinstance(value, dict | list):
        return value
    # Processing the text is much faster than walking the value.
    text = _encode_unsorted(value)
    if _count_brackets(text) <= SHOWN or not _is_deeper(_take_strings(text)[0], SHOWN):
        return value
    with no_collection():
        return _cut_and_decode(text, SHOWN, _decode_text)


def _count_brackets(text: bytes) -> int:
    """Count the opening brackets."""
    return text.count(b"{") + text.count(b"[")


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from traversing a large value: that takes many times as long as
    decoding it, and blocks other threads."""
    if not gc.isenabled():
        yield
        return
    gc.collect(1)  # otherwise, existing garbage would also become old
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # Move new objects to the oldest generation, which is rarely collected.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def _decode(text: bytes, brackets: int) -> Any:
    try:
        # This is an estimate, because brackets in strings count, too.
        if brackets > DEEPEST and _is_deeper(text, DEEPEST):
            return _cut_and_decode(_repair(text), DEEPEST, msgspec.Raw)
        return _decoder.decode(_round_long_integers(text))
    except (RecursionError, ValueError):
        # Slow but rare: a strict parser can't read it.
        return _cut_and_decode(_repair(text), DEEPEST, msgspec.Raw)


def _cut_and_decode(text: bytes, levels: int, replace: Callable[[bytes], Any]) -> Any:
    """Decode valid UTF-8, and replace each part that is nested deeper than `levels`."""
    pieces = _cut(text, levels)
    deep = map(replace, pieces[1::2])
    # Derived from the text's digest, so no text can contain it. `float_hook` gets it as written.
    digits = str(int(hashlib.sha256(text).hexdigest(), 16))
    mark = f"0.{digits[:15]}e{digits[15:30]}"

    def read(number: str) -> Any:
        return next(deep) if number == mark else _read_number(number)

    decoder = msgspec.json.Decoder(float_hook=read)
    return decoder.decode(_round_long_integers(mark.encode().join(pieces[::2])))


def _cut(text: bytes, levels: int) -> list[bytes]:
    """Cut a text where it becomes deeper than `levels`, and where that ends. Every second piece is
    too deep, and has no spaces."""
    structure, strings = _take_strings(text)
    flags = b"".join(
        bytes(map(levels.__lt__, depths)) for depths in _compute_depths(structure.translate(_STEPS))
    )
    pieces, start = [], 0
    for run in _RUN.finditer(flags):
        begin, end = run.start(), run.end() + 1  # includes the closing bracket
        pieces.append(structure[start:begin])
        pieces.append(structure[begin:end].translate(None, _SPACE))
        start = end
    pieces.append(structure[start:])
    return _put_strings(_END.join(pieces), strings).split(_END)


_RUN: Final = re.compile(rb"\x01+")


def _is_deeper(text: bytes, levels: int) -> bool:
    steps = text.translate(_STEPS, _NOT_BRACKETS)
    return any(max(depths) > levels for depths in _compute_depths(steps))


def _compute_depths(steps: bytes) -> Iterator[list[int]]:
    """Yield the depths after each step, slice by slice."""
    depth = 0
    for start in range(0, len(steps), _SLICE):
        taken = memoryview(steps)[start : start + _SLICE].cast("b")
        depths = list(accumulate(taken, initial=depth))
        depth = depths[-1]
        yield depths[1:]


def _take_strings(text: bytes) -> tuple[bytes, list[bytes]]:
    """Take the strings out of a text, to find its brackets and numbers fast. One quote remains of
    each. Escaped backslashes and quotes are replaced in the strings."""
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
    """Round integers beyond 2**53 as JavaScript does."""
    if _LONG_NUMBER not in text.translate(_DIGITS):
        return text
    structure, strings = _take_strings(text)
    if _LONG_NUMBER not in structure.translate(_DIGITS):  # usually, the digits are in an id
        return text
    return _put_strings(_LONG_INTEGER.sub(_round, structure), strings)


def _round(integer: re.Match[bytes]) -> bytes:
    number = _read_number(integer[0])
    return b"null" if number is None else repr(number).encode()


def _repair(text: bytes) -> bytes:
    """Replace invalid UTF-8 and unpaired surrogates with U+FFFD."""
    valid = text.decode(errors="replace").encode()
    if b"\\u" not in valid:
        return valid
    hidden = valid.replace(rb"\\", _BACKSLASH)
    return _UNPAIRED_SURROGATE.sub(rb"\\ufffd", hidden).replace(_BACKSLASH, rb"\\")


def _encode_unsorted(value: Any) -> bytes:
    try:
        return _unsorted_encoder.encode(value)
    except RecursionError:
        return _unsorted_encoder.encode(_flatten(value))


def _decode_text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _flatten(value: Any) -> Any:
    """Copy a value that is too deep for recursion, and replace parts below `DEEPEST` levels with
    their JSON. Values from `decode` are never that deep."""
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
    """Encode a value of any depth, without sorting its keys."""
    parts: list[Any] = [value]  # still to write, in reverse order
    written: list[bytes] = []
    while parts:
        part = parts.pop()
        if isinstance(part, bytes):
            written.append(part)
        elif isinstance(part, dict | list):
            parts += reversed(list(_split(part)))
        else:
            written.append(_unsorted_encoder.encode(part))
    return b"".join(written)


def _split(container: Any) -> Iterator[Any]:
    yield b"{" if isinstance(container, dict) else b"["
    for number, (place, item) in enumerate(_items(container)):
        if number:
            yield b","
        if isinstance(container, dict):
            yield _unsorted_encoder.encode(place) + b":"
        yield item
    yield b"}" if isinstance(container, dict) else b"]"


def _items(container: Any) -> Any:
    return list(container.items()) if isinstance(container, dict) else enumerate(container)
