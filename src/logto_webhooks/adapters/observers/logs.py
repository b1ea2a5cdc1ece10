"""Reports as log records: readable lines, or one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from logto_webhooks.core.reports import (
    Asked,
    ClockSetBack,
    Compared,
    Failed,
    FlowResumed,
    FlowStopped,
    HandlerBlocks,
    HandlerFailed,
    HandlerHeld,
    HandlerRan,
    HandlersKnown,
    LookedBack,
    NotAsked,
    NotStored,
    Refused,
    Report,
    Rescued,
    Resumed,
    SetAside,
    Stalled,
    Stored,
    Synced,
    Unrunnable,
)

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
logger = logging.getLogger("logto_webhooks")
_FIND_OUT = "find out why with logto-webhooks doctor"


def observe(report: Report) -> None:
    """Log a report: one line for each delivery, once its fate is known."""
    if isinstance(report, Stored) and not (report.duplicate or logger.isEnabledFor(logging.DEBUG)):
        return  # the common case costs nothing
    level, message, fields = _line(report)
    if logger.isEnabledFor(level):
        # In the message, too: the formatter of an application leaves out what is extra.
        template = " ".join([message, *(f"{key}=%s" for key in fields)])
        values = [_plain(value) for value in fields.values()]
        logger.log(level, template, *values, extra={"logto": fields, "logto_message": message})


def _line(report: Report) -> tuple[int, str, dict[str, Any]]:
    told = msgspec.structs.asdict(report)
    fields = {key: _rounded(value) for key, value in told.items() if value}
    match report:
        case Stored(duplicate=True):
            return logging.INFO, "delivery", _delivery(fields, "duplicate")
        case Stored():
            return logging.DEBUG, "stored", _delivery(fields, "stored")
        case Synced():
            return logging.INFO, "delivery", _delivery(fields, report.outcome)
        case Failed(retry_in_s=None):
            return logging.ERROR, "delivery", _delivery(fields, "dead")
        case Failed():
            return logging.WARNING, "delivery", _delivery(fields, "failed")
        case Refused():
            return logging.WARNING, "refused", fields
        case SetAside():
            return logging.WARNING, "set aside what no key signed", fields
        case Rescued():
            return logging.INFO, "a new key proved what was set aside", fields
        case NotStored():
            return logging.ERROR, "not stored, answered 503", fields
        case Stalled():
            return logging.ERROR, "the worker waits for the database", fields
        case Resumed():
            return logging.INFO, "the worker goes on", fields
        case ClockSetBack():
            return logging.WARNING, "the database's clock was set back", fields
        case LookedBack():
            level = logging.WARNING if report.recovered or report.doubts else logging.INFO
            return level, "compared the inbox with Logto's log", fields
        case Compared():
            level = logging.WARNING if report.drifted or report.doubts else logging.INFO
            mended = ", and mended what differed" if report.drifted else ""
            return level, f"compared all records with Logto{mended}", fields
        case Asked():
            return logging.INFO, "asked Logto", fields
        case HandlersKnown():
            return logging.INFO, "jobs are made for these handlers", fields
        case HandlerRan():
            return logging.INFO, "handled", fields
        case HandlerFailed(state="waiting", error="RetryLater"):
            return logging.INFO, "a handler asked to be retried", fields
        case HandlerFailed(state="waiting"):
            return logging.WARNING, "a handler failed", _job(fields)
        case HandlerFailed(state="discarded"):
            return logging.INFO, "a handler discarded its job", fields
        case HandlerFailed():
            return logging.ERROR, "a job is dead", _job(fields)
        case HandlerBlocks():
            blocks = "a handler blocks its event loop: make it a plain function, or await"
            return logging.ERROR, blocks, fields
        case HandlerHeld():
            held = "a handler isn't called any more: its threads never end; mend it, and restart"
            return logging.ERROR, held, fields
        case Unrunnable():
            told = fields | {"hint": _whose_code(report.handlers)}
            return logging.WARNING, "jobs wait for handlers whose code isn't here: --app", told
        case FlowStopped(why="rejected"):
            return logging.ERROR, f"all that comes is rejected: {_FIND_OUT} --only key", fields
        case FlowStopped():
            return logging.ERROR, f"no delivery comes any more: {_FIND_OUT}", fields
        case FlowResumed():
            return logging.INFO, "deliveries come again", fields
        case NotAsked():
            return logging.ERROR, "Logto can't be asked", fields


def _delivery(fields: dict[str, Any], outcome: str) -> dict[str, Any]:
    first = {name: fields.get(name) for name in ("id", "event", "subject")}
    rest = {k: v for k, v in fields.items() if k not in (*first, "outcome", "duplicate", "took_ms")}
    return first | {"outcome": outcome, "took_ms": fields.get("took_ms", 0)} | rest


def _job(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"see": f"jobs show {fields['job']}"}


def _whose_code(handlers: Sequence[str]) -> str:
    modules = {name.partition(":")[0] for name in handlers if ":" in name}
    module = modules.pop() if len(modules) == 1 else "MODULE"
    return f"--app {module}:NAME, of the LogtoWebhooks object that they are registered on"


class TextFormatter(logging.Formatter):
    """`time LEVEL message key=value …`"""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        fields = getattr(record, "logto", {})
        pairs = [f"{key}={_plain(value)}" for key, value in fields.items()]
        text = " ".join([_time(record), f"{record.levelname:7}", _message(record), *pairs])
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        fields = {"time": _time(record), "level": record.levelname.lower()}
        fields |= {"message": _message(record)} | getattr(record, "logto", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def configure(form: LogFormat, level: LogLevel) -> None:
    """Send the product's log (and the server's warnings) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(level.upper())
    logging.getLogger("asyncio").addFilter(SeldomFilter())


class SeldomFilter(logging.Filter):
    """Lets what is said again and again through once a minute: a loop that gets no descriptor for
    a connection says so thousands of times a second."""

    _SECONDS = 60.0

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[str, float] = ("", 0.0)

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the message is another, or wasn't there lately."""
        text = record.getMessage()[:80]
        said, at = self._last
        if text == said and record.created - at < self._SECONDS:
            return False
        self._last = (text, record.created)
        return True


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    """What was said, without the fields that stand behind it."""
    message: str = getattr(record, "logto_message", "")
    return message or record.getMessage()


def _rounded(value: object) -> object:
    return round(value, 2) if isinstance(value, float) else value


def _plain(value: object) -> str:
    """Quote what isn't one plain word, so that no text of a delivery can forge a field or line."""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
