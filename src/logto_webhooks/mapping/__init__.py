"""The application's own tables, kept equal to the mirror in the same transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import RegisteredMapping, RowState
from logto_webhooks.database.sessions import APP_SCHEMAS
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.declare import EntityMapping, MappedKind, MemberMapping
from logto_webhooks.mapping.deletions import (
    Deletions,
    Stop,
    find_unready_ends,
    name_departure,
    stop_for_end,
)
from logto_webhooks.mapping.entity_writer import EntityWriter
from logto_webhooks.mapping.member_writer import MemberWriter, blocker
from logto_webhooks.mapping.mirror import read_members
from logto_webhooks.mapping.table_writer import PlannedRow
from logto_webhooks.records.record import Key


class Mappings:
    """The mappings of an application."""

    def __init__(self) -> None:
        self.entities: list[EntityMapping] = []
        self.members: list[MemberMapping] = []

    def __bool__(self) -> bool:
        return bool(self.entities or self.members)

    def add(self, mapping: EntityMapping | MemberMapping) -> None:
        """Register a mapping. Raises InvalidMapping."""
        if any(other.table is mapping.table for other in self.all):
            raise InvalidMapping(table=mapping.name, problem="it is mapped already")
        if isinstance(mapping, EntityMapping):
            self.entities.append(mapping)
        else:
            self.members.append(mapping)

    @property
    def all(self) -> list[EntityMapping | MemberMapping]:
        """All mappings: memberships last, because they wait for the others."""
        return [*self.entities, *self.members]

    def find_entity(self, target: Any) -> EntityMapping | None:
        """Find the mapping of users or organizations onto a class; None if it isn't mapped."""
        table = getattr(sa.inspect(target, raiseerr=False), "local_table", None)
        targets = [target] if table is None else [target, table]
        for mapping in self.entities:
            if any(mapping.target is known for known in targets):
                return mapping
        return None

    @property
    def registered(self) -> Sequence[RegisteredMapping]:
        """The mappings as other processes know them."""
        return [
            RegisteredMapping(name=mapping.name, kind=mapping.kind, definition=mapping.definition)
            for mapping in self.all
        ]

    def find_current(self, registered: Mapping[str, RegisteredMapping]) -> set[str]:
        """Return the names of the mappings that say what the registered ones do. A process with an
        older release must not write what a newer one wrote."""
        return {
            mapping.name
            for mapping in self.registered
            if mapping.name in registered
            and registered[mapping.name].definition == mapping.definition
        }

    def make_writer(
        self,
        connection: sa.Connection,
        mapping: EntityMapping | MemberMapping,
        deletions: Deletions | None = None,
    ) -> EntityWriter | MemberWriter:
        """Make the writer of a mapping's rows."""
        schemas = connection.get_execution_options().get(APP_SCHEMAS)
        if isinstance(mapping, EntityMapping):
            return EntityWriter(connection, mapping, schemas, deletions)
        return MemberWriter(connection, mapping, self.entities, schemas, deletions)

    def write(
        self,
        connection: sa.Connection,
        keys: Collection[Key],
        registered: Mapping[str, RegisteredMapping],
        tell: Callable[[str, PlannedRow, RowState], None] | None = None,
        deletions: Deletions | None = None,
    ) -> set[str]:
        """Write the rows of changed records, which are locked: memberships that are over leave
        first, then users and organizations, then memberships that are present.

        Return the names of the mappings that were written. The others are registered differently.
        `tell` gets the name of a mapping, what was planned for a record, and what became of it.
        `deletions` are those of earlier transactions.

        Raises StoreUnavailable.
        """
        current = self.find_current(registered)
        schemas = connection.get_execution_options().get(APP_SCHEMAS)
        entity_writers = [
            EntityWriter(connection, mapping, schemas, deletions)
            for mapping in self.entities
            if mapping.name in current
        ]
        writers = [
            MemberWriter(connection, mapping, self.entities, schemas, deletions)
            for mapping in self.members
            if mapping.name in current
        ]
        pairs = {key for key in keys if key.kind == "membership"}
        present = read_members(connection, pairs) if pairs and writers else {}
        over = pairs - present.keys()
        over |= self._delete_members(connection, writers, entity_writers, keys, over)
        ends = {end for pair in over for end in pair.organization_and_user}
        changed: list[str] = []
        for entity_writer in entity_writers:
            changed += self._write_entities(entity_writer, entity_writer.kind, keys, ends)
        for writer in writers:
            waiting = set(writer.find_waiting(changed)) - present.keys() if changed else set()
            members = present | (read_members(connection, waiting) if waiting else {})
            writer.attempt(partial(writer.write, members), sorted(pair.id for pair in members))
        if tell is not None:
            for any_writer in (*entity_writers, *writers):
                for plan, state in any_writer.results:
                    tell(any_writer.name, plan, state)
        return current

    def _delete_members(
        self,
        connection: sa.Connection,
        writers: Sequence[MemberWriter],
        entity_writers: Sequence[EntityWriter],
        keys: Collection[Key],
        over: Collection[Key],
    ) -> set[Key]:
        """Delete the rows of memberships that are over, and of those that waited for one of the
        users and organizations to be deleted. Return these, too. A row stays as long as the row of
        its user or organization does."""
        ends = [key for key in keys if key.kind != "membership"]
        departures = [name_departure(end) for end in ends]
        deleted = set(over)
        for writer in writers:
            waiting = set(writer.find_waiting(departures)) if departures else set()
            if waiting:
                waiting -= read_members(connection, waiting).keys()
            if mine := waiting.union(over):
                stops = self._find_stops(connection, entity_writers, ends, mine)
                write = partial(writer.delete, stops)
                writer.attempt(write, sorted(pair.id for pair in mine))
            deleted |= waiting
        return deleted

    @staticmethod
    def _find_stops(
        connection: sa.Connection,
        writers: Sequence[EntityWriter],
        changed: Collection[Key],
        pairs: Collection[Key],
    ) -> dict[Key, Stop]:
        """Find the users and organizations of memberships whose rows aren't deleted now."""
        ends = {end for pair in pairs for end in pair.organization_and_user}
        stops = find_unready_ends(connection, ends)
        for writer in writers:
            ids = [end.id for end in ends if end.kind == writer.kind]
            now = [end.id for end in ends.intersection(changed) if end.kind == writer.kind]
            stopped = writer.find_held(set(ids).difference(now)) | writer.find_stopped(now)
            for id_, stop in stopped.items():
                end = Key(writer.kind, id_)
                stops.setdefault(end, stop_for_end(end, stop))
        return stops

    def _write_entities(
        self,
        writer: EntityWriter,
        kind: MappedKind,
        keys: Collection[Key],
        ends: Collection[Key],
    ) -> list[str]:
        """Write users or organizations; return those for which memberships may have waited."""
        ids = {key.id for key in keys if key.kind == kind}
        # A row that memberships referred to couldn't be deleted before.
        if of_kind := [end.id for end in ends if end.kind == kind and end.id not in ids]:
            ids.update(writer.find_unsettled(of_kind))
        if ids:
            writer.attempt(writer.write, sorted(ids))
        return [blocker(Key(kind, id_)) for id_ in writer.changed]
