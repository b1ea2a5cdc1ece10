"""Handlers that are called: awaited rightly, or said not to be; and code that calls beside them."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, UserRow, events
from logto_webhooks.errors import CalledFromEventLoop
from logto_webhooks.jobs import JobRow
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, on_postgres, on_sqlite, send, soon, until

DONE: list[str] = []


async def works(event: events.Event, number: int = 5) -> None:
    await asyncio.sleep(0)
    DONE.append("works")


class Works:
    async def __call__(self, event: events.Event) -> None:
        DONE.append("Works")


def generates() -> Iterator[int]:
    yield 1


async def generates_later() -> AsyncIterator[int]:
    yield 1


class Awaitable:
    def __await__(self) -> Iterator[None]:
        yield None


@functools.wraps(works)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    return works(*args, **kwargs)


def returns(made: Callable[[], object]) -> Callable[..., object]:
    def handler(event: events.Event) -> object:
        return made()

    return handler


def returns_with_session(event: events.Event, session: Session) -> Any:
    return works(event)


def ran(functions: dict[str, Any], folder: Path) -> dict[str, JobRow]:
    """The jobs of handlers, each tried once."""
    logto, found = on_sqlite(folder), list[JobRow]()
    for name, function in functions.items():
        logto.on("User.Created", name=name, max_attempts=1)(function)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        found.extend(await until(all_over(len(functions)), logto))

    live(logto, body)
    return {each.handler: each for each in found}


def fails(event: events.Event) -> None:
    json.loads("{")


async def fails_later(event: events.Event) -> None:
    await asyncio.sleep(0)
    fails(event)


def fails_with_session(event: events.Event, session: Session) -> None:
    fails(event)


def test_a_traceback_begins_in_the_handler(tmp_path: Path) -> None:
    """What called it is left out; what it called is there."""
    functions: dict[str, Any] = {
        function.__name__: function for function in (fails, fails_later, fails_with_session)
    }
    for name, job in ran(functions, tmp_path).items():
        lines = str(job.error).splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert re.fullmatch(rf'  File "{re.escape(__file__)}", line \d+, in {name}', lines[1])
        assert "json/decoder.py" in str(job.error)
        assert lines[-1].startswith("json.decoder.JSONDecodeError: ")


def test_a_plain_function_that_returns_what_must_be_awaited_is_dead(tmp_path: Path) -> None:
    """Its job isn't done: nothing of it has run. No warning is left behind."""
    DONE.clear()
    jobs = ran(
        {
            "coroutine": lambda event: works(event),
            "wrapped": wrapped,
            "session": returns_with_session,
            "generator": returns(generates),
            "async_generator": returns(generates_later),
            "Awaitable": returns(Awaitable),
        },
        tmp_path,
    )
    assert {each.state for each in jobs.values()} == {"dead"}
    assert all("HandlerNotAwaited" in (each.error or "") for each in jobs.values())
    assert "an un-awaited async_generator" in (jobs["async_generator"].error or "")
    assert DONE == []


def test_what_is_asynchronous_is_awaited(tmp_path: Path) -> None:
    """As a partial, or as an object that is called; others may return what they like."""
    DONE.clear()
    jobs = ran(
        {
            "partial": functools.partial(works, number=6),
            "object": Works(),
            "partial of an object": functools.partial(Works()),
            "plain": returns(lambda: [1, 2]),
        },
        tmp_path,
    )
    assert {each.state for each in jobs.values()} == {"done"}
    assert sorted(DONE) == ["Works", "Works", "works"]


def test_a_call_on_the_event_loop_is_refused(tmp_path: Path) -> None:
    """It would wait for itself."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        with pytest.raises(CalledFromEventLoop, match="await"):
            logto.call(logto.status())

    live(logto, body)


@pytest.mark.postgres
def test_calls_without_a_lifespan(tmp_path: Path) -> None:
    """From several threads, each in a loop of its own, whatever the engine; and then with one."""
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url)
    logtos = [
        LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=postgres.emptied_schema()),
        on_sqlite(tmp_path),
    ]
    for logto in logtos:
        logto.call(logto.migrate())

        def ensured(number: int, logto: LogtoWebhooks = logto) -> str:
            return logto.call(logto.ensure_user({"sub": "ana"})).id

        with ThreadPoolExecutor(2) as threads:
            assert len({ensured(0), ensured(1), *threads.map(ensured, range(4))}) == 1

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            assert await logto.wait_for_user("ana", 0)

        live(logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("make_logto", [on_sqlite, lambda folder: on_postgres()])
def test_a_handler_ensures_a_user(
    make_logto: Callable[[Path], LogtoWebhooks], tmp_path: Path
) -> None:
    """In a thread of its own; on SQLite, one with a transaction must give that."""
    logto = make_logto(tmp_path)

    def ensured(session: Any = None) -> UserRow:
        claims = {"sub": "bo" if session is None else "eve"}
        return logto.call(logto.ensure_user(claims, session=session))

    logto.on("User.Created", name="beside", max_attempts=1)(lambda event: ensured())
    if isinstance(logto._engine, sa.Engine):

        @logto.on("User.Created", name="within", max_attempts=1)
        def within(session: Session) -> None:
            ensured(session)

        @logto.on("User.Created", name="waits", max_attempts=1)
        def waits(session: Session) -> None:
            assert logto.call(logto.users("ana"))  # reading waits for nobody
            ensured()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        jobs = {each.handler: each for each in await until(all_over(len(logto.handlers)), logto)}
        states = {name: each.state for name, each in jobs.items()}
        expected = {"beside": "done", "within": "done", "waits": "dead"}
        assert states == {name: expected[name] for name in states}
        if "waits" in jobs:
            assert "WriterBusy" in (jobs["waits"].error or "")
            assert await logto.wait_for_user("eve", 0)
        assert await logto.wait_for_user("bo", 0)

    live(logto, body)
