"""Find which rows have unique values that others want, such as emails that go round."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import encode_id
from logto_webhooks.mapping.declare import EntityMapping, UniqueColumn
from logto_webhooks.mapping.sources import implementation_of
from logto_webhooks.mapping.table_writer import PlannedRow


class Holder(Struct, frozen=True):
    """A row that has a value, by its primary key, and the record whose row it is, if any."""

    row_id: str
    logto_id: str | None


class UniqueValues:
    """The unique columns of one mapping of users or organizations."""

    def __init__(
        self,
        mapping: EntityMapping,
        dialect: str,
        run: Callable[[Any], sa.CursorResult[Any]],
    ) -> None:
        """`run` executes a query on the application's table."""
        self._columns = mapping.list_unique(dialect)
        self._primary_key = mapping.primary_key
        self._key = mapping.key.text
        self._run = run

    @property
    def surely_unique(self) -> list[sa.Column[Any]]:
        """The columns in which two rows never have the same value."""
        return [unique.column for unique in self._columns if unique.is_sure]

    def find_taken(self, plans: Sequence[PlannedRow]) -> dict[str, tuple[str, UniqueColumn]]:
        """Find the rows that want a unique value of another row. Return the primary key of that
        row, and the column."""
        taken: dict[str, tuple[str, UniqueColumn]] = {}
        for unique in self._columns:
            column = unique.column
            wanted = {
                value: plan
                for plan in plans
                if isinstance(value := plan.values.get(column.key), Hashable) and value is not None
            }
            if not wanted:
                continue
            query = sa.select(*self._primary_key, column).where(column.in_(list(wanted)))
            if unique.condition is not None:
                query = query.where(unique.condition)
            for row in self._run(query):
                key, value = tuple(row)[:-1], row[-1]
                plan = wanted.get(value)
                if plan is not None and key != plan.primary_key:
                    taken.setdefault(plan.logto_id, (encode_id(key), unique))
        return taken

    def find_holder(self, plan: PlannedRow) -> Holder | None:
        """Find another row that has a unique value which this one wants."""
        for unique in self._columns:
            value = plan.values.get(unique.column.key)
            if value is None:
                continue
            has_value = unique.column == value
            if unique.by_expression and isinstance(value, str):  # mostly of lower(email)
                has_value = sa.func.lower(unique.column) == value.lower()
            query = sa.select(*self._primary_key, self._key).where(has_value)
            if unique.condition is not None:
                query = query.where(unique.condition)
            for row in self._run(query):
                if tuple(row)[:-1] != plan.primary_key:
                    return Holder(encode_id(tuple(row)[:-1]), row[-1])
        return None

    def replace_values(
        self, plan: PlannedRow, make_value: Callable[[sa.Column[Any], str], Any]
    ) -> dict[str, Any]:
        """Return other values for the unique columns of a row that is to be updated, so that those
        which it has now are free."""
        if plan.action != "update":
            return {}
        columns = [unique.column for unique in self._columns]
        return {
            column.key: make_value(column, plan.logto_id)
            for column in columns
            if column.key in plan.values
        }


def make_placeholder(column: sa.Column[Any], logto_id: str) -> Any:
    """Return a value that nobody else has, and that most checks of emails accept. With ON UPDATE
    CASCADE, other rows get it, too."""
    own_type = implementation_of(column.type)
    if isinstance(own_type, sa.Integer):
        return -1 - zlib.crc32(logto_id.encode()) % 2**31
    if not isinstance(own_type, sa.String):
        return None
    return f"~{logto_id}@x.invalid" if "email" in column.key.lower() else f"~{logto_id}"


def make_null(column: sa.Column[Any], logto_id: str) -> None:
    """Return null, which a constraint may take that refuses a placeholder."""
