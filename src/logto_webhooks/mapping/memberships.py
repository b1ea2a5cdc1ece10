"""When a user or an organization gets a row, the rows of its memberships and their roles follow.

Their states don't tell which ones these are: a membership whose user is excluded has no state. So
the mirror's memberships are looked at, whatever made the row appear. Those of an end with many are
looked at later, in steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import sqlalchemy as sa

from logto_webhooks.database.dialect import among
from logto_webhooks.database.schema import members
from logto_webhooks.records.record import Key, Kind, membership

FEW: Final = 1_000  # memberships that are written in the transaction of their ends' rows


def split_by_size(connection: sa.Connection, ends: Collection[Key]) -> tuple[set[Key], list[Key]]:
    """Return the memberships of ends that together have few, and the ends that have more."""
    few: set[Key] = set()
    many: list[Key] = []
    for kind in ("organization", "user"):
        of_kind = sorted(end for end in ends if end.kind == kind)
        if not of_kind:
            continue
        of, _ = _columns_of(kind)
        query = sa.select(*_PAIR).where(among(of, "ids")).limit(FEW + 1)
        rows = connection.execute(query, {"ids": [end.id for end in of_kind]})
        pairs = [membership(*row) for row in rows]
        if len(pairs) + len(few) <= FEW:  # the usual case
            few.update(pairs)
            continue
        for end in of_kind:
            pairs = list_memberships(connection, end, FEW + 1)
            if len(pairs) + len(few) <= FEW:
                few.update(pairs)
            else:
                many.append(end)
    return few, many


def list_memberships(connection: sa.Connection, end: Key, limit: int, after: str = "") -> list[Key]:
    """List the next memberships of a user or an organization. `after` is the id of the other end of
    the last one."""
    of, other = _columns_of(end.kind)
    query = sa.select(*_PAIR).where(of == end.id, other > after).order_by(other).limit(limit)
    return [membership(*row) for row in connection.execute(query)]


def find_other_end(end: Key, pair: Key) -> Key:
    """Return the other end of a membership."""
    organization, user = pair.organization_and_user
    return user if end.kind == "organization" else organization


_PAIR: Final = (members.c.logto_organization_id, members.c.logto_user_id)


def _columns_of(kind: Kind) -> Sequence[sa.Column[Any]]:
    return _PAIR if kind == "organization" else _PAIR[::-1]
