"""Logto's Management API, and what asks it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from math import inf
from typing import Final

from logto_webhooks.core.events.local import Source
from logto_webhooks.core.ports import Logto, Observer
from logto_webhooks.errors import ApiNotConfigured
from logto_webhooks.service.clocks import clocks
from logto_webhooks.service.person import Sides, both_sides
from logto_webhooks.service.reads import Reads
from logto_webhooks.service.reconcile import Reconciliation
from logto_webhooks.service.recover import Recovery
from logto_webhooks.service.turn import Turn
from logto_webhooks.settings import Settings, split_keys
from logto_webhooks.wiring.clock import SystemClock
from logto_webhooks.wiring.databases import Database

# Requests a second.
BUDGET: Final = 15.0
# Of Logto Cloud; a Logto of one's own has no limit but its strength.
CLOUD_BUDGET: Final = 20.0
NO_BUDGET: Final = 1_000.0


def api_of(settings: Settings, *, fast: bool = False, longest_wait_s: float = inf) -> Logto:
    """Make a client; it connects on first use. `fast` asks as much as Logto allows, unless a
    budget is set; what fails is tried again after `longest_wait_s` at most. Raises
    ApiNotConfigured."""
    if not (settings.endpoint and settings.app_id and settings.app_secret):
        raise ApiNotConfigured()
    # Here, for it needs the extra `api`, which a service without credentials doesn't.
    from logto_webhooks.adapters.management import Management

    return Management(
        settings.endpoint,
        settings.app_id,
        settings.app_secret,
        now=SystemClock(),
        resource=settings.api_resource,
        budget=settings.api_budget or (_most(settings.endpoint) if fast else BUDGET),
        sleep=lambda seconds: asyncio.sleep(min(seconds, longest_wait_s)),
    )


def _most(endpoint: str) -> float:
    return CLOUD_BUDGET if endpoint.rstrip("/").endswith(".logto.app") else NO_BUDGET


@contextlib.asynccontextmanager
async def asking(
    settings: Settings,
    logto: Logto,
    database: Database,
    observe: Observer,
    stored: Callable[[], None],
) -> AsyncIterator[None]:
    """Recover, settle what waits, and compare, as long as the block lasts and it is our turn."""
    recovery = recovery_of(settings, logto, database, stored)
    reads = Reads(logto, database.host, observe)
    reconciliation = reconciliation_of(logto, database)

    async def ask() -> None:
        async with asyncio.TaskGroup() as loops:
            loops.create_task(recovery.keep(settings.recover_every_s, observe))
            loops.create_task(reads.keep())
            if settings.reconcile_every_s:
                loops.create_task(reconciliation.keep(settings.reconcile_every_s, observe))

    turn = Turn(database.host, SystemClock(), random.getrandbits(62))
    asked = asyncio.create_task(turn.keep(ask, observe))
    try:
        yield
    finally:
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await logto.close()


def reconciliation_of(
    logto: Logto, database: Database, source: Source | None = "reconcile"
) -> Reconciliation:
    """Make what compares all records with all that Logto lists; without a `source` no handler is
    told."""
    return Reconciliation(logto, database.host, SystemClock(), source)


async def sides_of(logto: Logto, database: Database, user_id: str) -> Sides:
    """Compare one user here and at Logto. Raises AnswerMalformed, LogtoUnreachable,
    LogtoRefused, StoreUnavailable."""
    host = database.host
    return await both_sides(logto, host, user_id, await clocks(host))


def recovery_of(
    settings: Settings,
    logto: Logto,
    database: Database,
    stored: Callable[[], None] = lambda: None,
) -> Recovery:
    """Make what brings back from Logto's log what the inbox lacks."""
    return Recovery(
        logto,
        database.host,
        SystemClock(),
        keys_of(settings),
        settings.public_url,
        stored,
    )


def keys_of(settings: Settings) -> list[str]:
    """The signing keys, if there are any."""
    return list(split_keys(settings.signing_key))
