"""Builds the application: the only place that knows which adapter serves which port."""

from logto_webhooks.wiring.databases import Database, database_of
from logto_webhooks.wiring.service import Service, worker_of

__all__ = ["Database", "Service", "database_of", "worker_of"]
