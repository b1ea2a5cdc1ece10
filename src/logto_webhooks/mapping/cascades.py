"""Find what foreign keys do to mapped rows when other mapped rows are deleted, or change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.references import (
    Reference,
    enforces_references,
    find_name,
    read_references,
)

OneMapping = EntityMapping | PairMapping

_CASCADE: Final = "CASCADE"
_DELETING: Final = f"ON DELETE {_CASCADE}"
_EMPTYING: Final = ("SET NULL", "SET DEFAULT")
_DEFAULT_SCHEMAS: Final = (None, "public", "main")  # one object may name it, and another not
_ENDS: Final = frozenset({"organization", "user"})


class Harm(Struct, frozen=True):
    """What an `action` of a foreign key does to rows of a mapping with those of a `parent`: it
    deletes them, although their own records still exist, or it changes whose they are."""

    mapping: OneMapping
    columns: tuple[str, ...]
    action: str
    parent: OneMapping

    @property
    def deletes(self) -> bool:
        """Whether rows are deleted."""
        return self.action == _DELETING


def check_cascades(mappings: Sequence[OneMapping]) -> None:
    """Check that deleting a row of one table deletes none of another, whose user, organization or
    membership still exists, and that the database changes no key before we know it. Raises
    InvalidMapping."""
    mapped = {name_declared(mapping.table): mapping for mapping in mappings}
    references = list_declared([mapping.table for mapping in mappings])
    for harm in Cascades(references, mapped).list_harms():
        raise InvalidMapping(table=harm.mapping.name, problem=explain_harm(harm))


def read_cascades(connection: sa.Connection, mappings: Sequence[OneMapping]) -> Cascades:
    """Read what the database's foreign keys do to the rows of mappings."""
    mapped = {
        name: mapping
        for mapping in mappings
        if (name := find_name(connection, mapping.table)) is not None
    }
    references = read_references(connection) if enforces_references(connection) else []
    if connection.dialect.name == "sqlite":
        references = [
            replace(own, child=own.child.lower(), parent=own.parent.lower()) for own in references
        ]
    return Cascades(references, mapped)


class Cascades:
    """What foreign keys do to the rows of `mapped` tables, which are called as in the references.

    It is followed from each table upwards to the tables to which it refers.
    """

    def __init__(self, references: Iterable[Reference], mapped: Mapping[str, OneMapping]) -> None:
        self._mapped = mapped
        self._by_child: dict[str, list[Reference]] = {}
        for reference in references:
            self._by_child.setdefault(reference.child, []).append(reference)

    def list_harms(self) -> Iterator[Harm]:
        """List what foreign keys do to rows that they shouldn't."""
        for table, mapping in self._mapped.items():
            kinds = {}
            if isinstance(mapping, PairMapping):
                kinds = {end.column.name.lower(): end.kind for end in mapping.ends}
            for reference in self._list_cascading(table):
                parent = self._find_other(reference, kinds, set())
                if parent is not None:
                    yield Harm(mapping, reference.columns, _DELETING, parent)
            if isinstance(mapping, EntityMapping):
                key = mapping.key.column.name
                for reference, action, parent in self._list_changes(table, key, set()):
                    yield Harm(mapping, reference.columns, action, parent)

    def list_emptied(self) -> Iterator[Harm]:
        """List the foreign keys that empty the columns which say whose a membership or a role is,
        although they aren't declared so: such rows aren't found again."""
        for table, mapping in self._mapped.items():
            ends = mapping.ends if isinstance(mapping, PairMapping) else ()
            for end in ends:
                declared = {(key.ondelete or "").upper() for key in end.column.foreign_keys}
                for reference in self._by_child.get(table, ()):
                    names, parent = reference.columns, self._mapped.get(reference.parent)
                    empties = reference.on_delete in _EMPTYING and end.column.name in names
                    if empties and parent is not None and reference.on_delete not in declared:
                        yield Harm(mapping, names, f"ON DELETE {reference.on_delete}", parent)

    def _list_changes(
        self, table: str, column: str, passed: set[object]
    ) -> Iterator[tuple[Reference, str, OneMapping]]:
        """List the foreign keys that change a column with rows of mapped tables, and how."""
        if (table, column) in passed:
            return
        passed.add((table, column))
        for reference in self._by_child.get(table, ()):
            columns = [name.lower() for name in reference.columns]
            if column.lower() not in columns:
                continue
            if reference.on_delete in _EMPTYING:
                parent = self._find_other(reference, {}, set())
                if parent is not None:
                    yield reference, f"ON DELETE {reference.on_delete}", parent
            if reference.on_update in (_CASCADE, *_EMPTYING):
                referred = reference.referred[columns.index(column.lower())]
                parent = self._find_changing(reference.parent, referred, passed)
                if parent is not None:
                    yield reference, f"ON UPDATE {reference.on_update}", parent

    def _find_changing(self, table: str, column: str, passed: set[object]) -> OneMapping | None:
        """Return the mapping with whose rows a column of a table changes."""
        mapping = self._mapped.get(table)
        if isinstance(mapping, EntityMapping) and column.lower() in _list_cleared(mapping):
            return mapping
        changes = self._list_changes(table, column, passed)
        return next((parent for _, _, parent in changes), None)

    def _find_other(
        self, reference: Reference, kinds: Mapping[str, str], passed: set[object]
    ) -> OneMapping | None:
        """Return the mapping with whose rows those would be deleted that refer to them, also by way
        of tables that aren't mapped. `kinds` says whose the values in some columns are: with the
        row of its own user, organization or membership, a row may go."""
        pairs = zip(reference.columns, reference.referred, strict=True)
        told = {
            referred.lower(): kinds[column.lower()]
            for column, referred in pairs
            if column.lower() in kinds
        }
        parent = self._mapped.get(reference.parent)
        if parent is not None:  # and what it refers to is checked for itself
            return parent if _deletes(parent) and not _is_own(parent, told.values()) else None
        here = (reference.parent, frozenset(told.items()))
        if here in passed:
            return None
        passed.add(here)
        others = (
            self._find_other(upper, told, passed)
            for upper in self._list_cascading(reference.parent)
        )
        return next((other for other in others if other is not None), None)

    def _list_cascading(self, table: str) -> list[Reference]:
        return [own for own in self._by_child.get(table, ()) if own.on_delete == _CASCADE]


