"""One attempt at a job: its handler called, and what follows from how that went, as a value."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.core import local, making
from logto_webhooks.core.events.local import UserRow
from logto_webhooks.core.jobs import Job, JobOutcome
from logto_webhooks.core.lifecycle import (
    JOB_MOVES,
    MAX_LOSSES,
    Dead,
    Drop,
    JobMove,
    JobState,
    Retry,
    after_job_failure,
)
from logto_webhooks.core.ports import Clock, Store
from logto_webhooks.core.record import Key
from logto_webhooks.core.reports import HandlerFailed, HandlerRan
from logto_webhooks.errors import ClaimLost, Discard, HandlerNotFor, JobLost
from logto_webhooks.service import call
from logto_webhooks.service.aside import RUNNING, LeftBehind, Running
from logto_webhooks.service.handlers import Handler, Handlers
from logto_webhooks.service.options import Options
from logto_webhooks.service.whereabouts import whereabouts

LEASE_S: Final = 15.0
_ERROR_CHARS: Final = 8_000
Call = Callable[[Handler, dict[str, Any]], Awaitable[None]]
Handle = Callable[[type, Callable[[Any], Any], Callable[[Store], None]], Awaitable[None]]


class Held(Struct, frozen=True):
    """A job in hand, and its handler."""

    job: Job
    handler: Handler
    token: str
    user: UserRow | None


class Attempted(Struct, frozen=True):
    """How it went. `outcome` is None when nothing is left to be written: it was, with what the
    handler wrote, or the job is somebody else's by now."""

    outcome: JobOutcome | None = None
    report: HandlerRan | HandlerFailed | None = None
    error: BaseException | None = None


class Attempts:
    """Claims jobs of the handlers whose code is here, and calls these."""

    def __init__(
        self,
        handle: Handle,
        clock: Clock,
        jitter: Callable[[], float],
        handlers: Handlers,
        call: Call = call.call,
    ) -> None:
        """`handle` is how a handler is called that asks for a transaction, as a HandlerHost does
        it; `call` how others are."""
        self._handle = handle
        self._clock = clock
        self._jitter = jitter
        self._handlers = handlers
        self._call = call
        self.left = LeftBehind()

    def claim(
        self,
        store: Store,
        token: str,
        room: Mapping[str, int],
        *,
        lost: bool = True,
        skip_locked: bool = False,
    ) -> list[Held]:
        """Take the first jobs of so many lines of each handler; of those whose holder is lost
        one, if any. To `skip_locked` is to take no job whose row another transaction holds."""
        return [
            self._held(store, job, token)
            for job in store.jobs.claim(token, room, LEASE_S, lost=lost, skip_locked=skip_locked)
        ]

    async def make(self, held: Held) -> Attempted:
        """Call the handler; whatever it raises is the job's alone."""
        started = time.monotonic()
        _handler_that_is_awaited = held.handler.name  # for the watchdog
        RUNNING.set(Running(held.handler.name, self.left))
        try:
            written = await self._attempt(held)
        except ClaimLost:
            # Somebody else has it, or it was discarded: nothing of ours was written.
            return Attempted(_outcome(held.job, JobMove.RETRY, counts=False))
        except BaseException as error:
            return self._failed(held, error)
        took = time.monotonic() - started
        report = HandlerRan(*_names(held.job), round(took * 1000, 1))
        return Attempted(None if written else _outcome(held.job, JobMove.FINISH), report)

    def _held(self, store: Store, job: Job, token: str) -> Held:
        handler = self._handlers.get(job.handler)
        assert handler is not None
        user = _user(store, job) if handler.asks_for("user") else None
        return Held(job, handler, token, user)

    async def _attempt(self, held: Held) -> bool:
        """Call; return whether the job is written as done already."""
        job, handler = held.job, held.handler
        age = handler.options.max_age_s
        if job.losses >= MAX_LOSSES:
            raise JobLost(times=job.losses)
        if age is not None and self._clock.now() - job.occurred_at > age * 1000:
            raise Discard(f"older than {age:g} s")
        if not making.is_for(handler.registered, job.event):
            raise HandlerNotFor(name=handler.name, event=job.event)
        arguments = call.filled(handler, job, held.user)
        wish = handler.transaction
        if wish is None:
            await self._call(handler, arguments)
            return False
        name = next(each.name for each in handler.wishes if each.kind == "transaction")

        def with_transaction(given: Any) -> Any:
            return call.called(handler, arguments | {name: given})

        def finish(store: Store) -> None:
            if store.jobs.finish(held.token, [_outcome(job, JobMove.FINISH)]):
                raise ClaimLost(count=1)

        async with call.limit(handler):
            await self._handle(wish, with_transaction, finish)
        return True

    def _failed(self, held: Held, error: BaseException) -> Attempted:
        options, job = held.handler.options, held.job
        if isinstance(error, HandlerNotFor):
            options = Options()  # while releases change: whoever has its code may yet take it
        decision = after_job_failure(
            error, job.failures, self._jitter(), options.max_attempts, options.waits
        )
        text = _told(error)
        match decision:
            case Drop(why):
                outcome = _outcome(job, JobMove.DISCARD, error=why)
            case Dead():
                outcome = _outcome(job, JobMove.GIVE_UP, error=text, failed=True)
            case Retry(after):
                outcome = _outcome(job, JobMove.RETRY, error=text, failed=True, after_s=after)
        wait = decision.after_s if isinstance(decision, Retry) else None
        name = type(error).__name__
        where = whereabouts(error, held.handler.function)
        report = HandlerFailed(*_names(job), name, outcome.state.value, wait, where)
        return Attempted(outcome, report, error)


def was_cancelled(attempted: Attempted) -> bool:
    """Whether it ended because it was told to."""
    return isinstance(attempted.error, asyncio.CancelledError)


def given_back(held: Held, called: bool = True) -> JobOutcome:
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
    return None if record is None else local.user_row(record)


def _names(job: Job) -> tuple[int, str, str, str, int]:
    return job.id, job.handler, job.event, job.subject, job.attempts + 1


def _outcome(job: Job, move: JobMove, **more: Any) -> JobOutcome:
    state = JOB_MOVES[JobState.WAITING, move]
    return JobOutcome(id=job.id, line_id=job.line_id, state=state, **more)
