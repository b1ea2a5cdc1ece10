"""Logto's Management API, and what asks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from logto_webhooks.core.ports import Logto, Observer
from logto_webhooks.errors import ApiNotConfigured
from logto_webhooks.service.clocks import clocks
from logto_webhooks.service.person import Sides, both_sides
from logto_webhooks.service.reads import Reads
from logto_webhooks.service.reconcile import Reconciliation
from logto_webhooks.service.recover import Recovery
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.clock import SystemClock
from logto_webhooks.wiring.databases import Database

# Requests a second.
BUDGET: Final = 15.0
# Of Logto Cloud; a Logto of one's own has no limit but its strength.
CLOUD_BUDGET: Final = 20.0
NO_BUDGET: Final = 1_000.0


def api_of(settings: Settings, *, fast: bool = False) -> Logto:
    """Make a client; it connects on first use. `fast` asks as much as Logto allows, unless a
    budget is set. Raises ApiNotConfigured."""
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
    )


def _most(endpoint: str) -> float:
    return CLOUD_BUDGET if endpoint.rstrip("/").endswith(".logto.app") else NO_BUDGET


def reads_of(logto: Logto, database: Database, observe: Observer) -> Reads:
    """Make what asks Logto about what only Logto can tell."""
    return Reads(logto, database.host, SystemClock(), observe)


def reconciliation_of(logto: Logto, database: Database) -> Reconciliation:
    """Make what compares all records with all that Logto lists."""
    return Reconciliation(logto, database.host, SystemClock())


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
    keys = settings.signing_key.split(",")
    return Recovery(
        logto,
        database.host,
        SystemClock(),
        [key.strip() for key in keys if key.strip()],
        settings.public_url,
        stored,
    )
