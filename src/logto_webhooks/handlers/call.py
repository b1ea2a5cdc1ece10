"""Execute a job: call its handler, and decide on the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import Enum, auto
from functools import partial
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final

import msgspec
from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.clock import Clock
from logto_webhooks.database.coroutines import DetachedTask, NotBegun
from logto_webhooks.database.records import StoredRecord
from logto_webhooks.database.store import Store
from logto_webhooks.database.threads import RUNNING, AbandonedCalls, DetachedCall, Running
from logto_webhooks.deliveries import LARGE
from logto_webhooks.errors import (
    ClaimLost,
    Discard,
    HandlerMismatch,
    HandlerNotAwaited,
    JobLost,
    RowWaits,
    TimeLimitExceeded,
    describe,
)
from logto_webhooks.event_loop import Offloader
from logto_webhooks.events import DERIVED, Event, parse, parse_member
from logto_webhooks.events.local import LOCAL, LocalEvent, UserRow
from logto_webhooks.handlers import Handler, Handlers
from logto_webhooks.handlers.objects import (
    ObjectQuery,
    WantedObject,
    find_own_rows,
    find_wanted,
    load,
    load_async,
    make_query,
)
from logto_webhooks.handlers.parameters import module_of
from logto_webhooks.instrumentation import HandlerFailed, HandlerRan
from logto_webhooks.jobs import Delivery, Job, JobFilter, JobOutcome, JobRow, JobState
from logto_webhooks.mapping.declare import MappedKind
from logto_webhooks.records import local_events
from logto_webhooks.records.record import Key
from logto_webhooks.retries import (
    MAX_ERROR_CHARS,
    MAX_LOSSES,
    Dead,
    DiscardJob,
    Retry,
    after_job_failure,
    to_text,
    while_job_waits,
)
from logto_webhooks.signing_keys import trust

LEASE_S: Final = 15.0
REOPEN_AGE_S: Final = 10.0  # jobs wait half their age, of which this much counts
_type_name: Final = type.__dict__["__name__"].__get__
Call = Callable[[Handler, dict[str, Any]], Awaitable[None]]
Handle = Callable[[type, Callable[[Any], Any], Callable[[Store], None]], Awaitable[None]]
Read = Callable[[Callable[[Store], Any]], Awaitable[Any]]
logger = logging.getLogger("logto_webhooks.handlers")


class ClaimedJob(Struct, frozen=True):
    """A claimed job, and its handler."""

    job: Job
    handler: Handler
    token: str

    def to_outcome(self, state: JobState, **details: Any) -> JobOutcome:
        """Make an outcome with a new state of the job."""
        return JobOutcome(
            id=self.job.id, queue_key_id=self.job.queue_key_id, state=state, **details
        )


class Stage(Enum):
    """How far the call of a handler is."""

    FILLING = auto()  # its parameters
    OPENING = auto()  # a connection to the database: if that fails, the handler isn't to blame
    CALLING = auto()
    WRITTEN = auto()  # its outcome, together with its changes
    LOST = auto()  # its claim


class CallResult(Struct, frozen=True):
    """The result of a call. `outcome` is None if nothing has to be written: the outcome was written
    together with the handler's changes, or another process has the job."""

    outcome: JobOutcome | None = None
    report: HandlerRan | HandlerFailed | None = None
    error: BaseException | None = None


async def call_handler(handler: Handler, arguments: dict[str, Any]) -> None:
    """Call a handler without a transaction: on the event loop if it is a coroutine, else in a
    thread. Raises what it raises."""
    call = partial(call_function, handler, arguments)
    await (DetachedTask() if handler.is_async else DetachedCall[None]()).run(call)


def call_function(handler: Handler, arguments: dict[str, Any], transaction: Any = None) -> Any:
    """Call a handler's function, in this thread, with objects that are loaded in its session. If
    the handler is async, the result must be awaited. Raises RowWaits, HandlerNotAwaited, and what
    the function raises."""
    if handler.transaction:
        arguments = arguments | {handler.transaction.name: transaction}
    queries = {name: arg for name, arg in arguments.items() if isinstance(arg, ObjectQuery)}
    if queries and handler.is_async:
        return _load_and_call(handler, arguments, queries, transaction)
    if queries:
        arguments = arguments | load(queries, transaction)
    result = handler.function(**arguments)
    if handler.is_async:
        return result
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if not inspect.isasyncgen(result):  # closing this would also have to be awaited
            getattr(result, "close", bool)()
        raise HandlerNotAwaited(name=handler.name, returned=type(result).__name__)
    return result


