"""What is known from the earlier transactions of a run over all records.

A rehearsal rolls each transaction back, so it remembers here what the database would know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec
from msgspec import Struct


class SeenRows(Struct):
    """The existing rows that records could be linked to, by their hashes, which need little memory;
    and the records that can be linked when all are compared."""

    wanted: dict[int, int] = {}  # by whom
    shared: set[int] = set()
    records: list[str] = []

    def note(self, row_id: str, logto_ids: Sequence[str]) -> None:
        """Note that these records could be linked to a row. A page may be tried again."""
        row = hash(row_id)
        first = self.wanted.setdefault(row, hash(logto_ids[0]))
        if any(hash(logto_id) != first for logto_id in logto_ids):
            self.shared.add(row)

    def is_shared(self, row_id: str) -> bool:
        """Whether several records could be linked to a row."""
        return hash(row_id) in self.shared


class ApplyRun(Struct):
    """A run over all records, in several transactions.

    With `allows_deletions`, any number of rows is deleted. `deletions` are the records of each
    mapping whose rows would be deleted, and `excluded` counts those that get no row. A run that
    `rehearses` also remembers which rows can be linked, which unique values its rows have, and
    which users, organizations and members would get a row.
    """

    rehearses: bool = False
    excluded: Counter[str] = msgspec.field(default_factory=Counter)
    allows_deletions: bool = False
    deletions: dict[str, set[str]] = {}
    rows: dict[str, SeenRows] = {}
    values: dict[str, dict[int, str]] = {}
    parents: set[int] = set()

    def find_rows(self, mapping: str) -> SeenRows:
        """Return the rows of a mapping that records could be linked to."""
        return self.rows.setdefault(mapping, SeenRows())

    def is_claimed(self, column: str, value: Any, logto_id: str) -> bool:
        """Whether the row of another record would have a unique value by now."""
        if not isinstance(value, Hashable):
            return False
        claims = self.values.get(column, {})
        return claims.get(hash(value), logto_id) != logto_id

    def claim(self, column: str, value: Any, logto_id: str) -> None:
        """Note that the row of a record would have a unique value."""
        if value is not None and isinstance(value, Hashable):
            self.values.setdefault(column, {})[hash(value)] = logto_id

    def note_parent(self, name: str, *, is_written: bool) -> None:
        """Note whether a user, an organization or a member, named as states name it, would get a
        row."""
        if is_written:
            self.parents.add(hash(name))
        else:
            self.parents.discard(hash(name))

    def has_parent(self, name: str | None) -> bool:
        """Whether a user, an organization or a member would have got a row by now."""
        return name is not None and hash(name) in self.parents
