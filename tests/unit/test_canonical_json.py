"""One JSON: what the log says of a delivery is the delivery."""

from __future__ import annotations

import gc
import json
import sys
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logto_webhooks import canonical_json
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name
from tests.support.recorded import FOLDER
from tests.support.stores import delivery


@pytest.mark.parametrize("name", history.NAMES)
def test_an_entry_of_the_log_has_the_digest_of_its_delivery(name: Name) -> None:
    """Logto's log has other bytes: another order of keys, other spaces. Test payloads it lacks."""
    sent = history.load(name).deliveries
    lines = (FOLDER / "logs" / f"{name}.jsonl").read_bytes().splitlines()
    logged = {
        delivery(msgspec.json.encode(_body(msgspec.json.decode(line)))).digest for line in lines
    }
    real = [each.body for each in sent if b"/fake-path/" not in each.body]
    real = [body for body in real if b"fake-user-agent" not in body]
    assert logged == {delivery(body).digest for body in real}
    assert len(logged) == len(lines)


def _body(entry: dict[str, Any]) -> Any:
    return entry["payload"]["hookRequest"]["body"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a":1,"b":2}', b'{ "b": 2, "a": 1 }'),
        (b"1", b"1.0"),
        (b"1000", b"1e3"),
        (b"1e+21", b"1000000000000000000000"),
        (b"1e-7", b"0.0000001"),
        (b"0", b"-0"),
        (b"9007199254740992", b"9007199254740993"),
        (b"1.7976931348623157e+308", b"17976931348623157" + b"0" * 292),
        ('"ü"'.encode(), b'"\\u00fc"'),
    ],
)
def test_one_value_spelt_twice_is_one(one: bytes, other: bytes) -> None:
    """As JavaScript reads numbers, and JSON strings."""
    assert canonical_json.digest(canonical_json.decode(one)) == canonical_json.digest(
        canonical_json.decode(other)
    )


@pytest.mark.parametrize(
    ("one", "other"), [(b"1", b'"1"'), (b"null", b"0"), (b"[1,2]", b"[2,1]"), (b"1", b"true")]
)
def test_different_values_differ(one: bytes, other: bytes) -> None:
    """Types and the order of lists count."""
    assert canonical_json.digest(canonical_json.decode(one)) != canonical_json.digest(
        canonical_json.decode(other)
    )


@pytest.mark.parametrize(
    "text", [b"", b"NaN", b"[" * 10_000, b'{"a":' * 2_000 + b"1", b"1" * 5_000 + b"x"]
)
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    """Whatever is wrong with it."""
    with pytest.raises(ValueError, match=r"(?i)json|truncated|range|utf-8|nesting"):
        canonical_json.decode(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"a\\ud800"', "a\ufffd"),
        (b'"\\udc00b"', "\ufffdb"),
        (b'"\\ud83d\\ude00\\ude00"', "\U0001f600\ufffd"),
        (b'"\\\\ud800\\ud800"', "\\ud800\ufffd"),
        (b'{"\\ud800":1}', {"\ufffd": 1}),
        (b'"\xff"', "\ufffd"),
        (b"[1e400,-1e400]", [None, None]),
        (b"1" * 400, None),
    ],
)
def test_what_only_javascript_reads_is_read(text: bytes, value: Any) -> None:
    """Half a surrogate pair is U+FFFD, as in every UTF-8; a number out of range is null."""
    assert canonical_json.decode(text) == value
    assert canonical_json.decode(canonical_json.encode(value)) == value


def nested(levels: int, kind: int = 0) -> bytes:
    """A value of so many levels: of objects, of lists, or of both."""
    opened, closed = [(b'{"a":', b"}"), (b"[", b"]"), (b'[{"b":"]","a":', b"}]")][kind]
    return opened * levels + b"1" + closed * levels


def depth_of(value: Any) -> int:
    """How deep a value of one branch is."""
    levels = 0
    while isinstance(value, dict | list):
        levels, value = levels + 1, value["a"] if isinstance(value, dict) else value[0]
    return levels