async def _load_and_call(
    handler: Handler, arguments: dict[str, Any], queries: dict[str, ObjectQuery], session: Any
) -> None:
    await handler.function(**arguments | await load_async(queries, session))


class HandlerCaller:
    """Claims jobs of the handlers in this process, and calls the handlers."""

    def __init__(
        self,
        handle: Handle,
        read: Read,
        clock: Clock,
        jitter: Callable[[], float],
        handlers: Handlers,
        call: Call = call_handler,
        offloader: Offloader | None = None,
        abandoned: AbandonedCalls | None = None,
    ) -> None:
        """`handle` calls handlers with a transaction, and `read` reads, as a HandlerRunner does.
        `call` calls other handlers. `abandoned` counts the abandoned calls."""
        self._handle = handle
        self._read = read
        self._clock = clock
        self._jitter = jitter
        self._handlers = handlers
        self._call = call
        self._offloader = offloader or Offloader()
        self._abandoned = abandoned or AbandonedCalls()

    def claim(
        self,
        store: Store,
        token: str,
        room: Mapping[str, int],
        *,
        most_losses: int = MAX_LOSSES,
        skip_locked: bool = False,
        held: Mapping[int, str] | None = None,
        held_bytes: Mapping[str, int] | None = None,
    ) -> list[ClaimedJob]:
        """Claim the first jobs of due queues, for at most `room` queues of each handler, including
        at most one job that was lost, at most `most_losses` times. With `skip_locked`, skip jobs
        with a locked row. `held` are the tokens of the queues that are claimed, and `held_bytes`
        are those of each handler's large claimed jobs."""
        jobs = store.jobs.claim(
            token,
            room,
            LEASE_S,
            most_losses=most_losses,
            skip_locked=skip_locked,
            held=held,
            held_bytes=held_bytes,
        )
        return [ClaimedJob(job, self._handlers.by_name[job.handler], token) for job in jobs]

    async def call(self, claimed: ClaimedJob) -> CallResult:
        """Call the handler of a job. What it raises only affects this job."""
        job, handler = claimed.job, claimed.handler
        done = claimed.to_outcome(JobState.DONE)
        stage = Stage.FILLING

        def finish(store: Store) -> None:
            nonlocal stage
            if store.jobs.finish(claimed.token, [done]):
                stage = Stage.LOST
                raise ClaimLost(count=1)
            stage = Stage.WRITTEN

        def call_with_transaction(transaction: Any) -> Any:
            nonlocal stage
            stage = Stage.CALLING
            return call_function(handler, arguments, transaction)

        started = time.monotonic()
        RUNNING.set(Running(handler.name, self._abandoned))
        timeout = asyncio.timeout(handler.options.time_limit_s)
        try:
            await self._check(claimed)
            user = None
            if handler.asks_for_user:
                stage = Stage.OPENING
                user = await self._find_user(job)
                stage = Stage.FILLING
            fill = partial(fill_parameters, handler, job, user)
            is_large = len(job.payload) >= LARGE
            arguments = await self._offloader.run(fill) if is_large else fill()
            if wanted := find_wanted(arguments):
                stage = Stage.OPENING
                rows = await self._read(partial(find_own_rows, wanted=wanted))
                stage = Stage.CALLING
                arguments |= {name: make_query(wanted[name], row) for name, row in rows.items()}
            async with timeout:
                if handler.transaction:
                    stage = Stage.OPENING
                    kind = handler.transaction.types[0]
                    await self._handle(kind, call_with_transaction, finish)
                else:
                    await self._call(handler, arguments)
        except NotBegun:
            return CallResult(to_released(claimed))
        except (RowWaits, HandlerMismatch) as waits:
            return self._wait(claimed, waits)
        except BaseException as error:
            if stage is Stage.OPENING and isinstance(error, Exception):
                # Such as a connection that was lost: another one may do.
                return self._wait(claimed, error, longest_age_s=REOPEN_AGE_S)
            if stage is Stage.LOST:
                # Another process has the job, or it was discarded, so nothing was written.
                return CallResult(claimed.to_outcome(JobState.WAITING, counts=False))
            if type(error) is TimeoutError and timeout.expired():  # not the handler's own
                error = TimeLimitExceeded(seconds=handler.options.time_limit_s)
            return self._fail(claimed, error)
        took_ms = round((time.monotonic() - started) * 1000, 1)
        ran = HandlerRan(job.id, job.handler, job.event, job.subject, job.attempts + 1, took_ms)
        return CallResult(None if stage is Stage.WRITTEN else done, ran)

    async def _find_user(self, job: Job) -> UserRow | None:
        """Return the row of a job's user; None if the user isn't known. Others wait neither for the
        query nor for the decoding, because a user's data may be large."""
        kind, _, logto_id = job.subject.partition(":")
        if kind != "user":
            return None
        key = Key("user", logto_id)
        stored: StoredRecord | None = await self._read(lambda store: store.read_encoded(key))
        if stored is None:
            return None
        find = partial(_to_user_row, stored)
        return await self._offloader.run(find) if stored.size >= LARGE else find()

    async def _check(self, claimed: ClaimedJob) -> None:
        """Raise JobLost, Discard or HandlerMismatch for a job that must not run."""
        job, handler = claimed.job, claimed.handler
        age = None if job.runs else handler.options.max_age_s  # who repeats it wants it to run
        if job.losses >= MAX_LOSSES:
            raise JobLost(times=job.losses)
        if age is not None and self._clock.now() - job.occurred_at > age * 1000:
            raise Discard(f"older than {age:g} s")
        if not handler.registered.wants(job.event):
            registered = await self._read(lambda store: store.jobs.handlers())
            if any(other.name == handler.name and other.wants(job.event) for other in registered):
                raise HandlerMismatch(name=handler.name, event=job.event)
            raise Discard(f"no release that runs has this handler for {job.event}")

    def _wait(
        self, claimed: ClaimedJob, waits: Exception, longest_age_s: float = math.inf
    ) -> CallResult:
        """Try again later, because the handler couldn't be called: the application's own row isn't
        there, only another release is for this event, or no transaction could be opened. It isn't
        a failure of the handler."""
        job = claimed.job
        age_s = min((self._clock.now() - job.occurred_at) / 1000, longest_age_s)
        after_s = while_job_waits(age_s, self._jitter()).after_s
        outcome = claimed.to_outcome(
            JobState.WAITING, error=to_text(waits), counts=False, after_s=after_s
        )
        report = _make_report(job, job.attempts + 1, waits, outcome.state, after_s)
        return CallResult(outcome, report, waits)

    def _fail(self, claimed: ClaimedJob, error: BaseException) -> CallResult:
        job, function = claimed.job, claimed.handler.function
        text = format_error(error, function)
        try:
            decision = self._decide(claimed.handler, job.failures, error)
        except BaseException as surprise:  # an application's exception can carry anything
            decision = self._decide(claimed.handler, job.failures, RuntimeError())
            text = f"{text}\nWhat it says about the retry can't be used: {_summarize(surprise)}"
        match decision:
            case DiscardJob(why):
                outcome = claimed.to_outcome(JobState.DISCARDED, error=why)
            case Dead():
                outcome = claimed.to_outcome(JobState.DEAD, error=text, failed=True)
            case Retry(after):
                outcome = claimed.to_outcome(
                    JobState.WAITING, error=text, failed=True, after_s=after
                )
        after_s = decision.after_s if isinstance(decision, Retry) else None
        where = error_location(error, function)
        report = _make_report(job, job.attempts + 1, error, outcome.state, after_s, where)
        return CallResult(outcome, report, error)

    def _decide(
        self, handler: Handler, failures: int, error: BaseException
    ) -> Retry | Dead | DiscardJob:
        options = handler.options
        return after_job_failure(
            error, failures, self._jitter(), options.max_attempts, options.waits
        )

    def fail_unwritten(
        self, store: Store, token: str, outcome: JobOutcome, error: Exception
    ) -> HandlerFailed | None:
        """Make a job fail, because an error prevents writing its outcome. Return the report; None
        if another process has the job."""
        [job] = store.jobs.find(JobFilter(id=outcome.id))
        decision = self._decide(self._handlers.by_name[job.handler], job.failures, RuntimeError())
        after_s = decision.after_s if isinstance(decision, Retry) else None
        failure = JobOutcome(
            id=outcome.id,
            queue_key_id=outcome.queue_key_id,
            state=JobState.WAITING if isinstance(decision, Retry) else JobState.DEAD,
            error=f"Its outcome ({outcome.state}) can't be written: {ascii(describe(error))[1:-1]}",
            failed=True,
            after_s=after_s or 0,
        )
        if store.jobs.finish(token, [failure]):
            return None
        return _make_report(job, job.attempts, error, failure.state, after_s)


