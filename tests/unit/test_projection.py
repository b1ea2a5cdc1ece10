"""Text for databases that can't hold NUL."""

from __future__ import annotations

from typing import Any

import pytest

from logto_webhooks import canonical_json
from logto_webhooks.records.projection import without_nul


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a\0": ["\0b\0\0", None, 1]}, {"a": ["b", None, 1]}),
        ({"kept": "\\u0000"}, {"kept": "\\u0000"}),  # a backslash and letters, no NUL
        ({"both": "\\\0\\u0000\0"}, {"both": "\\\\u0000"}),
    ],
)
def test_nul_goes_and_nothing_else(value: Any, expected: Any) -> None:
    """In keys and values, beside backslashes too."""
    assert without_nul(value) == expected


def test_it_goes_however_deep() -> None:
    """Whoever writes customData can nest it deeper than Python's functions go."""
    deep: Any = "\0x"
    for _ in range(800):
        deep = [deep]
    assert b"x" in canonical_json.encode(without_nul(deep))
    assert b"u0000" not in canonical_json.encode(without_nul(deep))