@given(levels=st.integers(1, 3_000), kind=st.integers(0, 2), wrapped=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_value_of_any_depth_comes_back(levels: int, kind: int, wrapped: int) -> None:
    """Its JSON is the same, and what is shown of it doesn't depend on where it stood."""
    text = nested(levels, kind)
    value = canonical_json.decode(text)
    assert canonical_json.decode(canonical_json.encode(value)) == value
    assert canonical_json.encode(value) == (text if kind != 2 else canonical_json.encode(value))
    inside = canonical_json.decode(b"[" * wrapped + text + b"]" * wrapped)
    for _ in range(wrapped):
        [inside] = inside
    shown = canonical_json.shown(inside)
    assert shown == canonical_json.shown(value)
    assert depth_of(shown) == min(canonical_json.SHOWN, levels * (2 if kind == 2 else 1))
    assert json.loads(json.dumps(shown)) == shown


def test_what_is_below_is_kept_as_its_json() -> None:
    """Without spaces, in its own order of keys; brackets in strings don't count."""
    deep = b'{"b": "}]\\"[{", "a": [1, null]}'
    text = b"[" * 200 + deep + b"]" * 200
    shown = canonical_json.shown(canonical_json.decode(text))
    for _ in range(canonical_json.SHOWN):
        [shown] = shown
    below = 200 - canonical_json.SHOWN
    assert shown == "[" * below + '{"b":"}]\\"[{","a":[1,null]}' + "]" * below


def test_brackets_in_strings_hide_no_depth() -> None:
    """A text of closing brackets before the opening ones."""
    text = b'[{"x":"' + b"]" * 2_000 + b'"},' + nested(1_500) + b"]"
    value = canonical_json.decode(text)
    assert canonical_json.encode(value) == text
    assert depth_of(canonical_json.shown(value)[1]) == canonical_json.SHOWN - 1


def test_a_value_nested_by_hand_is_encoded() -> None:
    """Deeper than functions may call each other."""
    value: Any = 1
    for _ in range(5_000):
        value = {"a": value}
    assert canonical_json.encode(value) == b'{"a":' * 5_000 + b"1" + b"}" * 5_000


MANY_SMALL = [
    pytest.param(b"[" + b",".join([b"[]"] * 50_000) + b"]", id="shallow"),
    pytest.param(b"[" * 63 + b",".join([b"{}"] * 50_000) + b"]" * 63, id="as deep as is shown"),
    pytest.param(b"[" + b",".join([b'[{"":[]}]'] * 20_000) + b"]", id="with strings"),
    pytest.param(b"[9007199254740993," + b",".join([b"[]"] * 50_000) + b"]", id="a long number"),
    pytest.param(b'["' + b"[" * 50_000 + b'"]', id="brackets in a string"),
    pytest.param(b'["' + b"\\\\" * 50_000 + b'\\ud800"]', id="escapes"),
    pytest.param(b"[" * 200 + b'"' + b"\\" * 50_000 + b'"' + b"]" * 200, id="escapes, deep"),
    pytest.param(b"[" * 200 + b" 1," * 50_000 + b"1" + b"]" * 200, id="spaces, deep"),
]


@pytest.mark.parametrize("text", MANY_SMALL)
def test_python_walks_no_large_value(text: bytes) -> None:
    """Somebody's data, with many small parts, would keep all others waiting."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls  # not those of others, such as what looks on while garbage is collected
        calls += frame.f_code.co_filename == canonical_json.__file__

    sys.setprofile(count)
    try:
        value = canonical_json.decode(text)
        canonical_json.digest(value)
        canonical_json.shown(value)
    finally:
        sys.setprofile(None)
    assert calls < 1_000


def test_many_deep_parts_are_cut_each() -> None:
    """At both depths, and in lists and objects alike."""
    parts = [b'{"b":["]"],"a":1}', b"[[],{}]", b'[{"":{"[":[]}}]'] * 100
    text = b"[" * 200 + b",".join(parts) + b"]" * 200
    value = canonical_json.decode(text)
    assert canonical_json.encode(value) == text
    wide = b"[" * canonical_json.SHOWN + b",".join(parts) + b"]" * canonical_json.SHOWN
    shown = canonical_json.shown(canonical_json.decode(wide))
    for _ in range(canonical_json.SHOWN - 1):
        [shown] = shown
    in_order = [part.decode() for part in parts]
    assert shown == [json.dumps(json.loads(part), separators=(",", ":")) for part in in_order]


def test_the_collector_of_garbage_goes_on() -> None:
    """It pauses while a large value is decoded, unless the application stopped it for good."""
    text = b"[" + b",".join([b"[]"] * canonical_json.MANY) + b"]"
    canonical_json.decode(text)
    with pytest.raises(ValueError, match="truncated"):
        canonical_json.decode(text[:-1])
    assert gc.isenabled()
    gc.disable()
    try:
        canonical_json.decode(text)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ("1", "true", False),
        ("0", "false", False),
        ("false", "null", False),
        ('{"a": [{"b": 1}]}', '{"a": [{"b": true}]}', False),
        ("[0]", "[false]", False),
        ("[1]", "[1, 1]", False),
        ('{"a": null}', "{}", False),
        ('{"a": 1, "b": [2.5]}', '{"b": [2.5], "a": 1.0}', True),
        ("[" * 2000 + "]" * 2000, "[" * 2000 + "]" * 2000, True),
    ],
)
def test_true_is_not_1(one: str, other: str, is_equal: bool) -> None:
    """Python's `==` says that it is."""
    first, second = canonical_json.decode(one), canonical_json.decode(other)
    assert canonical_json.is_equal(first, second) is is_equal
    assert canonical_json.is_equal(second, first) is is_equal


@pytest.mark.parametrize(
    ("text", "number", "is_equal"),
    [
        ("1e300", 10**300, True),
        ("-1e21", -(10**21), True),
        ("1e300", 10**300 + 10**200, True),
        ("1e300", 10**299, False),
        ("0.5", 0, False),
        ("1e21", True, False),
    ],
)
def test_a_float_that_a_database_returns_as_an_integer(
    text: str, number: int, is_equal: bool
) -> None:
    """PostgreSQL keeps numbers with all digits."""
    assert canonical_json.is_equal([canonical_json.decode(text)], [number]) is is_equal
    assert canonical_json.is_equal([number], [canonical_json.decode(text)]) is is_equal
