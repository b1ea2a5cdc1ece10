"""What a database says of itself, on a Connection whose transaction is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import sqlalchemy as sa

from logto_webhooks.adapters.stores import migrate
from logto_webhooks.adapters.stores.dialect import now
from logto_webhooks.adapters.stores.schema import records
from logto_webhooks.core.doctor.here import Premises

_SETTINGS: Final = sa.text(
    "SELECT name, setting FROM pg_settings WHERE name IN "
    "('fsync', 'full_page_writes', 'synchronous_commit', 'transaction_read_only')"
)


def look(
    place: str, free: int | None = None, schema: str | None = None
) -> Callable[[sa.Connection], Premises]:
    """Return what looks: `place` names the database, `free` bytes are where its file is."""
    return partial(_look, place, free, schema)


def _look(place: str, free: int | None, schema: str | None, connection: sa.Connection) -> Premises:
    found, needed = migrate.version(connection, schema), migrate.head()
    settings: dict[str, str] = {}
    if connection.dialect.name == "postgresql":
        settings = {row.name: row.setting for row in connection.execute(_SETTINGS)}
    return Premises(
        place=place,
        schema=found,
        needed=needed,
        settings=settings,
        free=free,
        unsettled_s=_unsettled_s(connection) if found and found >= needed else None,
    )


def _unsettled_s(connection: sa.Connection) -> float | None:
    since = connection.scalar(sa.select(sa.func.min(records.c.refetch_since)))
    moment = connection.scalar(sa.select(now())) or 0
    return None if since is None else max(0, moment - since) / 1000
