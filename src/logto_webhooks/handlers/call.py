"""Execute one job: call its handler, and decide what follows."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, Final

import msgspec
from msgspec import Struct

from logto_webhooks.clock import Clock
from logto_webhooks.database.store import Store
from logto_webhooks.database.threads import RUNNING, AbandonedCalls, DetachedCall, Running
from logto_webhooks.errors import (
    ClaimLost,
    Discard,
    HandlerMismatch,
    HandlerNotAwaited,
    JobLost,
    TimeLimitExceeded,
)
from logto_webhooks.events import DERIVED, Event, OrganizationMembershipUpdated, parse
from logto_webhooks.events.local import LOCAL, LocalEvent, UserRow
from logto_webhooks.handlers import Handler, HandlerOptions, Handlers, is_wanted
from logto_webhooks.instrumentation import HandlerFailed, HandlerRan
from logto_webhooks.jobs import JOB_MOVES, Delivery, Job, JobMove, JobOutcome, JobState
from logto_webhooks.records import local_events
from logto_webhooks.records.record import Key
from logto_webhooks.retries import MAX_LOSSES, Dead, DiscardJob, Retry, after_job_failure
from logto_webhooks.signing_keys import trust


def error_location(error: BaseException, function: Callable[..., Any]) -> str | None:
    """The innermost line of a function's own module, as `file.py:12 name`; None if there is none.

    No value is in it, and of the file only the name.
    """
    module = getattr(function, "__module__", None)
    inner = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if module is not None and frame.f_globals.get("__name__") == module:
            code = frame.f_code
            inner = f"{PurePath(code.co_filename).name}:{line} {code.co_qualname}"
    return inner


logger = logging.getLogger("logto_webhooks.handlers")


def build_event(job: Job) -> Event | LocalEvent:
    """Make the event of a job."""
    if job.event in LOCAL:
        return msgspec.json.decode(job.payload, type=LOCAL[job.event])
    event = parse(trust(job.payload), job.occurred_at)
    if job.event in DERIVED and isinstance(event, OrganizationMembershipUpdated):
        user = job.subject.partition(":")[2]
        derived = [
            member_event for member_event in event.derived() if member_event.event == job.event
        ]
        return next(event for event in derived if event.user_id == user)
    return event


def build_delivery(job: Job) -> Delivery:
    """What the handler may be told of it."""
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


def fill_parameters(handler: Handler, job: Job, user: UserRow | None) -> dict[str, Any]:
    """All parameters but the transaction."""
    delivery = build_delivery(job)
    told = {"job": job.id, "delivery": job.delivery_id, "event": job.event, "subject": job.subject}
    given: dict[str, Any] = {
        "event": build_event(job) if handler.asks_for("event") else None,
        "delivery": delivery,
        "user": user,
        "logger": logging.LoggerAdapter(logger, {"logto": told}),
    }
    return {
        parameter.name: given[parameter.kind]
        for parameter in handler.parameters
        if parameter.kind in given
    }


async def call_handler(handler: Handler, arguments: dict[str, Any]) -> None:
    """Call a handler that asks for no transaction: on the loop if it is a coroutine, else in a
    thread. Raises TimeLimitExceeded, and what it raises."""
    async with time_limit(handler):
        if handler.is_async:
            await call_in_tests(handler, arguments)
        else:
            await DetachedCall().run(partial(call_in_tests, handler, arguments))


def call_in_tests(handler: Handler, arguments: dict[str, Any]) -> Any:
    """Call the function, on this thread; what it returns must be awaited if the handler is async.

    Raises HandlerNotAwaited, and what it raises.
    """
    result = handler.function(**arguments)
    if handler.is_async:
        return result
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if not inspect.isasyncgen(result):  # closing that would have to be awaited, too
            getattr(result, "close", bool)()
        raise HandlerNotAwaited(name=handler.name, returned=type(result).__name__)
    return result


@contextlib.asynccontextmanager
async def time_limit(handler: Handler) -> AsyncIterator[None]:
    """The time that a handler has. Raises TimeLimitExceeded."""
    seconds = handler.options.time_limit_s
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if timeout.expired():
            raise TimeLimitExceeded(seconds=seconds) from None
        raise  # of the handler's own


LEASE_S: Final = 15.0
_ERROR_CHARS: Final = 8_000
Call = Callable[[Handler, dict[str, Any]], Awaitable[None]]
Handle = Callable[[type, Callable[[Any], Any], Callable[[Store], None]], Awaitable[None]]


class ClaimedJob(Struct, frozen=True):
    """A job in hand, and its handler."""

    job: Job
    handler: Handler
    token: str
    user: UserRow | None


class ExecutionResult(Struct, frozen=True):
    """How it went. `outcome` is None when nothing is left to be written: it was, with what the
    handler wrote, or the job is somebody else's by now."""

    outcome: JobOutcome | None = None
    report: HandlerRan | HandlerFailed | None = None
    error: BaseException | None = None


