"""Exceptions that carry anything, and outcomes that can't be written: only that job fails."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from logto_webhooks import Discard, LogtoWebhooks, RetryLater, events
from logto_webhooks.database.store import Store
from logto_webhooks.errors import ClaimLost
from logto_webhooks.jobs import JobRow
from logto_webhooks.testing import make
from tests.support.mounted import live, on_postgres, on_sqlite, send, soon, until


class OddError(BaseException):
    """No Exception."""


def raises(*_: object) -> Any:
    raise OddError


def attribute(base: type[BaseException], name: str, value: Any) -> BaseException:
    """An exception whose attribute is that value, or a property."""
    odd: type[BaseException] = type("Odd", (base,), {"__init__": lambda self: None, name: value})
    return odd()


class BrokenText(str):
    """Text that can't be used as text."""

    __slots__ = ()
    replace: Any = raises
    encode: Any = raises
    __str__: Any = raises


class OddName(type):
    __name__ = property(raises)


def chain() -> BaseException:
    error: BaseException = LookupError("first")
    for _ in range(3_000):
        following = LookupError("next")
        following.__cause__ = error
        error = following
    return error


FAILED = ("waiting", 1)
# What is raised, and what the job is then, and how often it failed.
ODD: dict[str, tuple[Callable[[], BaseException], tuple[str, int], str]] = {
    "number": (lambda: attribute(Discard, "why", 404), ("discarded", 0), "404"),
    "none": (lambda: attribute(Discard, "why", None), ("discarded", 0), "no reason given"),
    "long": (lambda: attribute(Discard, "why", "x" * 1_000_000), ("discarded", 0), "xxx"),
    "no text": (lambda: attribute(Discard, "why", "a\0\udc00b"), ("discarded", 0), "a"),
    "text": (lambda: attribute(Discard, "why", BrokenText("x")), FAILED, "OddError"),
    "property": (lambda: attribute(Discard, "why", property(raises)), FAILED, "OddError"),
    "header": (lambda: attribute(RetryLater, "after_s", "3600"), FAILED, "Odd"),
    "date": (lambda: attribute(RetryLater, "after_s", "soon"), FAILED, "'soon'"),
    "huge": (lambda: attribute(RetryLater, "after_s", 10**400), FAILED, "OverflowError"),
    "endless": (lambda: attribute(RetryLater, "after_s", float("inf")), FAILED, "Odd"),
    "object": (lambda: attribute(RetryLater, "after_s", object()), FAILED, "TypeError"),
    "wait": (lambda: attribute(RetryLater, "after_s", property(raises)), FAILED, "OddError"),
    "str": (lambda: attribute(Exception, "__str__", raises), FAILED, "Odd"),
    "cause": (lambda: attribute(Exception, "__cause__", property(raises)), FAILED, "Odd"),
    "traceback": (lambda: attribute(Exception, "__traceback__", property(raises)), FAILED, "Odd"),
    "class": (lambda: attribute(Exception, "__class__", property(raises)), FAILED, "Odd"),
    "notes": (lambda: attribute(Exception, "__notes__", property(raises)), FAILED, "Odd"),
    "name": (lambda: OddName("Odd", (Exception,), {})(), FAILED, "Odd"),
    "chain": (chain, FAILED, "LookupError"),
    "claim": (lambda: ClaimLost(count=1), FAILED, "ClaimLost"),
}


def states(rows: list[JobRow], handler: str) -> list[str]:
    return [row.state for row in rows if row.handler == handler]


