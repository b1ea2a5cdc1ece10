"""Builds the application: the only place that knows which adapter serves which port."""

from logto_webhooks.wiring.api import api_of, reconciliation_of, recovery_of, sides_of
from logto_webhooks.wiring.databases import (
    Database,
    database_for,
    database_of,
    for_another_loop,
    status_of,
)
from logto_webhooks.wiring.service import Service, Workers, worker_of
from logto_webhooks.wiring.spool import spool_of, unspooling

__all__ = [
    "Database",
    "Service",
    "Workers",
    "api_of",
    "database_for",
    "database_of",
    "for_another_loop",
    "reconciliation_of",
    "recovery_of",
    "sides_of",
    "spool_of",
    "status_of",
    "unspooling",
    "worker_of",
]
