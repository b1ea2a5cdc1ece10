"""Load the application's own objects of an event's user and organization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.store import Store
from logto_webhooks.errors import Discard, RowWaits
from logto_webhooks.handlers.parameters import ParameterSource
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.own_rows import (
    OwnRow,
    describe_several_rows,
    find_own_row,
    select_own,
)

_NO_ROW: Final = "it has no row in {}: {}"


class WantedObject(Struct, frozen=True):
    """The object that a parameter gets, before it is loaded: that of the record `logto_id`."""

    parameter: ParameterSource
    mapping: EntityMapping
    logto_id: str


class ObjectQuery(Struct, frozen=True):
    """A query for an object that is probably there; else it waits for the `reason`, unless the
    record was deleted in Logto: then no row is written again."""

    statement: sa.Select[Any]
    wanted: WantedObject
    reason: str
    is_deleted: bool

    def check(self, objects: Sequence[Any]) -> Any:
        """Return the object, or None if there is none and the parameter may be None. Raises
        RowWaits, also if there are several, or Discard if there will be none."""
        mapping = self.wanted.mapping
        if len(objects) > 1:
            raise RowWaits(table=mapping.name, reason=describe_several_rows(mapping))
        if objects or self.wanted.parameter.may_be_none:
            return objects[0] if objects else None
        if self.is_deleted:
            raise Discard(_NO_ROW.format(mapping.name, f"the {mapping.kind} was deleted in Logto"))
        raise RowWaits(table=mapping.name, reason=self.reason)


def find_wanted(arguments: Mapping[str, Any]) -> dict[str, WantedObject]:
    """Return the arguments that have to be loaded."""
    return {name: value for name, value in arguments.items() if isinstance(value, WantedObject)}


def find_own_rows(store: Store, wanted: Mapping[str, WantedObject]) -> dict[str, OwnRow]:
    """Find out about the own row of each parameter's object."""
    return {
        name: find_own_row(store.connection, each.mapping, each.logto_id)
        for name, each in wanted.items()
    }


def make_query(wanted: WantedObject, row: OwnRow) -> ObjectQuery | None:
    """Return the query for an object; None if the parameter gets None.

    Raises RowWaits if the row has yet to be written, and Discard if it never will be.
    """
    table = wanted.mapping.name
    if row.state == "here":
        target = wanted.parameter.types[0]
        statement = select_own(wanted.mapping, target, wanted.logto_id, row)
        return ObjectQuery(statement, wanted, row.reason, row.is_deleted)
    if wanted.parameter.may_be_none and (row.state == "absent" or not row.is_known):
        return None
    if row.state == "waits":
        raise RowWaits(table=table, reason=row.reason)
    raise Discard(_NO_ROW.format(table, row.reason))


def load(queries: Mapping[str, ObjectQuery], session: Any) -> dict[str, Any]:
    """Load objects in a Session. Raises RowWaits, Discard."""
    # A relationship that is loaded by a join repeats rows.
    return {
        name: query.check(session.scalars(query.statement).unique().fetchmany(2))
        for name, query in queries.items()
    }


async def load_async(queries: Mapping[str, ObjectQuery], session: Any) -> dict[str, Any]:
    """The same in an AsyncSession."""
    return {
        name: query.check((await session.scalars(query.statement)).unique().fetchmany(2))
        for name, query in queries.items()
    }
