"""Checkpoints of long work."""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks.database.dialect import INSERT
from logto_webhooks.database.schema import progress
from logto_webhooks.interfaces import Progress


def read_checkpoint(connection: sa.Connection, name: str) -> Progress | None:
    """Return how far the work of that name has come; None if it never began."""
    row = connection.execute(
        sa.select(progress.c.at, progress.c.count).where(progress.c.name == name)
    ).one_or_none()
    return row and Progress(*row)


def write_checkpoint(connection: sa.Connection, name: str, reached: Progress) -> None:
    """Keep how far it has come."""
    insert = INSERT[connection.dialect.name](progress)
    values = {"at": reached.at, "count": reached.count}
    connection.execute(
        insert.values(name=name, **values).on_conflict_do_update(
            index_elements=["name"], set_=values
        )
    )