def list_declared(tables: Collection[sa.Table]) -> list[Reference]:
    """List the foreign keys that do something, of tables, of all that the application declares
    beside them, and of those to which they refer, with another base or from a file."""
    known = dict.fromkeys(tables)
    for metadata in {id(table.metadata): table.metadata for table in tables}.values():
        known |= dict.fromkeys(metadata.tables.values())
    references: dict[Reference, None] = {}  # there may be several objects for one table
    found = list(known)
    for table in found:  # which grows
        for constraint in table.foreign_key_constraints:
            on_delete, on_update = map(_read_action, (constraint.ondelete, constraint.onupdate))
            if not (on_delete or on_update):
                continue
            targets = [_find_target(key) for key in constraint.elements]
            reference = Reference(
                child=name_declared(table),
                columns=tuple(key.parent.name for key in constraint.elements),
                parent=targets[0].name,
                referred=tuple(target.column for target in targets),
                on_delete=on_delete,
                on_update=on_update,
            )
            references[reference] = None
            referred = targets[0].table
            if referred is not None and referred not in known:
                known[referred] = None
                found.append(referred)
    return sorted(references, key=lambda own: (own.child, own.columns, own.parent))


def _read_action(action: str | None) -> str:
    """Return what a foreign key does; "" for NO ACTION and the like."""
    words = (action or "").upper()
    return words if words in (_CASCADE, *_EMPTYING) else ""


def name_declared(table: sa.Table) -> str:
    """Name a table so that several objects for it, from code or from a file, are one."""
    return _name(table.schema, table.name)


class _Target(NamedTuple):
    """To what a foreign key refers. `table` is None if SQLAlchemy doesn't know it."""

    name: str
    column: str
    table: sa.Table | None = None


def _find_target(key: sa.ForeignKey) -> _Target:
    try:
        column = key.column
    except sa.exc.NoReferenceError:
        place, _, name = key.target_fullname.rpartition(".")
        schema, _, table_name = place.rpartition(".")
        table = key.parent.table
        if not schema and isinstance(table, sa.Table):
            schema = table.metadata.schema or ""
        return _Target(_name(schema or None, table_name), name)
    table = column.table
    assert isinstance(table, sa.Table)
    return _Target(name_declared(table), column.name, table)


def _name(schema: str | None, name: str) -> str:
    return name if schema in _DEFAULT_SCHEMAS else f"{schema}.{name}"


def _deletes(mapping: OneMapping) -> bool:
    """Whether rows are deleted when their records are."""
    return isinstance(mapping, PairMapping) or mapping.when_deleted == "delete"


def _is_own(parent: OneMapping, kinds: Collection[str]) -> bool:
    """Whether rows are over with those of a parent, if columns hold whose they are: those of a
    user, of an organization, or of a member."""
    if isinstance(parent, EntityMapping):
        return parent.kind in kinds
    return parent.pair == "member" and ("member" in kinds or _ENDS.issubset(kinds))


def _list_cleared(mapping: EntityMapping) -> set[str]:
    """List the columns to which others can refer, and that change when a record is deleted."""
    if mapping.when_deleted == "unlink":
        return {mapping.key.column.name.lower()}
    set_ = mapping.when_deleted if isinstance(mapping.when_deleted, dict) else ()
    return {mapping.table.c[name].name.lower() for name in set_}


def describe_in_database(harm: Harm) -> str:
    """Say what a foreign key of the database does."""
    name, parent = harm.mapping.name, harm.parent.name
    subject = f"{harm.action} on {name} ({', '.join(harm.columns)})"
    if harm.deletes:
        return (
            f"{subject} deletes rows with those of {parent}, although their own records still exist"
        )
    if isinstance(harm.mapping, EntityMapping):
        kind = harm.mapping.kind
        return f"{subject} changes keys with rows of {parent}, so a deleted {kind}'s row stays"
    return f"{subject} leaves rows without their row of {parent}, so they are never deleted"


def explain_harm(harm: Harm) -> str:
    """Say what is wrong, and what to do."""
    names, parent = ", ".join(harm.columns), harm.parent.name
    if not harm.deletes:
        return (
            f"because of {harm.action} on {names}, the database would change a row's key together "
            f"with a row of {parent}, and the row would stay, with a deleted {harm.mapping.kind}'s "
            "data: drop this action"
        )
    needed_columns = {column.name for column in harm.mapping.table.c if not column.nullable}
    if isinstance(harm.mapping, PairMapping):  # a row without its user would be nobody's
        needed_columns |= {end.column.name for end in harm.mapping.ends}
    can_be_null = needed_columns.isdisjoint(harm.columns)
    advice = "use ON DELETE SET NULL" if can_be_null else "drop this action"
    if isinstance(harm.parent, EntityMapping):
        needed = f"if rows of {parent} needn't be deleted"
        advice = f"{advice}, or another when_deleted, {needed}"
    return (
        f"because of {harm.action} on {names}, a row would also be deleted when one of {parent} "
        f"is, although its own record still exists: {advice}"
    )