def _make_report(
    job: Job | JobRow,
    attempt: int,
    error: BaseException,
    state: JobState,
    after_s: float | None,
    where: str | None = None,
) -> HandlerFailed:
    call = (job.id, job.handler, job.event, job.subject, attempt)
    return HandlerFailed(*call, name_type(error), state.value, after_s, where)


def fill_parameters(handler: Handler, job: Job, user: UserRow | None) -> dict[str, Any]:
    """Return the arguments for all parameters except the transaction."""
    arguments: dict[str, Any] = {}
    for parameter in handler.parameters:
        match parameter.kind:
            case "event":
                arguments[parameter.name] = build_event(job)
            case "delivery":
                arguments[parameter.name] = build_delivery(job)
            case "user":
                arguments[parameter.name] = user
            case "logger":
                arguments[parameter.name] = make_logger(job)
            case "object":
                mapping = parameter.mapping
                logto_id = _find_id(job, mapping.kind) if mapping else None
                arguments[parameter.name] = (
                    WantedObject(parameter, mapping, logto_id) if mapping and logto_id else None
                )
    return arguments


def _find_id(job: Job, kind: MappedKind) -> str | None:
    """Return Logto's id of the event's user or organization; None if it has none."""
    subject_kind, _, logto_id = job.subject.partition(":")
    if subject_kind == kind:
        return logto_id
    return getattr(build_event(job), f"{kind}_id", None)


