"""The log: one line each, which no text of a delivery can forge."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import threading

import msgspec
import pytest

from logto_webhooks.instrumentation import DeliverySynced, HandlerFailed, RequestRefused, Unrunnable
from logto_webhooks.instrumentation.logs import (
    LINES,
    QUEUED,
    JsonFormatter,
    QueuedHandler,
    Sums,
    SumsFilter,
    TextFormatter,
    observe,
)
from tests.support.waiting import until


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
        observe(DeliverySynced(7, event, None, "unknown", 3))
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
    assert f"use --app {module}:NAME, the LogtoWebhooks object" in record.message


def test_a_handler_that_asks_for_it_did_not_fail(caplog: pytest.LogCaptureFixture) -> None:
    """It is told as news, not as a warning."""
    with caplog.at_level("INFO", logger="logto_webhooks"):
        observe(HandlerFailed(7, "x", "E", "user:a", 1, "RetryLater", "waiting", 60))
    [record] = caplog.records
    assert (record.levelname, record.message[:27]) == ("INFO", "a handler asked for a retry")


def test_a_traceback_is_logged_in_json(caplog: pytest.LogCaptureFixture) -> None:
    """As one field of one line."""
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError:
        logging.getLogger("logto_webhooks").exception("failed")
    line = JsonFormatter().format(caplog.records[-1])
    assert "ZeroDivisionError" in msgspec.json.decode(line)["traceback"]
    assert "\n" not in line


def test_junk_is_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind by itself; what deliveries become is always told, but for duplicates."""
    now = [0.0]
    sums = Sums(10, lambda: now[0])
    log = logging.getLogger("logto_webhooks")

    def told(level: int, kind: str, times: int) -> int:
        return sum(sums.let_through(log, level, kind) for _ in range(times))

    with caplog.at_level("INFO", logger="logto_webhooks"):
        assert told(logging.WARNING, "refused too_slow", 5_000) == LINES
        assert told(logging.WARNING, "refused not_found", 2) == 2
        assert told(logging.INFO, "delivery applied", 5_000) == 5_000
        assert told(logging.INFO, "delivery duplicate", 5_000) == LINES
        assert not caplog.records
        now[0] = 10.0
        assert told(logging.WARNING, "refused too_slow", 1) == 1
    assert [record.message for record in caplog.records] == [
        f"refused too_slow: {5_000 - LINES} more like this in the last 10 s",
        f"delivery duplicate: {5_000 - LINES} more like this in the last 10 s",
    ]


def test_what_was_left_out_is_told_without_another(caplog: pytest.LogCaptureFixture) -> None:
    """When the time is over, though nothing else happens."""
    sums = Sums(0.1)
    for _ in range(LINES + 7):
        sums.let_through(logging.getLogger("logto_webhooks"), logging.WARNING, "refused")
    until(lambda: "refused: 7 more like this" in caplog.text, lambda: caplog.text)


def test_what_others_log_is_summed_up_too() -> None:
    """By its template: a server says the same of each request."""
    seldom = SumsFilter(Sums(10, lambda: 0.0))

    def said(text: str, *arguments: object) -> bool:
        record = logging.LogRecord("uvicorn.error", 30, "", 0, text, arguments, None)
        return seldom.filter(record)

    assert sum(said("invalid: %s", number) for number in range(1_000)) == LINES
    assert said("another")


def test_a_long_value_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever sends it chooses its length."""
    observe(RequestRefused(404, "not_found", "x" * 60_000, "a hint"))
    [record] = caplog.records
    assert len(record.message) < 1_000
    assert "(60000 characters)" in record.message
    assert len(JsonFormatter().format(record)) < 1_000


def test_nobody_waits_for_a_log_that_is_not_read() -> None:
    """Lines are dropped, and that is told once somebody reads again."""
    reading, writing = os.pipe()
    handler = QueuedHandler(writing)
    handler.setFormatter(TextFormatter())
    log = logging.Logger("x")
    log.addHandler(handler)
    count = QUEUED + 5_000
    for number in range(count):
        log.warning("line %s %s", number, "x" * 50)
    text = b""
    while b" log lines, because" not in text:
        text += os.read(reading, 2**20)
    dropped = int(re.findall(rb"dropped (\d+) log lines", text)[0])
    written = len(re.findall(rb"line \d+", text))
    assert dropped > 0
    assert written + dropped <= count
    os.close(reading)
    log.warning("nobody is there")  # which harms nothing
    handler.close()
    os.close(writing)


def test_who_logs_needs_no_free_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is written once a thread can be started again."""
    reading, writing = os.pipe()
    handler = QueuedHandler(writing)
    handler.setFormatter(TextFormatter())
    log = logging.Logger("x")
    log.addHandler(handler)
    log.addFilter(SumsFilter(Sums()))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", refuse)
        for number in range(LINES + 5):
            log.warning("line %s", number)
    log.error("the last")
    handler.close()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    assert len(re.findall(rb"line \d+", text)) == LINES
    assert b"the last" in text


AT_THE_END = """
import logging
from logto_webhooks.instrumentation import logs

logs.configure("text", "info")


class Last:
    def __del__(self):
        for number in range(40):
            logging.getLogger("logto_webhooks").warning("late %s", number)


last = Last()  # gone once no thread runs any more
logging.getLogger("logto_webhooks").warning("early")
"""


@pytest.mark.parametrize("read", [True, False])
def test_a_line_at_the_very_end_does_not_keep_the_process(read: bool) -> None:
    """It is written if there is room for it, and waited for by nobody."""
    reading, writing = os.pipe()
    if not read:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 512)
        os.set_blocking(writing, True)
    ended = subprocess.run(
        [sys.executable, "-c", AT_THE_END], stderr=writing, timeout=30, check=False
    )
    os.close(writing)
    assert ended.returncode == 0
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    assert (b"early" in text, b"late 0" in text) == (read, read)