@pytest.mark.postgres
@pytest.mark.parametrize("make_logto", [on_sqlite, lambda folder: on_postgres()])
def test_whatever_an_exception_carries_its_job_fails_alone(
    make_logto: Callable[[Path], LogtoWebhooks], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reason is text, and a wait a number, or else the job is tried again as usual."""
    logto = make_logto(tmp_path)

    def register(name: str, error: Callable[[], BaseException], is_async: bool) -> None:
        def handler(event: events.UserCreated) -> None:
            raise error()

        async def awaited(event: events.UserCreated) -> None:
            raise error()

        logto.on("User.Created", name=name, waits=(3600,))(awaited if is_async else handler)

    for (name, (error, *_)), is_async in itertools.product(ODD.items(), (False, True)):
        register(f"{name}, awaited" if is_async else name, error, is_async)

    @logto.on("User.Created", name="good")
    def good(event: events.UserCreated) -> None:
        """Return at once."""

    def are_over(rows: list[JobRow]) -> bool:
        is_over = [row.state != "waiting" or row.failures for row in rows]
        return len(is_over) == len(logto.handlers) and all(is_over)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="first", at=soon()))
        rows = {row.handler: row for row in await until(are_over, logto)}
        assert rows.pop("good").state == "done"
        for name, row in rows.items():
            _, expected, text = ODD[name.removesuffix(", awaited")]
            assert (row.state, row.failures) == expected, (name, row)
            assert text in str(row.error), name
            assert len(str(row.error)) < 10_000
        await send(client, make.user_created(id="second", at=soon()))
        await until(lambda rows: states(rows, "good") == ["done", "done"], logto)

    with caplog.at_level(logging.ERROR):
        live(logto, body)
    assert not caplog.records


_REFUSE: dict[str, list[str]] = {
    "sqlite": [
        "CREATE TRIGGER refuse_text BEFORE UPDATE ON logto_jobs WHEN new.error LIKE '%refused%'"
        " BEGIN SELECT RAISE(ABORT, 'refused'); END",
        "CREATE TRIGGER refuse_all BEFORE UPDATE ON logto_jobs WHEN new.handler = 'rejected'"
        " AND new.error IS NOT NULL BEGIN SELECT RAISE(ABORT, 'refused'); END",
    ],
    "postgresql": [
        "ALTER TABLE {jobs} ADD CONSTRAINT refuse_text CHECK (error NOT LIKE '%refused%')",
        "ALTER TABLE {jobs} ADD CONSTRAINT refuse_all"
        " CHECK (handler <> 'rejected' OR error IS NULL)",
    ],
}
_ACCEPT = [
    "ALTER TABLE {jobs} DROP CONSTRAINT refuse_text",
    "ALTER TABLE {jobs} DROP CONSTRAINT refuse_all",
]


async def execute(logto: LogtoWebhooks, statements: list[str]) -> None:
    jobs = f"{logto.schema}.logto_jobs"

    def run(store: Store) -> None:
        for statement in statements:
            store._connection.execute(sa.text(statement.format(jobs=jobs)))

    await logto.database.host.run(run)


@pytest.mark.postgres
@pytest.mark.parametrize("make_logto", [on_sqlite, lambda folder: on_postgres()])
def test_an_outcome_that_cannot_be_written_holds_up_no_other(
    make_logto: Callable[[Path], LogtoWebhooks], tmp_path: Path
) -> None:
    """Its job fails, and is tried again; if not even that can be written, its lease ends."""
    logto = make_logto(tmp_path)
    gate = asyncio.Event()

    @logto.on("User.Created", name="refused", max_attempts=2, waits=(0,))
    async def refused(event: events.UserCreated) -> None:
        await gate.wait()
        if event.user_id == "u3":
            raise Discard("refused")

    @logto.on("User.Created", name="rejected")
    async def rejected(event: events.UserCreated) -> None:
        await gate.wait()
        if event.user_id == "u5":
            raise LookupError

    @logto.on("User.Created", name="good")
    async def good(event: events.UserCreated) -> None:
        await gate.wait()

    def are_over(rows: list[JobRow]) -> bool:
        return sum(row.state != "waiting" for row in rows) == 29

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await execute(logto, _REFUSE["sqlite" if logto.schema is None else "postgresql"])
        try:
            await check(logto, client)
        finally:
            await execute(logto, [] if logto.schema is None else _ACCEPT)

    async def check(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        users = [make.user_created(id=f"u{number}", at=soon()) for number in range(10)]
        await send(client, *users)
        await until(lambda rows: len(rows) == 30, logto)
        gate.set()
        rows = await until(are_over, logto)
        assert states(rows, "good") == ["done"] * 10
        assert sorted(states(rows, "refused")) == ["dead"] + ["done"] * 9
        assert sorted(states(rows, "rejected")) == ["done"] * 9 + ["waiting"]
        [dead] = [row for row in rows if row.state == "dead"]
        assert (dead.subject, dead.failures) == ("user:u3", 2)
        assert str(dead.error).startswith("Its outcome (discarded) can't be written: ")
        await send(client, make.user_created(id="more", at=soon()))
        await until(lambda rows: states(rows, "good") == ["done"] * 11, logto)

    live(logto, body)