def make_logger(job: Job) -> logging.LoggerAdapter[logging.Logger]:
    """Make a logger whose lines name the job and its delivery."""
    fields = {
        "job": job.id,
        "delivery": job.delivery_id,
        "event": job.event,
        "subject": job.subject,
    }
    return logging.LoggerAdapter(logger, {"logto": fields})


def build_event(job: Job) -> Event | LocalEvent:
    """Make the event of a job."""
    if job.event in LOCAL:
        is_large = len(job.payload) >= LARGE
        with canonical_json.no_collection() if is_large else contextlib.nullcontext():
            return msgspec.json.decode(job.payload, type=LOCAL[job.event])
    body = trust(job.payload)
    if job.event in DERIVED:
        return parse_member(body, job.event, job.subject.partition(":")[2], job.occurred_at)
    return parse(body, job.occurred_at)


def build_delivery(job: Job) -> Delivery:
    """Make the Delivery of a job."""
    return Delivery(
        id=job.delivery_id,
        event=job.event,
        subject=job.subject,
        occurred_at=job.occurred_at,
        received_at=job.received_at,
        origin=job.origin or "here",
        attempt=job.attempts + 1,
        late=job.late,
        replayed=job.runs > 0,
        idempotency_key=f"{job.handler}:{job.key}",
    )


def to_released(claimed: ClaimedJob, after_s: float = 0) -> JobOutcome:
    """Make an outcome that releases the job to other processes after some seconds."""
    return claimed.to_outcome(JobState.WAITING, counts=False, after_s=after_s)


def format_error(error: BaseException, function: Callable[..., Any]) -> str:
    """Format an error with its traceback, from the first line in the function's module on, because
    the lines that call it don't help. Without such a line, the traceback is complete."""
    try:
        first = next(_own_lines(error, function), error.__traceback__)
        lines = traceback.format_exception(type(error), error, first)
        return to_text("".join(lines)[-MAX_ERROR_CHARS:])
    except BaseException:  # from an error that can't be formatted
        return f"{name_type(error)}; its traceback can't be written"


def name_type(error: BaseException) -> str:
    """Return the name of an error's type, even if its metaclass overrides that."""
    name: str = _type_name(type(error))
    return name


def _summarize(error: BaseException) -> str:
    try:
        return to_text("".join(traceback.format_exception_only(error)).strip())
    except BaseException:
        return name_type(error)


def _to_user_row(stored: StoredRecord) -> UserRow | None:
    return local_events.user_row(stored.decode())


def error_location(error: BaseException, function: Callable[..., Any]) -> str | None:
    """Return the innermost line in a function's module, as `file.py:12 name`, or None. It contains
    no values, and only the name of the file.
    """
    try:
        *_, innermost = None, *_own_lines(error, function)
    except BaseException:  # from an error with unusual attributes
        return None
    if innermost is None:
        return None
    code = innermost.tb_frame.f_code
    return f"{PurePath(code.co_filename).name}:{innermost.tb_lineno} {code.co_qualname}"


def _own_lines(error: BaseException, function: Callable[..., Any]) -> Iterator[TracebackType]:
    """Yield the lines of a traceback in a function's module, the outermost first."""
    module = module_of(function)
    line = error.__traceback__
    while line is not None:
        if module is not None and line.tb_frame.f_globals.get("__name__") == module:
            yield line
        line = line.tb_next
