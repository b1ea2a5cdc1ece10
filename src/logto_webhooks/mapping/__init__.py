"""The application's own tables, kept equal to the mirror in the same transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.batch_sizes import BatchSizer
from logto_webhooks.database.mapped_rows import (
    CHANGING,
    LINKING,
    NOT_WRITTEN,
    PARENT_CAME,
    MappingStore,
    RegisteredMapping,
    RowState,
    lock_free_records,
)
from logto_webhooks.database.sessions import APP_SCHEMAS
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.cascades import check_cascades
from logto_webhooks.mapping.declare import EntityMapping, MappedKind
from logto_webhooks.mapping.declare_pairs import End, PairMapping, RoleEnd, is_part
from logto_webhooks.mapping.deletions import (
    Stop,
    find_unready_ends,
    name_departure,
    stop_for_end,
)
from logto_webhooks.mapping.ends import blocker, name_parent
from logto_webhooks.mapping.entity_writer import EntityWriter
from logto_webhooks.mapping.memberships import split_by_size
from logto_webhooks.mapping.pair_writer import PairWriter
from logto_webhooks.mapping.row_limits import Caution, RowLimits
from logto_webhooks.mapping.sources import find_python_type, is_unfit
from logto_webhooks.mapping.table_writer import PlannedRow
from logto_webhooks.records.record import Key, Kind

PAGE: Final = 500  # records that are written in one transaction, at most
PAGE_S: Final = 0.5  # for that, because deliveries about these records wait
_ENTITIES: Final[tuple[MappedKind, ...]] = ("organization", "user")


class Mappings:
    """The mappings of an application."""

    def __init__(self) -> None:
        self.entities: list[EntityMapping] = []
        self.pairs: list[PairMapping] = []  # memberships first, because roles can wait for these
        self.page_sizer = BatchSizer(PAGE_S, PAGE)
        # New mappings, since the transactions are over that didn't know them.
        self.may_begin: set[str] = set()
        self.caution = Caution()

    def __bool__(self) -> bool:
        return bool(self.all)

    def add(self, mapping: EntityMapping | PairMapping) -> None:
        """Register a mapping. Raises InvalidMapping."""
        if any(other.name == mapping.name for other in self.all):
            raise InvalidMapping(table=mapping.name, problem="it is mapped already")
        for pair in [*self.pairs, *([] if isinstance(mapping, EntityMapping) else [mapping])]:
            _check_ends(pair, [*self.all, mapping])
        check_cascades([*self.all, mapping])
        if isinstance(mapping, EntityMapping):
            self.entities.append(mapping)
            return
        members = [pair.table for pair in self.pairs if pair.pair == "member"]
        for end in mapping.ends:
            if end.kind == "member" and end.find_referred(members) is None:
                problem = f"{end.column.name} must refer to a table that map_members maps: call "
                raise InvalidMapping(table=mapping.name, problem=f"{problem}map_members first")
        self.pairs.append(mapping)
        self.pairs.sort(key=lambda pair: pair.pair != "member")

    def check_complete(self) -> None:
        """Check, when all mappings are registered, that what columns refer to is mapped, unless
        they can hold Logto's ids. Raises InvalidMapping."""
        tables = [mapping.table for mapping in self.all]
        for pair in self.pairs:
            for end in pair.ends:
                own = find_python_type(end.column)
                holds_id = own is None or not is_unfit(str, own)
                is_owner = end.kind in ("user", "organization")
                if holds_id or not is_owner or end.find_referred(tables) is not None:
                    continue
                table = end.referred[0].table.fullname if end.referred else "no table"
                problem = (
                    f"{end.kind}={end.column.name} refers to {table}, which isn't mapped: call "
                    f"map_{end.kind}s with it, too"
                )
                raise InvalidMapping(table=pair.name, problem=problem)

    @property
    def all(self) -> list[EntityMapping | PairMapping]:
        """All mappings: memberships and roles last, because they wait for the others."""
        return [*self.entities, *self.pairs]

    def find_entity(self, target: Any) -> EntityMapping | None:
        """Find the mapping of users or organizations onto a class; None if it isn't mapped."""
        table = getattr(sa.inspect(target, raiseerr=False), "local_table", None)
        targets = [target] if table is None else [target, table]
        for mapping in self.entities:
            if any(mapping.target is known for known in targets):
                return mapping
        return None

    def find_parents(
        self, mapping: EntityMapping | PairMapping
    ) -> list[EntityMapping | PairMapping]:
        """Find the mappings to whose rows those of a mapping refer, also by way of each other."""
        reached = {mapping.name: mapping}
        new = [mapping]
        while new:
            ends = [end for each in new if isinstance(each, PairMapping) for end in each.ends]
            new = [
                parent
                for parent in self.all
                if parent.name not in reached
                and any(end.find_referred([parent.table]) is not None for end in ends)
            ]
            reached |= {parent.name: parent for parent in new}
        return [parent for name, parent in reached.items() if name != mapping.name]

    @property
    def registered(self) -> Sequence[RegisteredMapping]:
        """The mappings as other processes know them."""
        return [
            RegisteredMapping(
                name=mapping.name,
                kind=mapping.kind,
                definition=mapping.definition,
                links=isinstance(mapping, EntityMapping) and mapping.link is not None,
            )
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
        mapping: EntityMapping | PairMapping,
        run: ApplyRun | None = None,
        applied_to: str | None = None,
    ) -> EntityWriter | PairWriter:
        """Make the writer of a mapping's rows."""
        schemas = connection.get_execution_options().get(APP_SCHEMAS)
        if isinstance(mapping, EntityMapping):
            return EntityWriter(connection, mapping, schemas, run, applied_to)
        return PairWriter(connection, mapping, self.all, schemas, run)

    def write(
        self,
        connection: sa.Connection,
        keys: Collection[Key],
        registered: Mapping[str, RegisteredMapping],
        tell: Callable[[str, PlannedRow, RowState], None] | None = None,
        run: ApplyRun | None = None,
        *,
        is_alone: bool = False,
    ) -> set[str]:
        """Write the rows of changed records, which are locked: what is over leaves first, children
        before parents, and then parents are written before children.

        Return the names of the mappings that were written. The others are registered differently.
        `tell` gets the name of a mapping, what was planned for a row, and what became of it.
        `run` is that of several transactions. `is_alone` says that nobody else waits for this one,
        which is for one record: those of its rows are written that take too long.

        Raises StoreUnavailable.
        """
        current = self.find_current(registered)
        schemas = connection.get_execution_options().get(APP_SCHEMAS)
        limits = RowLimits(connection, self.caution, is_alone=is_alone)
        written = current
        if len(keys) == 1:
            [limits.only_record] = keys
            if is_alone:  # the others would take their time
                written = current & MappingStore(connection).find_slow(limits.only_record)
        entity_writers = [
            EntityWriter(
                connection, mapping, schemas, run, registered[mapping.name].applied_to, limits
            )
            for mapping in self.entities
            if mapping.name in current
        ]
        pair_writers = [
            PairWriter(connection, mapping, self.all, schemas, run, limits)
            for mapping in self.pairs
            if mapping.name in current
        ]
        ids: dict[Kind, set[str]] = {"user": set(), "organization": set(), "membership": set()}
        for key in keys:
            ids[key.kind].add(key.id)
        over = self._remove_pairs(connection, pair_writers, entity_writers, ids)
        ends = {end for key in over for end in key.ends}
        for entity_writer in entity_writers:
            own = ids[entity_writer.kind] if entity_writer.name in written else ()
            self._write_entities(entity_writer, own, ends)
        parents: list[EntityWriter | PairWriter] = [*entity_writers]
        for writer in pair_writers:
            follow = self._find_followers(connection, writer, parents, registered, run)
            if is_alone or limits.is_retry:  # this is for the records' own rows
                MappingStore(connection).mark_owed(
                    registered[writer.name], {Key(writer.kind, i) for i in follow}, PARENT_CAME
                )
                follow = set()
            if writer.name in written:
                follow |= ids[writer.kind]
            writer.attempt(writer.write, writer.find_present(follow))
            parents.append(writer)
        for name in registered.keys() - current:
            self._owe_followers(connection, registered[name], entity_writers, run)
        if limits.is_last_try:
            for any_writer in (*entity_writers, *pair_writers):
                any_writer.save_culprits()
        if tell is not None:
            for any_writer in (*entity_writers, *pair_writers):
                for plan, state in any_writer.results:
                    tell(any_writer.name, plan, state)
        return current

    def write_parents(
        self,
        connection: sa.Connection,
        name: str,
        keys: Collection[Key],
        run: ApplyRun,
    ) -> None:
        """Before memberships or roles are tried in a rehearsal, write the rows to which theirs
        would refer by now: earlier transactions, which wrote them, were rolled back."""
        pair = next((pair for pair in self.pairs if pair.name == name), None)
        if pair is None or not run.rehearses:
            return
        ends = {end for key in keys for end in (*key.ends, key)}
        written = {end for end in ends if run.has_parent(name_parent(end))}
        if not written:
            return
        parents = Mappings()
        parents.entities = self.entities
        if pair.pair != "member":
            parents.pairs = [other for other in self.pairs if other.pair == "member"]
        registered = {
            own.name: replace(own, applied_to=LINKING if own.links else "")
            for own in parents.registered
        }
        parents.write(connection, lock_free_records(connection, written), registered, run=run)

    def _remove_pairs(
        self,
        connection: sa.Connection,
        writers: Sequence[PairWriter],
        entity_writers: Sequence[EntityWriter],
        ids: Mapping[Kind, Collection[str]],
    ) -> set[Key]:
        """Delete the rows of memberships and roles that are over, and of those that waited for one
        of the users and organizations to be deleted. Return the records whose rows these are. A row
        stays as long as the row of its user or organization does."""
        ends = [Key(kind, id_) for kind in _ENTITIES for id_ in ids[kind]]
        departures = [name_departure(end) for end in ends]
        removed: set[Key] = set()
        for writer in reversed(writers):
            over = writer.find_over(ids[writer.kind], departures)
            if over:
                records = {Key(writer.kind, id_) for id_ in over}
                stops = self._find_stops(connection, entity_writers, ends, records)
                writer.attempt(partial(writer.remove, stops), sorted(over))
                removed |= records
        return removed

    @staticmethod
    def _find_stops(
        connection: sa.Connection,
        writers: Sequence[EntityWriter],
        changed: Collection[Key],
        over: Collection[Key],
    ) -> dict[Key, Stop]:
        """Find the users and organizations whose memberships' and roles' rows aren't deleted
        now."""
        ends = {end for key in over for end in key.ends}
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
        self, writer: EntityWriter, ids: Collection[str], ends: Collection[Key]
    ) -> None:
        """Write users or organizations, and those whose rows couldn't be deleted before."""
        # A row that memberships referred to couldn't be deleted before.
        of_kind = {end.id for end in ends if end.kind == writer.kind}.difference(ids)
        freed = writer.lock_more(writer.find_unsettled(of_kind)) if of_kind else set()
        if ids or freed:
            writer.attempt(writer.write, sorted({*ids, *freed}))

    @staticmethod
    def _find_followers(
        connection: sa.Connection,
        writer: PairWriter,
        parents: Sequence[EntityWriter | PairWriter],
        registered: Mapping[str, RegisteredMapping],
        run: ApplyRun | None,
    ) -> set[str]:
        """Return the records of a mapping of memberships or roles whose user, organization or
        member has a row, or another one, since now. They are locked; the others are owed."""
        came: set[Key] = set()
        blockers: list[str] = []
        for parent in parents:
            if writer.refers_to(parent):
                came |= {Key(parent.kind, id_) for id_ in parent.came}
                kind = parent.kind if isinstance(parent, EntityWriter) else "member"
                blockers += [blocker(kind, id_) for id_ in parent.came]
        if not came:
            return set()
        if run is not None and run.rehearses:
            return set()  # each is tried on its own page, where it is counted
        if run is not None and registered[writer.name].applied_to == "":
            return writer.find_waiting(blockers)  # it is going to be applied to all records
        ends = {key for key in came if key.kind != writer.kind}
        followers = came - ends
        store = MappingStore(connection)
        if ends:
            few, many = split_by_size(connection, ends)
            store.note_arrivals(writer.name, many)
            free = lock_free_records(connection, few)
            store.mark_owed(registered[writer.name], few - free, CHANGING)
            followers |= free
        return {key.id for key in followers}

    @staticmethod
    def _owe_followers(
        connection: sa.Connection,
        mapping: RegisteredMapping,
        writers: Sequence[EntityWriter],
        run: ApplyRun | None,
    ) -> None:
        """Note for a mapping that this process can't write whose memberships and roles may get
        rows."""
        came = {Key(writer.kind, id_) for writer in writers for id_ in writer.came}
        if not came or (run is not None and mapping.applied_to == ""):
            return
        store = MappingStore(connection)
        if mapping.kind == "membership":
            few, many = split_by_size(connection, came)
            store.mark_owed(mapping, few, NOT_WRITTEN)
            store.note_arrivals(mapping.name, many)
        else:
            store.mark_owed(mapping, came, NOT_WRITTEN)


