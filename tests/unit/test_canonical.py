"""One JSON: what the log says of a delivery is the delivery."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from logto_webhooks.core import canonical
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name
from tests.support.copy import delivery
from tests.support.recorded import FOLDER


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
    assert canonical.digest(canonical.decode(one)) == canonical.digest(canonical.decode(other))


@pytest.mark.parametrize(
    ("one", "other"), [(b"1", b'"1"'), (b"null", b"0"), (b"[1,2]", b"[2,1]"), (b"1", b"true")]
)
def test_different_values_differ(one: bytes, other: bytes) -> None:
    """Types and the order of lists count."""
    assert canonical.digest(canonical.decode(one)) != canonical.digest(canonical.decode(other))


@pytest.mark.parametrize(
    "text", [b"", b"NaN", b"1e400", b'"\\ud800"', b'"\xff"', b"[" * 10_000, b"1" * 5_000 + b"x"]
)
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    """Whatever is wrong with it."""
    with pytest.raises(ValueError, match=r"(?i)json|truncated|range|utf-8|nesting"):
        canonical.decode(text)