class JobExecutor:
    """Claims jobs of the handlers whose code is here, and calls these."""

    def __init__(
        self,
        handle: Handle,
        clock: Clock,
        jitter: Callable[[], float],
        handlers: Handlers,
        call: Call = call_handler,
    ) -> None:
        """`handle` is how a handler is called that asks for a transaction, as a HandlerRunner does
        it; `call` how others are."""
        self._handle = handle
        self._clock = clock
        self._jitter = jitter
        self._handlers = handlers
        self._call = call
        self.left = AbandonedCalls()

    def claim(
        self,
        store: Store,
        token: str,
        room: Mapping[str, int],
        *,
        lost: bool = True,
        skip_locked: bool = False,
    ) -> list[ClaimedJob]:
        """Take the first jobs of so many queues of each handler; of those whose holder is lost
        one, if any. To `skip_locked` is to take no job whose row another transaction holds."""
        return [
            self._held(store, job, token)
            for job in store.jobs.claim(token, room, LEASE_S, lost=lost, skip_locked=skip_locked)
        ]

    async def make(self, held: ClaimedJob) -> ExecutionResult:
        """Call the handler; whatever it raises is the job's alone."""
        started = time.monotonic()
        _handler_that_is_awaited = held.handler.name  # for the watchdog
        RUNNING.set(Running(held.handler.name, self.left))
        try:
            written = await self._attempt(held)
        except ClaimLost:
            # Somebody else has it, or it was discarded: nothing of ours was written.
            return ExecutionResult(_outcome(held.job, JobMove.RETRY, counts=False))
        except BaseException as error:
            return self._failed(held, error)
        took = time.monotonic() - started
        report = HandlerRan(*_names(held.job), round(took * 1000, 1))
        return ExecutionResult(None if written else _outcome(held.job, JobMove.FINISH), report)

    def _held(self, store: Store, job: Job, token: str) -> ClaimedJob:
        handler = self._handlers.get(job.handler)
        assert handler is not None
        user = _user(store, job) if handler.asks_for("user") else None
        return ClaimedJob(job, handler, token, user)

    async def _attempt(self, held: ClaimedJob) -> bool:
        """Call; return whether the job is written as done already."""
        job, handler = held.job, held.handler
        age = handler.options.max_age_s
        if job.losses >= MAX_LOSSES:
            raise JobLost(times=job.losses)
        if age is not None and self._clock.now() - job.occurred_at > age * 1000:
            raise Discard(f"older than {age:g} s")
        if not is_wanted(handler.registered, job.event):
            raise HandlerMismatch(name=handler.name, event=job.event)
        arguments = fill_parameters(handler, job, held.user)
        wish = handler.transaction
        if wish is None:
            await self._call(handler, arguments)
            return False
        name = next(
            parameter.name for parameter in handler.parameters if parameter.kind == "transaction"
        )

        def with_transaction(given: Any) -> Any:
            return call_in_tests(handler, arguments | {name: given})

        def finish(store: Store) -> None:
            if store.jobs.finish(held.token, [_outcome(job, JobMove.FINISH)]):
                raise ClaimLost(count=1)

        async with time_limit(handler):
            await self._handle(wish, with_transaction, finish)
        return True

    def _failed(self, held: ClaimedJob, error: BaseException) -> ExecutionResult:
        options, job = held.handler.options, held.job
        if isinstance(error, HandlerMismatch):
            options = (
                HandlerOptions()
            )  # while releases change: whoever has its code may yet take it
        decision = after_job_failure(
            error, job.failures, self._jitter(), options.max_attempts, options.waits
        )
        text = _told(error)
        match decision:
            case DiscardJob(why):
                outcome = _outcome(job, JobMove.DISCARD, error=why)
            case Dead():
                outcome = _outcome(job, JobMove.GIVE_UP, error=text, failed=True)
            case Retry(after):
                outcome = _outcome(job, JobMove.RETRY, error=text, failed=True, after_s=after)
        wait = decision.after_s if isinstance(decision, Retry) else None
        name = type(error).__name__
        where = error_location(error, held.handler.function)
        report = HandlerFailed(*_names(job), name, outcome.state.value, wait, where)
        return ExecutionResult(outcome, report, error)


def was_cancelled(attempted: ExecutionResult) -> bool:
    """Whether it ended because it was told to."""
    return isinstance(attempted.error, asyncio.CancelledError)


def to_released(held: ClaimedJob, called: bool = True) -> JobOutcome:
    """Let somebody else do it; a thread isn't stopped, but ends with this process."""
    after = LEASE_S if called and not held.handler.is_async else 0
    return _outcome(held.job, JobMove.RETRY, counts=False, after_s=after)


def _told(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-_ERROR_CHARS:]
    except Exception:  # of an error that can't even be shown
        return f"{type(error).__name__}; its traceback can't be written"


def _user(store: Store, job: Job) -> UserRow | None:
    kind, _, logto_id = job.subject.partition(":")
    if kind != "user":
        return None
    key = Key("user", logto_id)
    record = store.inbox.known(key).get(key)
    return None if record is None else local_events.user_row(record)


def _names(job: Job) -> tuple[int, str, str, str, int]:
    return job.id, job.handler, job.event, job.subject, job.attempts + 1


def _outcome(job: Job, move: JobMove, **more: Any) -> JobOutcome:
    state = JOB_MOVES[JobState.WAITING, move]
    return JobOutcome(id=job.id, queue_key_id=job.queue_key_id, state=state, **more)