def _check_ends(pair: PairMapping, mappings: Sequence[EntityMapping | PairMapping]) -> None:
    """Check that each column refers to rows of its own kind, as far as the tables are mapped.
    Raises InvalidMapping."""
    names = {mapping.table: _name_kind(mapping) for mapping in mappings}
    for end in pair.ends:
        _check_referred(pair, end, mappings)
        tables = [own.table for own in end.referred if own.table in names]
        kinds = [names[table] for table in tables]
        if not kinds or end.kind in kinds:
            continue
        kind, table = kinds[0], tables[0].description
        instead = f"pass a column that refers to your table of {end.kind}s"
        for other in pair.ends:
            its = [names.get(own.table, end.kind) for own in other.referred]
            if other.kind == kind and end.kind in its:  # or it may be, if that isn't mapped yet
                instead = f"write {end.kind}={other.column.name} and {kind}={end.column.name}"
        problem = f"{end.kind}={end.column.name} refers to {table}, which has the rows of {kind}s"
        raise InvalidMapping(table=pair.name, problem=f"{problem}: {instead}")


def _check_referred(
    pair: PairMapping, end: End, mappings: Sequence[EntityMapping | PairMapping]
) -> None:
    """Check that a column refers to one that tells whose row it is, and that Logto can't change.
    Raises InvalidMapping."""
    entities = {own.table: own for own in mappings if isinstance(own, EntityMapping)}
    if isinstance(end, RoleEnd):
        return
    referred = end.find_referred(list(entities))
    for key in end.column.foreign_keys:
        if is_part(key) and key.column.table in entities and referred is None:
            problem = (
                f"{end.column.name} refers to {key.target_fullname} together with other columns, "
                "but that isn't unique by itself, so it doesn't tell whose row is meant: refer to "
                "a column that is"
            )
            raise InvalidMapping(table=pair.name, problem=problem)
    if referred is None:
        return
    mapping = entities[referred.table]
    if referred.key in mapping.columns:
        problem = (
            f"{end.column.name} refers to {mapping.name}.{referred.name}, which changes when Logto "
            "changes it: refer to the primary key"
        )
        raise InvalidMapping(table=pair.name, problem=problem)


def _name_kind(mapping: EntityMapping | PairMapping) -> str:
    """Name what a table has rows of."""
    if isinstance(mapping, EntityMapping):
        return mapping.kind
    return "member" if mapping.pair == "member" else "member's role"
