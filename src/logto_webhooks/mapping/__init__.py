"""The application's own tables, kept equal to the mirror in the same transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import RegisteredMapping
from logto_webhooks.database.sessions import APP_SCHEMAS
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.declare import EntityMapping, MappedKind, MemberMapping
from logto_webhooks.mapping.mirror import read_members
from logto_webhooks.mapping.write import EntityWriter, MemberWriter, blocker
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
        mappings: list[EntityMapping | MemberMapping] = [*self.entities, *self.members]
        if any(other.table is mapping.table for other in mappings):
            raise InvalidMapping(table=mapping.name, problem="it is mapped already")
        if isinstance(mapping, EntityMapping):
            self.entities.append(mapping)
        else:
            self.members.append(mapping)

    @property
    def registered(self) -> Sequence[RegisteredMapping]:
        """The mappings as other processes know them."""
        return [
            RegisteredMapping(name=mapping.name, kind=mapping.kind, definition=mapping.definition)
            for mapping in (*self.entities, *self.members)
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

    def write(
        self,
        connection: sa.Connection,
        keys: Collection[Key],
        registered: Mapping[str, RegisteredMapping],
    ) -> set[str]:
        """Write the rows of changed records, which are locked: memberships that are over leave
        first, then users and organizations, then memberships that are present. Return the names of
        the mappings that were written; others are registered differently.

        Raises StoreUnavailable.
        """
        current = self.find_current(registered)
        schemas = connection.get_execution_options().get(APP_SCHEMAS)
        writers = [
            MemberWriter(connection, mapping, self.entities, schemas)
            for mapping in self.members
            if mapping.name in current
        ]
        pairs = {key for key in keys if key.kind == "membership"}
        present = read_members(connection, pairs) if pairs and writers else {}
        over = pairs - present.keys()
        for writer in writers:
            if over:
                writer.delete(over)
        ends = {end for pair in over for end in pair.organization_and_user}
        changed: list[str] = []
        for mapping in self.entities:
            if mapping.name in current:
                entity_writer = EntityWriter(connection, mapping, schemas)
                changed += self._write_entities(entity_writer, mapping.kind, keys, ends)
        for writer in writers:
            waiting = set(writer.find_waiting(changed)) - present.keys() if changed else set()
            writer.write(present | (read_members(connection, waiting) if waiting else {}))
        return current

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
            writer.write(ids)
        return [blocker(Key(kind, id_)) for id_ in writer.changed]
