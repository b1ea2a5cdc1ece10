"""Calling a handler: its parameters filled, within its time, whatever it raises."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec

from logto_webhooks.core.events import Event, OrganizationMembershipUpdated, parse
from logto_webhooks.core.events.catalog import DERIVED
from logto_webhooks.core.events.local import LOCAL, LocalEvent, UserRow
from logto_webhooks.core.jobs import Delivery, Job
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import HandlerNotAwaited, TimeLimitExceeded
from logto_webhooks.service.aside import Aside
from logto_webhooks.service.handlers import Handler

logger = logging.getLogger("logto_webhooks.handlers")


def event_of(job: Job) -> Event | LocalEvent:
    """Make the event of a job."""
    if job.event in LOCAL:
        return msgspec.json.decode(job.payload, type=LOCAL[job.event])
    event = parse(vouch(job.payload), job.occurred_at)
    if job.event in DERIVED and isinstance(event, OrganizationMembershipUpdated):
        user = job.subject.partition(":")[2]
        derived = [each for each in event.derived() if each.event == job.event]
        return next(each for each in derived if each.user_id == user)
    return event


def delivery_of(job: Job) -> Delivery:
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


def filled(handler: Handler, job: Job, user: UserRow | None) -> dict[str, Any]:
    """All parameters but the transaction."""
    delivery = delivery_of(job)
    told = {"job": job.id, "delivery": job.delivery_id, "event": job.event, "subject": job.subject}
    given: dict[str, Any] = {
        "event": event_of(job) if handler.asks_for("event") else None,
        "delivery": delivery,
        "user": user,
        "logger": logging.LoggerAdapter(logger, {"logto": told}),
    }
    return {each.name: given[each.kind] for each in handler.wishes if each.kind in given}


async def call(handler: Handler, arguments: dict[str, Any]) -> None:
    """Call a handler that asks for no transaction: on the loop if it is a coroutine, else in a
    thread. Raises TimeLimitExceeded, and what it raises."""
    async with limit(handler):
        if handler.is_async:
            await called(handler, arguments)
        else:
            await Aside().awaited(partial(called, handler, arguments))


def called(handler: Handler, arguments: dict[str, Any]) -> Any:
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
async def limit(handler: Handler) -> AsyncIterator[None]:
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
