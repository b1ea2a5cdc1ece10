"""Who was deleted and has memberships to end, on a Connection whose transaction is the caller's."""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks.database.dialect import INSERT, now
from logto_webhooks.database.schema import endings, members
from logto_webhooks.records.ending import Ending
from logto_webhooks.records.record import Key


def note(connection: sa.Connection, ending: Ending) -> None:
    """Keep what is to be done."""
    insert = INSERT[connection.dialect.name](endings).values(
        kind=ending.key.kind,
        logto_id=ending.key.id,
        ended_at=ending.ended_at,
        source=ending.source,
        delivery_id=ending.delivery_id,
        noted_at=now(),
    )
    new = insert.excluded
    newest = sa.case((endings.c.ended_at > new.ended_at, endings.c.ended_at), else_=new.ended_at)
    origin = {
        name: sa.func.coalesce(new[name], endings.c[name]) for name in ("source", "delivery_id")
    }
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["kind", "logto_id"], set_={"ended_at": newest, **origin}
        )
    )


def listed(connection: sa.Connection) -> list[Ending]:
    """All that is to be done, the oldest first."""
    query = sa.select(endings).order_by(endings.c.noted_at, endings.c.kind, endings.c.logto_id)
    return [
        Ending(
            key=Key(row["kind"], row["logto_id"]),
            ended_at=row["ended_at"],
            source=row["source"],
            delivery_id=row["delivery_id"],
        )
        for row in connection.execute(query).mappings()
    ]


def finish(connection: sa.Connection, ending: Ending) -> None:
    """All of it is done, unless it was deleted once more meanwhile."""
    connection.execute(
        sa.delete(endings).where(
            endings.c.kind == ending.key.kind,
            endings.c.logto_id == ending.key.id,
            endings.c.ended_at == ending.ended_at,
        )
    )


def memberships_left(connection: sa.Connection) -> int:
    """Count the rows of members whose user or organization was deleted."""
    left = 0
    for ending in listed(connection):
        column = members.c[f"logto_{ending.key.kind}_id"]
        count = sa.select(sa.func.count()).select_from(members).where(column == ending.key.id)
        left += connection.scalar(count) or 0
    return left
