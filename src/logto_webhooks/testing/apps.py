"""`testing.app(...)`, and the application under test of code that isn't asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from logto_webhooks.core.jobs import JobRow
from logto_webhooks.core.ports import Found, Status, Waiting
from logto_webhooks.core.reports import Report
from logto_webhooks.samples.signed import Signed
from logto_webhooks.service.handlers import Handlers
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.inline import AsyncApp
from logto_webhooks.testing.make import SIGNING_KEY
from logto_webhooks.testing.outcomes import Delivered, Run
from logto_webhooks.testing.stage import in_memory, on_connection

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

    from logto_webhooks.wiring.application import LogtoWebhooks

T = TypeVar("T")


class App:
    """An application under test, over the store in memory unless `testing.app` makes it."""

    def __init__(
        self,
        *,
        keys: Sequence[str] = (SIGNING_KEY,),
        clock: FrozenClock | None = None,
        playing: AsyncApp | None = None,
    ) -> None:
        """`playing` is what it makes usable without `await`."""
        clock = clock or FrozenClock()
        self._app = playing or AsyncApp(in_memory(clock), clock, keys, Handlers(), True)

    @property
    def clock(self) -> FrozenClock:
        """Its clock; `tick` lets time pass."""
        return self._app.clock

    @property
    def reports(self) -> list[Report]:
        """All that observers would have been told."""
        return self._app.reports

    def deliver(self, *deliveries: Signed | Sequence[Signed]) -> Delivered:
        """Receive deliveries, apply what is due, run the handlers; tell what became of the last.

        Raises what a handler raised that wasn't made to fail, unless `raise_errors` is off;
        SettingInvalid for what `testing.make` didn't make; SchemaMismatch.
        """
        return _run(self._app.deliver(*deliveries))

    def work(self) -> list[Run]:
        """Apply all that is due now, and run the handlers of what that brings. Raises as above."""
        return _run(self._app.work())

    def tick(self, seconds: float | None = None) -> list[Run]:
        """Let time pass, by default until the next retry is due, and work. Raises as above."""
        return _run(self._app.tick(seconds))

    def fail(
        self,
        handler: Callable[..., Any] | str,
        error: BaseException | None = None,
        *,
        times: int = 1,
    ) -> None:
        """Let the next calls of a handler, or of that name, raise instead.

        Raises HandlerUnknown, SettingInvalid.
        """
        self._app.fail(handler, error, times=times)

    def status(self) -> Status:
        """Count deliveries and records."""
        return _run(self._app.status())

    def users(self, query: str = "") -> list[Found]:
        """Find users; all of them if nothing is asked for."""
        return _run(self._app.users(query))

    def organizations(self, query: str = "") -> list[Found]:
        """Find organizations; all of them if nothing is asked for."""
        return _run(self._app.organizations(query))

    def waiting(self) -> list[Waiting]:
        """List the records that only Logto can settle."""
        return _run(self._app.waiting())

    def jobs(self) -> list[JobRow]:
        """List the jobs of handlers, the newest first."""
        return _run(self._app.jobs())


@overload
def app(
    logto: LogtoWebhooks,
    connection: sa.Connection | None = None,
    *,
    keys: Sequence[str] = ...,
    clock: FrozenClock | None = ...,
    raise_errors: bool = ...,
) -> App: ...


@overload
def app(
    logto: LogtoWebhooks,
    connection: AsyncConnection,
    *,
    keys: Sequence[str] = ...,
    clock: FrozenClock | None = ...,
    raise_errors: bool = ...,
) -> AsyncApp: ...


def app(
    logto: LogtoWebhooks,
    connection: sa.Connection | AsyncConnection | None = None,
    *,
    keys: Sequence[str] = (SIGNING_KEY,),
    clock: FrozenClock | None = None,
    raise_errors: bool = True,
) -> App | AsyncApp:
    """Make an application under test with the handlers of `logto`.

    All happens on `connection`, in savepoints: who opened it rolls back. It must be of a database
    with our schema. Without one all is in memory, where no handler can ask for a transaction.
    Raises HandlerRefused, SettingInvalid.
    """
    clock = clock or FrozenClock()
    stage = in_memory(clock) if connection is None else on_connection(connection, logto.schema)
    made = AsyncApp(stage, clock, keys, logto.handlers, raise_errors)
    is_awaited = hasattr(connection, "run_sync")
    return made if is_awaited else App(playing=made)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, in a test with or without an event loop. With one it must not wait."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("a handler waits: in an asynchronous test give an AsyncConnection")
