"""The log: one line each, which no text of a delivery can forge."""

from __future__ import annotations

import logging

import msgspec
import pytest

from logto_webhooks.adapters.observers.logs import (
    JsonFormatter,
    SeldomFilter,
    TextFormatter,
    observe,
)
from logto_webhooks.core.reports import HandlerFailed, Synced, Unrunnable


@pytest.mark.parametrize(
    "event",
    [
        'x" outcome="applied',
        "a\nb",
        "a\rb",
        "a\x1b[31mb",
        "a\u2028b",
        "a\x85b",
        "a\u202eb",
        "a=b",
    ],
)
def test_no_event_forges_a_field_or_a_line(event: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its name holds is quoted."""
    with caplog.at_level("INFO", logger="logto_webhooks"):
        observe(Synced(7, event, None, "unknown", 3))
    [record] = caplog.records
    line = TextFormatter().format(record)
    assert line.isprintable()
    assert line.count(" outcome=") - (" outcome=" in event) == 1
    assert line.endswith(" subject=None outcome=unknown took_ms=3")
    assert msgspec.json.decode(JsonFormatter().format(record))["event"] == event


def test_what_is_told_stands_in_the_message(caplog: pytest.LogCaptureFixture) -> None:
    """So that any formatter writes it; ours write it once, and rounded."""
    failed = HandlerFailed(
        7, "app:greet", "E", "user:a", 1, "ValueError", "waiting", 0.81234, "app.py:9 greet"
    )
    with caplog.at_level("INFO", logger="logto_webhooks"):
        observe(failed)
    [record] = caplog.records
    said = logging.Formatter("%(message)s").format(record)
    assert said == (
        "a handler failed job=7 handler=app:greet event=E subject=user:a attempt=1 "
        'error=ValueError state=waiting retry_in_s=0.81 where="app.py:9 greet" see="jobs show 7"'
    )
    assert TextFormatter().format(record).endswith(said)
    line = msgspec.json.decode(JsonFormatter().format(record))
    assert (line["message"], line["where"]) == ("a handler failed", "app.py:9 greet")


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (("app.jobs:greet", "app.jobs:bill"), "app.jobs"),
        (("app:greet", "b:x"), "MODULE"),
        (("x",), "MODULE"),
    ],
)
def test_who_waits_for_its_code_is_told_with_where(
    names: tuple[str, ...], module: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As far as a name tells it; and that an object must be named, not the handler."""
    with caplog.at_level("INFO", logger="logto_webhooks"):
        observe(Unrunnable(names, 3))
    [record] = caplog.records
    assert ", ".join(names) in record.message
    assert f"--app {module}:NAME, of the LogtoWebhooks object" in record.message


def test_a_handler_that_asks_for_it_did_not_fail(caplog: pytest.LogCaptureFixture) -> None:
    """It is told as news, not as a warning."""
    with caplog.at_level("INFO", logger="logto_webhooks"):
        observe(HandlerFailed(7, "x", "E", "user:a", 1, "RetryLater", "waiting", 60))
    [record] = caplog.records
    assert (record.levelname, record.message[:29]) == ("INFO", "a handler asked to be retried")


def test_a_traceback_is_logged_in_json(caplog: pytest.LogCaptureFixture) -> None:
    """As one field of one line."""
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError:
        logging.getLogger("logto_webhooks").exception("failed")
    line = JsonFormatter().format(caplog.records[-1])
    assert "ZeroDivisionError" in msgspec.json.decode(line)["traceback"]
    assert "\n" not in line


def test_what_is_said_again_and_again_is_said_once() -> None:
    """Until a minute has passed, or something else is said."""
    seldom = SeldomFilter()

    def said(text: str, at: float) -> bool:
        record = logging.makeLogRecord({"msg": text, "created": at})
        return seldom.filter(record)

    told = [said("a", 0), said("a", 1), said("b", 2), said("b", 61), said("b", 63)]
    assert told == [True, False, True, False, True]
