"""Decide whether a delivery that arrives now could be stored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from logto_webhooks.clock import Clock
from logto_webhooks.database.checkpoints import Checkpoint
from logto_webhooks.database.store import Store, TransactionRunner
from logto_webhooks.errors import LogtoWebhooksError, StoreUnavailable, describe

TRY_EVERY_S: Final = 1.0
TRY_S: Final = 3.0
DISTRUST_S: Final = 10.0
_NAME: Final = "ready"


class Commits(Protocol):
    """How storing deliveries went: `error` while it fails, `failed_at` by the loop's clock."""

    @property
    def error(self) -> Exception | None:
        """Why the last batch wasn't stored; None if it was."""

    @property
    def failed_at(self) -> float:
        """When that was."""

    @property
    def stored_at(self) -> float:
        """When the last batch was stored."""


class Readiness:
    """Looks at the database, writes to it, and remembers the result for a moment.

    A balancer that is told 503 sends nothing here any more, so deliveries alone can't tell when the
    database is well again. A small write can succeed where a delivery fails: for a while after a
    failure, that failure counts.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[None]],
        host: TransactionRunner,
        clock: Clock,
        commits: Commits,
    ) -> None:
        """`look` raises what is wrong with the database, without writing."""
        self._look = look
        self._host = host
        self._clock = clock
        self._commits = commits
        self._tried_at = float("-inf")
        self._error: LogtoWebhooksError | None = None

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch if nothing can be stored."""
        now = asyncio.get_running_loop().time()
        error = self._commits.error
        if error is not None and now - self._commits.failed_at < DISTRUST_S:
            if isinstance(error, LogtoWebhooksError):
                raise error
            raise StoreUnavailable(problem=describe(error))
        if now - self._tried_at >= TRY_EVERY_S:
            self._tried_at = now
            self._error = await self._try()
        if self._error is not None and self._commits.stored_at < self._tried_at:
            raise self._error

    async def _try(self) -> LogtoWebhooksError | None:
        try:
            await self._look()
            await asyncio.wait_for(self._host.run(self._write), TRY_S)
        except LogtoWebhooksError as error:
            return error
        except TimeoutError:
            return StoreUnavailable(problem=f"nothing could be written within {TRY_S:g} s")
        return None

    def _write(self, store: Store) -> None:
        store.save_checkpoint(_NAME, Checkpoint(self._clock.now(), 0))
