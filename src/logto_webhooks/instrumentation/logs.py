"""Write telemetry events as log lines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from logto_webhooks.instrumentation import (
    ApiUnavailable,
    DeliveryFailed,
    DeliveryStored,
    DeliverySynced,
    FlowStopped,
    HandlerFailed,
    LogRecovered,
    Observer,
    Reconciled,
    TelemetryEvent,
    Unrunnable,
)

_FIND_OUT: Final = "find out why with logto-webhooks doctor"
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
logger = logging.getLogger("logto_webhooks")
LINES: Final = 20  # of one kind are written per PERIOD_S; the rest is counted
PERIOD_S: Final = 10.0
LONGEST: Final = 500  # characters of a value
QUEUED: Final = 10_000  # lines that wait to be written
LAST_WAIT_S: Final = 1.0
PIPE_BYTES: Final = 4_096  # a writable pipe has room for these


def observe(report: TelemetryEvent) -> None:
    """Log a telemetry event: one line for each delivery, when its outcome is known."""
    if isinstance(report, DeliveryStored) and not (
        report.duplicate or logger.isEnabledFor(logging.DEBUG)
    ):
        return  # the usual case, fast
    level, message = _describe(report)
    fields = _make_fields(report, level)
    if logger.isEnabledFor(level) and _sums.let_through(logger, level, _name_kind(message, fields)):
        # Also in the message, because an application's formatter ignores `extra`.
        template = " ".join([message, *(f"{key}=%s" for key in fields)])
        values = [_quote(value) for value in fields.values()]
        logger.log(level, template, *values, extra={"logto": fields, "logto_message": message})


def _name_kind(message: str, fields: dict[str, Any]) -> str:
    """Return what the lines that are counted together have in common."""
    names = ("code", "outcome", "handler", "mapping")
    detail = next((fields[name] for name in names if fields.get(name)), "")
    return f"{message} {detail}".rstrip()


def _describe(report: TelemetryEvent) -> tuple[int, str]:
    """Return the level and the message. For some events, they depend on the fields."""
    level, message = report.level, report.message
    match report:
        case DeliveryStored(duplicate=True):
            return logging.INFO, "delivery"
        case DeliveryFailed(retry_in_s=None):
            return logging.ERROR, message
        case ApiUnavailable(subject=str()):
            return level, "one record couldn't be read from Logto; others are"
        case LogRecovered() if report.recovered or report.doubts:
            return logging.WARNING, message
        case Reconciled() if report.drifted:
            return logging.WARNING, f"{message}, and corrected differences"
        case Reconciled() if report.doubts:
            return logging.WARNING, message
        case FlowStopped(why="rejected"):
            return level, f"all requests are rejected: {_FIND_OUT} --only key"
        case HandlerFailed(state="waiting", error="RetryLater"):
            return logging.INFO, "a handler asked for a retry"
        case HandlerFailed(state="waiting", error="RowWaits"):
            return logging.INFO, "a job waits for the application's own row"
        case HandlerFailed(state="discarded"):
            return logging.INFO, "a handler discarded its job"
        case HandlerFailed(state="dead"):
            return logging.ERROR, "a job is dead"
    return level, message


def _make_fields(report: TelemetryEvent, level: int) -> dict[str, Any]:
    values = msgspec.structs.asdict(report)
    fields = {name: _shorten(value) for name, value in values.items() if value}
    match report:
        case DeliveryStored():
            return _order_fields(fields, "duplicate" if report.duplicate else "stored")
        case DeliverySynced():
            return _order_fields(fields, report.outcome)
        case DeliveryFailed():
            return _order_fields(fields, "dead" if report.retry_in_s is None else "failed")
        case HandlerFailed() if level >= logging.WARNING:
            return fields | {"see": f"jobs show {report.job}"}
        case Unrunnable():
            return fields | {"hint": _suggest_app(report.handlers)}
    return fields


def _order_fields(fields: dict[str, Any], outcome: str) -> dict[str, Any]:
    first = {name: fields.get(name) for name in ("id", "event", "subject")}
    rest = {k: v for k, v in fields.items() if k not in (*first, "outcome", "duplicate", "took_ms")}
    return first | {"outcome": outcome, "took_ms": fields.get("took_ms", 0)} | rest


def _suggest_app(handlers: Sequence[str]) -> str:
    modules = {name.partition(":")[0] for name in handlers if ":" in name}
    module = modules.pop() if len(modules) == 1 else "MODULE"
    return f"use --app {module}:NAME, the LogtoWebhooks object on which you register them"


class TextFormatter(logging.Formatter):
    """`time LEVEL message key=value …`"""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        fields = getattr(record, "logto", {})
        pairs = [f"{key}={_quote(value)}" for key, value in fields.items()]
        text = " ".join(
            [_format_time(record), f"{record.levelname:7}", _read_message(record), *pairs]
        )
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        fields = {"time": _format_time(record), "level": record.levelname.lower()}
        fields |= {"message": _read_message(record)} | getattr(record, "logto", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


class Sums:
    """Limits each kind of warning to `LINES` lines per `PERIOD_S`, counts the rest, and logs the
    count after that time. Anyone can cause thousands of such lines."""

    def __init__(
        self, period_s: float = PERIOD_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._period_s = period_s
        self._now = now
        self._lock = threading.Lock()
        self._until = 0.0
        self._counts: dict[tuple[str, int, str], int] = {}

    def let_through(self, target: logging.Logger, level: int, kind: str) -> bool:
        """Count a line; return whether to write it. Lines below warnings are always written, except
        those about duplicates: anyone who has a delivery can send it again."""
        if level < logging.WARNING and not kind.endswith("duplicate"):
            return True
        key = (target.name, level, kind)
        with self._lock:
            is_over = self._now() >= self._until
        if is_over:
            self.sum_up()
        with self._lock:
            if not self._counts:
                self._until = self._now() + self._period_s
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if count == LINES + 1 and not sys.is_finalizing():
                timer = threading.Timer(max(0, self._until - self._now()), self.sum_up)
                timer.daemon = True
                with contextlib.suppress(RuntimeError):  # no thread is free: a later line sums up
                    timer.start()
        return count <= LINES

    def sum_up(self) -> None:
        """Log how many lines were left out, and reset the counts."""
        with self._lock:
            counts, self._counts = self._counts, {}
            self._until = 0.0
        for (name, level, kind), count in counts.items():
            if count > LINES:
                self._log_sum(logging.getLogger(name), level, kind, count - LINES)

    def _log_sum(self, target: logging.Logger, level: int, kind: str, count: int) -> None:
        template = "%s: %s more like this in the last %g s"
        target.log(level, template, kind, count, self._period_s, extra={"logto_sum": True})


_sums = Sums()
sum_up = _sums.sum_up


class SumsFilter(logging.Filter):
    """Applies the limit to other lines, such as the server's about invalid requests."""

    def __init__(self, sums: Sums = _sums) -> None:
        super().__init__()
        self._sums = sums

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a line."""
        if hasattr(record, "logto") or hasattr(record, "logto_sum"):
            return True  # already counted
        kind = str(record.msg)[:80]
        return self._sums.let_through(logging.getLogger(record.name), record.levelno, kind)


class QueuedHandler(logging.Handler):
    """Writes lines in a separate thread, so that nothing waits for a slow reader of the log. If too
    many lines wait, new ones are dropped, and their number is logged when there is room again."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes] = queue.Queue(QUEUED)
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Put a line into the queue."""
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        if sys.is_finalizing():
            self._write_at_exit(line)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1
        # After a fork, the thread doesn't run in the new process.
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread is free: the next line tries again
                self._thread.start()

    def _write_at_exit(self, line: bytes) -> None:
        """Write without a thread: none runs any more, and starting one would never return. Drop the
        line if the pipe is full, because the process must end."""
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [self._descriptor], [], 0)[1]:
                os.write(self._descriptor, line[:PIPE_BYTES])

    def close(self) -> None:
        """Wait for the queue, but not long, because the reader may have stopped."""
        until = time.monotonic() + LAST_WAIT_S
        while self._lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)
        super().close()

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            dropped = self._dropped
            # If the pipe is closed or the disk is full, drop the line. The next may succeed.
            with contextlib.suppress(OSError):
                self._write(line)
                if dropped:
                    self._dropped -= dropped
                    self._write(self._make_dropped_line(dropped))
            self._lines.task_done()

    def _make_dropped_line(self, dropped: int) -> bytes:
        template = "dropped %s log lines, because the log wasn't read fast enough"
        record = logger.makeRecord(
            logger.name, logging.WARNING, "", 0, template, (dropped,), None, extra={}
        )
        return (self.format(record) + "\n").encode()

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # somebody made the descriptor non-blocking
                time.sleep(0.05)


def configure(form: LogFormat, level: LogLevel) -> None:
    """Send this package's log, and other warnings, to standard error."""
    handler = _make_handler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(SumsFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(level.upper())


def _make_handler() -> logging.Handler:
    """Write to the file descriptor, because Python would wait for the lock of `sys.stderr` at exit.
    If something has replaced `sys.stderr`, such as a progress bar, write to that."""
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return QueuedHandler(sys.stderr.fileno())
    return logging.StreamHandler(sys.stderr)


def _format_time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _read_message(record: logging.LogRecord) -> str:
    """Return the message without the fields after it."""
    message: str = getattr(record, "logto_message", "")
    return message or record.getMessage()


def _shorten(value: object) -> object:
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}… ({len(value)} characters)"
    return round(value, 2) if isinstance(value, float) else value


def _quote(value: object) -> str:
    """Quote text that isn't one plain word, so that a delivery can't forge a field or a line."""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def fan_out(*observers: Observer) -> Observer:
    """Combine observers. If one raises, the others still run, and the first failure is logged."""
    broken: set[int] = set()

    def observe(report: TelemetryEvent) -> None:
        for number, observer in enumerate(observers):
            try:
                observer(report)
            except BaseException as error:
                is_main = threading.current_thread() is threading.main_thread()
                if isinstance(error, KeyboardInterrupt | SystemExit) and is_main:
                    raise  # it ends the process
                if number not in broken:
                    broken.add(number)
                    logger.exception("an observer failed; its further failures are not logged")

    return observe
