"""Registered mappings, and what became of each record in the application's own tables."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.database.dialect import Row, among, greatest, insert_into, now
from logto_webhooks.database.jobs import IN_USE_MS
from logto_webhooks.database.schema import (
    former_rows,
    is_excluded,
    is_owed,
    is_unsettled,
    mapped_rows,
    mappings,
    organizations,
    records,
    users,
)
from logto_webhooks.deliveries import MappingStatus
from logto_webhooks.records.record import Key, Kind

State = Literal["ok", "excluded", "waiting", "conflict", "owed", "held"]
# What rows that would be deleted are blocked by: Logto's second answer, or somebody who allows it.
SECOND_ANSWER: Final = "second answer"
PERMISSION: Final = "permission"
ALONE: Final = "a transaction of its own"  # what a row that takes too long is blocked by
# What an owed row is blocked by whose deletion is held, or was allowed: it is tried alone, too.
ALONE_HELD: Final = "a transaction of its own, and permission"
ALONE_ALLOWED: Final = "a transaction of its own, in which its row may be deleted"
_HELD: Final = (PERMISSION, ALONE_HELD)
_TRIED_ALONE: Final = (ALONE, ALONE_HELD, ALONE_ALLOWED)
ARRIVED: Final = "the rows of its memberships"  # what an end with many of them is blocked by
UNCONFIRMED: Final = (
    "Logto has no such record, but no delivery says that it was deleted: asked again in a minute"
)
_ARRIVED: Final = "it has a row now, but the rows of its memberships aren't written yet"
CHANGING: Final = "another transaction changes its record"
# Why a record is excluded: short, because that can be most records.
BY_WHERE: Final = "where"
NOT_CREATED: Final = "create=False"
PARENT_CAME: Final = "its user or organization has a row now, but it isn't written yet"
NOT_WRITTEN: Final = "it changed in a process that doesn't have this mapping"


# Values of `applied_to` that are no ids: see `RegisteredMapping`.
LINKING: Final = ":"
FORGETTING: Final = "::"
AT_ONCE: Final = 5_000  # rows that are forgotten in one transaction
LONG_AGO: Final = 0  # when a row was deleted, or unlinked, that no longer counts as lately deleted


class RegisteredMapping(Struct, frozen=True, kw_only=True):
    """A mapping as all processes know it, even those without its code.

    `definition` is a digest of what the mapping says. `applied_to` is the last record that was
    written since it says that; "" at the beginning, LINKING while the compared ones are linked, and
    None when all were. It is FORGETTING before the beginning, while what it knows of records
    without a row is forgotten.
    """

    name: str
    kind: Kind
    definition: str
    applied_to: str | None = ""
    links: bool = False  # whether existing rows are linked


class MappedArrival(Struct, frozen=True, kw_only=True):
    """A user or an organization that has a row now, and whose memberships are looked at in steps,
    for one mapping. `after` is the id of the other end of the last one."""

    mapping: str
    end: Key
    after: str = ""


class MappingCounts(MappingStatus, frozen=True, kw_only=True):
    """How many records of a mapping have each state, and whether it was applied to all records."""

    ok: int = 0


class UnwrittenRow(Struct, frozen=True, kw_only=True):
    """A record whose row conflicts or is owed, and for how long."""

    mapping: str
    logto_id: str
    reason: str | None
    since_s: float


class UnwrittenRows(Struct, frozen=True, kw_only=True):
    """How many records of a mapping have a state for a reason, the oldest `since_s`."""

    mapping: str
    state: State
    reason: str | None
    count: int
    since_s: float


class UnsettledRow(Struct, frozen=True):
    """A row that isn't settled, by its record. `place` is where it is in a list."""

    record: Key
    place: str
    state: State


class RowState(Struct, frozen=True, kw_only=True):
    """What became of one record in one mapping.

    `record_id` is set for a role: `logto_id` then is the id of its user or membership, and its own.
    `row_id` is the primary key of the application's row, as JSON; also of a row that had Logto's
    id before and has it no longer. `ends` is set for a membership or a role: what the columns that
    say whose row it is held when it was written, as JSON. `role` is a role's name. `blocked_by`
    names what must change first: another row, by its primary key, a record, by its key, or one of
    SECOND_ANSWER, PERMISSION, ALONE, ALONE_HELD and ALONE_ALLOWED.
    """

    logto_id: str
    record_id: str | None = None
    row_id: str | None = None
    ends: str | None = None
    role: str | None = None
    state: State = "ok"
    reason: str | None = None
    blocked_by: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to write."""
        return self.state in ("ok", "excluded")

    @property
    def is_held(self) -> bool:
        """Whether somebody has to allow that the row is deleted or unlinked."""
        return self.blocked_by in _HELD

    @property
    def is_allowed(self) -> bool:
        """Whether somebody has allowed that the row is deleted or unlinked."""
        return self.blocked_by == ALONE_ALLOWED

    @property
    def is_tried_alone(self) -> bool:
        """Whether the row is only written in a transaction of its own."""
        return self.blocked_by in _TRIED_ALONE


def encode_id(primary_key: Iterable[Any]) -> str:
    """Write a primary key as text."""
    values = [
        value.hex()
        if isinstance(value, bytes)
        else value.name
        if isinstance(value, Enum)
        else value
        if isinstance(value, int | str | None)
        else str(_to_utc(value))
        for value in primary_key
    ]
    return canonical_json.encode(values).decode()


def _to_utc(value: Any) -> Any:
    """A database gives back a moment in the time zone of the session."""
    has_zone = isinstance(value, datetime) and value.tzinfo is not None
    return value.astimezone(UTC) if has_zone else value


def decode_id(
    row_id: str, primary_key: Sequence[sa.Column[Any]], dialect: sa.Dialect
) -> tuple[Any, ...]:
    """Read a primary key that `encode_id` wrote, so that its columns take it. A type of the
    application's own may give back other objects: compare what `encode_id` makes of these."""
    values = json.loads(row_id)  # `canonical_json` rounds integers beyond 2**53
    return tuple(
        _decode_value(column.type, value, dialect)
        for column, value in zip(primary_key, values, strict=True)
    )


def decode_ids(
    row_ids: Iterable[str], primary_key: Sequence[sa.Column[Any]], dialect: sa.Dialect
) -> dict[str, tuple[Any, ...]]:
    """Read primary keys that `encode_id` wrote. Those that don't fit the table any more are left
    out: a migration has given it another primary key."""
    decoded = {}
    for row_id in row_ids:
        with suppress(Exception):  # of the application's type
            decoded[row_id] = decode_id(row_id, primary_key, dialect)
    return decoded


def can_be_decoded(
    primary_key: Sequence[Any], columns: Sequence[sa.Column[Any]], dialect: sa.Dialect
) -> bool:
    """Whether a row can be found again by its primary key: a type of the application may give back
    objects of its own, and not accept what `encode_id` makes of them."""
    if not any(isinstance(column.type, sa.types.TypeDecorator) for column in columns):
        return True
    with suppress(Exception):  # of the application's type
        decoded = decode_id(encode_id(primary_key), columns, dialect)
        return all(
            _send(column, before, dialect) == _send(column, after, dialect)
            for column, before, after in zip(columns, primary_key, decoded, strict=True)
        )
    return False


def _send(column: sa.Column[Any], value: Any, dialect: sa.Dialect) -> Any:
    bind = column.type.dialect_impl(dialect).bind_processor(dialect) or _keep
    return bind(value)


def _decode_value(column_type: sa.types.TypeEngine[Any], value: Any, dialect: sa.Dialect) -> Any:
    if not isinstance(column_type, sa.types.TypeDecorator):
        return _find_reader(column_type.dialect_impl(dialect))(value)  # it may be a variant
    bind = column_type.dialect_impl(dialect).bind_processor(dialect) or _keep
    for read in (_find_reader(column_type.impl_instance), _keep, uuid.UUID):
        with suppress(Exception):  # of the application's type
            own = read(value)
            bind(own)
            return own
    return value  # the statement will tell what is wrong


def _find_reader(column_type: sa.types.TypeEngine[Any]) -> Callable[[Any], Any]:
    try:
        kind = column_type.python_type
    except NotImplementedError:
        return _keep
    return kind.__getitem__ if issubclass(kind, Enum) else _READERS.get(kind, _keep)


def _keep(value: Any) -> Any:
    return value


def _check_int(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_READERS: Final[dict[type, Callable[[Any], Any]]] = {
    int: _check_int,
    str: _check_text,
    bytes: bytes.fromhex,
    uuid.UUID: uuid.UUID,
    Decimal: Decimal,
    date: date.fromisoformat,
    datetime: datetime.fromisoformat,
}


class MappingStore:
    """Registered mappings, in the transaction of a Connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def registered(self) -> dict[str, RegisteredMapping]:
        """Return all registered mappings by name, whichever process has their code."""
        return {
            row.name: RegisteredMapping(
                name=row.name, kind=row.kind, definition=row.definition, applied_to=row.applied_to
            )
            for row in self._connection.execute(_SELECT_MAPPINGS)
        }

    def register(self, new: Sequence[RegisteredMapping]) -> None:
        """Register mappings, or note that a process still has their code.

        A new definition replaces the one before, and has to be applied to all records. One that was
        replaced before, by a newer release, replaces that only when no process has it any more.
        """
        for mapping in sorted(new, key=lambda mapping: mapping.name):
            is_it = mappings.c.name == mapping.name
            insert = insert_into(mappings, self._connection.dialect.name).values(
                name=mapping.name,
                kind=mapping.kind,
                definition=mapping.definition,
                former=[],
                applied_to="",
                registered_at=now(),
                seen_at=now(),
            )
            self._connection.execute(insert.on_conflict_do_nothing())
            query = sa.select(mappings, now().label("now")).where(is_it).with_for_update()
            row = self._connection.execute(query).one()
            seen: dict[str, Any] = {"seen_at": max(row.now, row.seen_at)}
            if row.definition != mapping.definition:
                is_in_use = row.seen_at >= row.now - IN_USE_MS
                if is_in_use and mapping.definition in row.former:
                    continue
                former = {*row.former, row.definition} - {mapping.definition}
                seen |= {"kind": mapping.kind, "definition": mapping.definition}
                seen |= {"former": sorted(former), "applied_to": "", "registered_at": now()}
                if mapping.links:  # all records without a row are compared anew
                    seen["applied_to"] = FORGETTING
            self._connection.execute(sa.update(mappings).where(is_it).values(seen))

    def forget_unlinked(self, name: str) -> bool:
        """Forget the next records without a row, before a mapping is applied anew. Return whether
        it has yet to be applied because of that."""
        query = sa.select(mappings.c.applied_to).where(mappings.c.name == name).with_for_update()
        if self._connection.scalar(query) != FORGETTING:
            return False
        unlinked = sa.select(mapped_rows.c.logto_id).where(
            mapped_rows.c.row_id.is_(None), mapped_rows.c.mapping == name
        )
        ids = self._connection.scalars(unlinked.limit(AT_ONCE)).all()
        if ids:
            self._connection.execute(_FORGET, {"mapping": name, "ids": list(ids)})
        if len(ids) < AT_ONCE:
            self.set_applied(name, "")
        return True

    def list_put_off(self, name: str, reason: str, limit: int) -> list[Key]:
        """List some records of a mapping that wait for a row for this reason."""
        query = sa.select(mapped_rows.c.kind, mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == name,
            is_unsettled,
            mapped_rows.c.blocked_by > "",  # in an index
            mapped_rows.c.reason == reason,
            mapped_rows.c.state == "waiting",
        )
        rows = self._connection.execute(query.limit(limit))
        return sorted(Key(kind, logto_id) for kind, logto_id in rows)

    def is_replaced(self, mapping: RegisteredMapping) -> bool:
        """Whether another definition has replaced a mapping's, and a process still has that."""
        query = sa.select(mappings.c.former).where(
            mappings.c.name == mapping.name,
            mappings.c.definition != mapping.definition,
            mappings.c.seen_at >= now() - IN_USE_MS,
        )
        return mapping.definition in (self._connection.scalar(query) or ())

    def remove(self, name: str) -> bool:
        """Delete a mapping. `forget` then deletes what is known of its rows. Return whether there
        was one."""
        is_it = mappings.c.name == name
        return bool(self._connection.execute(sa.delete(mappings).where(is_it)).rowcount)

    def forget(self, name: str, after: str) -> tuple[int, str | None]:
        """Forget the next rows of a mapping that was deleted, except which record had each of them:
        if it is registered again, nobody else gets a row. The rows stay. Return how many these
        were, and the last record; None at the end, and if the mapping is registered again."""
        if name in self.registered():
            return 0, None
        # Of all mappings, in the order of the primary key.
        following = sa.select(mapped_rows.c.logto_id).where(mapped_rows.c.logto_id > after)
        following = following.order_by(mapped_rows.c.logto_id).offset(AT_ONCE - 1).limit(1)
        last = self._connection.scalar(following)
        conditions = [mapped_rows.c.mapping == name, mapped_rows.c.logto_id > after]
        if last is not None:
            conditions.append(mapped_rows.c.logto_id <= last)
        names = ["mapping", "row_id", "logto_id"]
        own = sa.select(*(mapped_rows.c[column] for column in names)).where(
            *conditions, mapped_rows.c.row_id.is_not(None)
        )
        insert = insert_into(former_rows, self._connection.dialect.name).from_select(names, own)
        self._connection.execute(insert.on_conflict_do_nothing())
        deleted = self._connection.execute(sa.delete(mapped_rows).where(*conditions))
        return deleted.rowcount, last

    def lock_unapplied(self, wanted: Collection[RegisteredMapping]) -> RegisteredMapping | None:
        """Lock one of the mappings, if it has the same definition, isn't applied to all records,
        and nobody else applies it now: one of users or organizations first, because memberships
        wait for these."""
        definitions = [(mapping.name, mapping.definition) for mapping in wanted]
        is_wanted = sa.tuple_(mappings.c.name, mappings.c.definition).in_(definitions)
        query = (
            _SELECT_MAPPINGS.where(is_wanted, mappings.c.applied_to.is_not(None))
            .order_by(sa.case((mappings.c.kind == "membership", 1), else_=0), mappings.c.name)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        row = self._connection.execute(query).one_or_none()
        return None if row is None else RegisteredMapping(**row._mapping)

    def set_applied(self, name: str, applied_to: str | None) -> None:
        """Store up to which record a mapping was applied; None if to all."""
        self._connection.execute(
            sa.update(mappings).where(mappings.c.name == name).values(applied_to=applied_to)
        )

    def hold(self, mapping: RegisteredMapping) -> bool:
        """Lock a mapping, so that no other definition is registered until the transaction ends.
        Return False if another one is registered already."""
        query = sa.select(mappings.c.definition).where(mappings.c.name == mapping.name)
        return bool(self._connection.scalar(query.with_for_update()) == mapping.definition)

    def mark_owed(self, mapping: RegisteredMapping, keys: Collection[Key], reason: str) -> None:
        """Note that the rows of changed records have yet to be written."""
        rows = [
            {"logto_id": key.id}
            for key in sorted(keys, key=lambda key: key.id)
            if key.kind == mapping.kind
        ]
        if not rows:
            return
        insert = insert_into(mapped_rows, self._connection.dialect.name).values(
            mapping=mapping.name,
            kind=mapping.kind,
            state="owed",
            reason=reason,
            changed_at=now(),
        )
        changed: dict[str, Any] = {name: insert.excluded[name] for name in ("state", "reason")}
        changed["changed_at"] = _next_change()
        # `IN` can't be run for several rows.
        stays = sa.or_(*(mapped_rows.c.blocked_by == by for by in (*_HELD, ALONE_ALLOWED)))
        changed["blocked_by"] = sa.case((stays, mapped_rows.c.blocked_by), else_=sa.null())
        self._connection.execute(
            insert.on_conflict_do_update(index_elements=["mapping", "logto_id"], set_=changed), rows
        )

    def note_arrivals(self, mapping: str, ends: Collection[Key]) -> None:
        """Note that the memberships of users and organizations have yet to be looked at."""
        insert = insert_into(mapped_rows, self._connection.dialect.name).values(
            mapping=mapping,
            state="owed",
            reason=_ARRIVED,
            blocked_by=ARRIVED,
            changed_at=now(),
        )
        again = {"row_id": None, "changed_at": now()}
        insert = insert.on_conflict_do_update(index_elements=["mapping", "logto_id"], set_=again)
        rows = [
            {"kind": end.kind, "logto_id": _name_arrival(end), "record_id": end.id}
            for end in sorted(ends)
        ]
        if rows:
            self._connection.execute(insert, rows)

    def lock_arrival(self, names: Collection[str]) -> MappedArrival | None:
        """Lock a user or an organization whose memberships have yet to be looked at, and that
        nobody else looks at now."""
        query = (
            sa.select(mapped_rows)
            .where(mapped_rows.c.mapping.in_(names), is_unsettled)
            .where(mapped_rows.c.blocked_by == ARRIVED)
            .order_by(mapped_rows.c.changed_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return None
        end = Key(row.kind, row.record_id)
        return MappedArrival(mapping=row.mapping, end=end, after=row.row_id or "")

    def move_arrival(self, arrival: MappedArrival, after: str | None) -> None:
        """Store up to which membership a locked arrival was looked at; None if it was at all."""
        is_it = sa.and_(
            mapped_rows.c.mapping == arrival.mapping,
            mapped_rows.c.logto_id == _name_arrival(arrival.end),
        )
        if after is None:
            self._connection.execute(sa.delete(mapped_rows).where(is_it))
        else:
            self._connection.execute(sa.update(mapped_rows).where(is_it).values(row_id=after))

    def reset_deletion_count(self, name: str) -> int:
        """Let the next deleted or unlinked rows of a mapping no longer count as lately deleted.
        Return how many."""
        deleted = sa.select(mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == name, mapped_rows.c.deleted_at > LONG_AGO
        )
        ids = self._connection.scalars(deleted.limit(AT_ONCE)).all()
        _set_deleted_at(self._connection, name, ids, LONG_AGO)
        return len(ids)

    def list_unconfirmed(self, limit: int, after_ms: int) -> list[Key]:
        """List the records whose rows have waited so long to be deleted, because only one answer of
        Logto's API says that they are gone."""
        query = (
            sa.select(mapped_rows.c.kind, mapped_rows.c.logto_id)
            .where(
                is_unsettled,
                mapped_rows.c.blocked_by == SECOND_ANSWER,
                mapped_rows.c.changed_at <= now() - after_ms,
            )
            .group_by(mapped_rows.c.kind, mapped_rows.c.logto_id)
            .order_by(mapped_rows.c.kind, mapped_rows.c.logto_id)
            .limit(limit)
        )
        return [Key(kind, logto_id) for kind, logto_id in self._connection.execute(query)]

    def list_unsettled(
        self, name: str, limit: int, after: str, *, only_owed: bool = False
    ) -> list[UnsettledRow]:
        """List the next rows of a mapping that aren't settled, in the order of an index; but those
        that take too long are in `list_slow`."""
        place = (mapped_rows.c.mapping, mapped_rows.c.logto_id)
        query = (
            sa.select(mapped_rows.c.kind, _RECORD, mapped_rows.c.logto_id, mapped_rows.c.state)
            # Without statistics, a planner takes an equal mapping, or some states, for selective,
            # and sorts all rows for each page.
            .where(sa.tuple_(*place) > sa.tuple_(name, after), mapped_rows.c.mapping <= name)
            .where(is_owed if only_owed else is_unsettled)
            .where(sa.func.coalesce(mapped_rows.c.blocked_by, "").not_in([ARRIVED, *_TRIED_ALONE]))
            .order_by(*place)
            .limit(limit)
        )
        return [
            UnsettledRow(Key(kind, record_id), logto_id, state)
            for kind, record_id, logto_id, state in self._connection.execute(query)
        ]

    def list_slow(self, names: Collection[str], limit: int) -> list[Key]:
        """List the records whose rows take too long, the oldest first."""
        record = (mapped_rows.c.kind, _RECORD)
        query = (
            sa.select(*record)
            .where(mapped_rows.c.mapping.in_(names), is_unsettled)
            .where(mapped_rows.c.blocked_by.in_(_TRIED_ALONE))
            .group_by(*record)
            .order_by(sa.func.min(mapped_rows.c.changed_at), *record)
            .limit(limit)
        )
        return [Key(kind, id_) for kind, id_ in self._connection.execute(query)]

    def find_slow(self, record: Key) -> set[str]:
        """Return the mappings in which a row of a record takes too long."""
        query = (
            sa.select(mapped_rows.c.mapping)
            .where(is_unsettled, mapped_rows.c.kind == record.kind, _RECORD.in_([record.id]))
            .where(mapped_rows.c.blocked_by.in_(_TRIED_ALONE))
        )
        return set(self._connection.scalars(query))

    def counts(self) -> list[MappingCounts]:
        """Count the records of each registered mapping by state."""
        counts = self._count(_COUNT_ROWS)
        return [
            MappingCounts(mapping=name, is_applied=applied_to is None, **counts.get(name, {}))
            for name, applied_to in self._list_applied()
        ]

    def status(self) -> list[MappingStatus]:
        """Count the records of each registered mapping that have no correct row, and those that are
        excluded: one small query if there is no mapping, and otherwise two more that each read an
        index of these rows."""
        registered = self._list_applied()
        counts = self._count(_COUNT_ROWS.where(is_unsettled)) if registered else {}
        excluded = self._count_excluded() if registered else {}
        return [
            MappingStatus(
                mapping=name,
                is_applied=applied_to is None,
                excluded=excluded.get(name, 0),
                **counts.get(name, {}),
            )
            for name, applied_to in registered
        ]

    def _count_excluded(self) -> dict[str, int]:
        query = sa.select(mapped_rows.c.mapping, sa.func.count()).where(is_excluded)
        rows = self._connection.execute(query.group_by(mapped_rows.c.mapping))
        return {row[0]: row[1] for row in rows}

    def excludes_all(self, name: str) -> bool:
        """Whether the `where` of a mapping of users or organizations excludes all that there
        are. It may have to compare all of them."""
        kind = self._connection.scalar(sa.select(mappings.c.kind).where(mappings.c.name == name))
        is_of_users = kind == "user"
        table = users if is_of_users else organizations
        key = users.c.logto_user_id if is_of_users else organizations.c.logto_organization_id
        by_where = sa.exists().where(
            mapped_rows.c.mapping == name,
            mapped_rows.c.logto_id == key,
            is_excluded,
            mapped_rows.c.reason == BY_WHERE,
        )
        living = sa.select(sa.literal(1)).where(table.c.deleted_at.is_(None)).limit(1)
        wanted = self._connection.scalar(living.where(~by_where))
        return wanted is None and self._connection.scalar(living) is not None

    def _list_applied(self) -> list[tuple[str, str | None]]:
        query = sa.select(mappings.c.name, mappings.c.applied_to).order_by(mappings.c.name)
        return [(name, applied_to) for name, applied_to in self._connection.execute(query)]

    def _count(self, query: sa.Select[Any]) -> dict[str, dict[str, Any]]:
        counts: dict[str, dict[str, Any]] = {}
        for mapping, state, count in self._connection.execute(query):
            counts.setdefault(mapping, {})[state] = count
        return counts

    def list_unwritten(self, states: Collection[State], limit: int = 20) -> list[UnwrittenRows]:
        """Count the records that have these states by mapping and reason: most records first."""
        group = (mapped_rows.c.mapping, mapped_rows.c.state, mapped_rows.c.reason)
        count = sa.func.count().label("count")
        oldest = sa.func.min(mapped_rows.c.changed_at)
        query = (
            sa.select(*group, count, ((now() - oldest) / 1000.0).label("since_s"))
            .where(is_unsettled, mapped_rows.c.state.in_(states))
            .group_by(*group)
            .order_by(count.desc(), *group)
            .limit(limit)
        )
        return [UnwrittenRows(**row) for row in self._connection.execute(query).mappings()]

    def find_oldest(
        self, state: State, names: Collection[str] | None = None
    ) -> UnwrittenRow | None:
        """Find the record of these mappings, or of all, that has had this state for the longest
        time."""
        query = (
            sa.select(
                mapped_rows.c.mapping,
                mapped_rows.c.logto_id,
                mapped_rows.c.reason,
                ((now() - mapped_rows.c.changed_at) / 1000.0).label("since_s"),
            )
            .where(is_unsettled, mapped_rows.c.state == state)
            .order_by(mapped_rows.c.changed_at, mapped_rows.c.mapping, mapped_rows.c.logto_id)
            .limit(1)
        )
        if names is not None:
            query = query.where(mapped_rows.c.mapping.in_(names))
        row = self._connection.execute(query).mappings().one_or_none()
        return None if row is None else UnwrittenRow(**row)


def _name_arrival(end: Key) -> str:
    """The id of an end among those of memberships, which have a colon."""
    return f"{end.kind} {end.id}"


def lock_free_records(connection: sa.Connection, keys: Collection[Key]) -> set[Key]:
    """Lock those of the records that nobody else has locked, and return them. Waiting for others
    could be a deadlock, because all lock records in one order."""
    locked: set[Key] = set()
    by_kind: dict[Kind, list[str]] = {}
    for key in keys:
        by_kind.setdefault(key.kind, []).append(key.id)
    for kind, ids in by_kind.items():
        found = connection.scalars(_LOCK_FREE, {"kind": kind, "ids": ids})
        locked.update(Key(kind, id_) for id_ in found)
    return locked


_RECORD = sa.func.coalesce(mapped_rows.c.record_id, mapped_rows.c.logto_id)
_COUNT_ROWS = sa.select(mapped_rows.c.mapping, mapped_rows.c.state, sa.func.count()).group_by(
    mapped_rows.c.mapping, mapped_rows.c.state
)
_SELECT_MAPPINGS = sa.select(
    mappings.c.name, mappings.c.kind, mappings.c.definition, mappings.c.applied_to
)
_LOCK_FREE = (
    sa.select(records.c.logto_id)
    .where(records.c.kind == sa.bindparam("kind"), among(records.c.logto_id, "ids"))
    .with_for_update(skip_locked=True)
)


# Made once, because a batch needs them several times.
_of_mapping = mapped_rows.c.mapping == sa.bindparam("mapping")
_STATE = RowState.__struct_fields__
_SELECT_STATES = sa.select(*(mapped_rows.c[name] for name in (*_STATE, "changed_at")))
_FORGET = sa.delete(mapped_rows).where(_of_mapping, among(mapped_rows.c.logto_id, "ids"))
_FIND = _SELECT_STATES.where(_of_mapping, among(mapped_rows.c.logto_id, "ids"))
_FIND_OF_RECORDS = _SELECT_STATES.where(_of_mapping, among(mapped_rows.c.record_id, "ids"))
# A row that is owed since its state was read: another transaction wants it to be written again.
_is_owed_since = sa.and_(is_owed, mapped_rows.c.changed_at != sa.bindparam("read_at"))
_FORGET_ONE = sa.delete(mapped_rows).where(
    _of_mapping, mapped_rows.c.logto_id == sa.bindparam("id"), ~_is_owed_since
)
_FIND_BLOCKED = sa.select(_RECORD).where(
    _of_mapping, is_unsettled, among(mapped_rows.c.blocked_by, "blockers")
)


@functools.cache
def _make_save(dialect: str) -> Any:
    """Return an INSERT of states, which replaces what is stored. What is owed since the states were
    read stays owed."""
    names = ("mapping", "kind", *_STATE)
    insert = insert_into(mapped_rows, dialect).values(
        changed_at=now(), **{name: sa.bindparam(f"new_{name}") for name in names}
    )
    changed: dict[str, Any] = {name: insert.excluded[name] for name in ("row_id", "ends", "role")}
    changed["changed_at"] = _next_change()
    for name in ("state", "reason", "blocked_by"):
        changed[name] = sa.case((_is_owed_since, mapped_rows.c[name]), else_=insert.excluded[name])
    return insert.on_conflict_do_update(index_elements=["mapping", "logto_id"], set_=changed)


def _next_change() -> sa.ColumnElement[int]:
    """The time of a change of a stored state: no two of them have the same."""
    return greatest(now(), mapped_rows.c.changed_at + 1)


class StateStore:
    """The states of one mapping's rows."""

    def __init__(self, connection: sa.Connection, mapping: str, kind: Kind) -> None:
        self._connection = connection
        self._mapping = mapping
        self._kind = kind
        self._read_at: dict[str, int] = {}  # when the states that were read had been changed

    def find(self, ids: Collection[str]) -> dict[str, RowState]:
        """Find the states of records."""
        return self._find(_FIND, ids)

    def find_of_records(self, ids: Collection[str], *, several: bool) -> dict[str, RowState]:
        """Find all states of records, of which one can have `several`."""
        states = self.find(ids)
        if several:
            states |= self._find(_FIND_OF_RECORDS, ids)
        return states

    def _find(self, query: sa.Select[Any], ids: Collection[str]) -> dict[str, RowState]:
        values = {"mapping": self._mapping, "ids": list(ids)}
        states = {}
        for *state, changed_at in self._connection.execute(query, values):
            states[state[0]] = RowState(**dict(zip(_STATE, state, strict=True)))
            self._read_at[state[0]] = changed_at
        return states

    def release(self, blockers: Collection[str]) -> None:
        """Let what is held because of these wait instead, so that it is tried again."""
        statement = sa.update(mapped_rows).where(
            mapped_rows.c.mapping == self._mapping,
            is_unsettled,
            mapped_rows.c.state == "held",
            among(mapped_rows.c.blocked_by, "blockers"),
        )
        values = {"blockers": list(blockers)}
        self._connection.execute(statement.values(state="waiting"), values)

    def find_blocked(self, blockers: Collection[str], limit: int | None = None) -> list[str]:
        """List the records that wait for any of these."""
        query = _FIND_BLOCKED if limit is None else _FIND_BLOCKED.limit(limit)
        values = {"mapping": self._mapping, "blockers": list(blockers)}
        return list(self._connection.scalars(query, values))

    def find_owners(self, row_ids: Collection[str]) -> dict[str, set[str]]:
        """Return which records have, or ever had, these rows."""
        owners: dict[str, set[str]] = {}
        for table in (mapped_rows, former_rows):
            query = sa.select(table.c.row_id, table.c.logto_id).where(
                table.c.mapping == self._mapping, among(table.c.row_id, "row_ids")
            )
            for row_id, logto_id in self._connection.execute(query, {"row_ids": list(row_ids)}):
                owners.setdefault(row_id, set()).add(logto_id)
        return owners

    def find_wanting(
        self, row_ids: Collection[str], reasons: Collection[str], part: str
    ) -> dict[str, set[str]]:
        """Return which records aren't linked to these rows for one of the reasons, or one with this
        part."""
        query = sa.select(mapped_rows.c.blocked_by, mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == self._mapping,
            is_unsettled,
            mapped_rows.c.reason.in_(reasons) | mapped_rows.c.reason.contains(part),
            among(mapped_rows.c.blocked_by, "row_ids"),
        )
        wanting: dict[str, set[str]] = {}
        for row_id, logto_id in self._connection.execute(query, {"row_ids": list(row_ids)}):
            wanting.setdefault(row_id, set()).add(logto_id)
        return wanting

    def list_first_owed(
        self, others: Collection[str], but: Collection[str], limit: int
    ) -> Sequence[str]:
        """List some records that have no row yet, and are owed one. Leave out `others`, and those
        for which the reason begins with one of `but`."""
        reason = sa.func.coalesce(mapped_rows.c.reason, "")
        query = sa.select(mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == self._mapping,
            is_owed,
            mapped_rows.c.row_id.is_(None),
            mapped_rows.c.blocked_by.is_distinct_from(ARRIVED),
            *(~reason.startswith(beginning) for beginning in but),
            ~among(mapped_rows.c.logto_id, "others"),
        )
        return self._connection.scalars(query.limit(limit), {"others": list(others)}).all()

    def save(self, states: Iterable[RowState], stored: Mapping[str, RowState]) -> None:
        """Store the states that differ from the stored ones. If a record has another row now, what
        it had before is remembered, so that nobody else is linked to that."""
        states = list(states)
        former = [
            {"mapping": self._mapping, "row_id": before.row_id, "logto_id": state.logto_id}
            for state in states
            if (before := stored.get(state.logto_id))
            and None not in (before.row_id, state.row_id)
            and before.row_id != state.row_id
        ]
        if former:
            insert = insert_into(former_rows, self._connection.dialect.name)
            self._connection.execute(insert.on_conflict_do_nothing(), former)
        rows: list[Row] = [
            {
                "new_mapping": self._mapping,
                "new_kind": self._kind,
                **{f"new_{name}": getattr(state, name) for name in _STATE},
                "read_at": self._read_at.get(state.logto_id, 0),
            }
            for state in states
            if state != stored.get(state.logto_id)
        ]
        if rows:
            self._connection.execute(_make_save(self._connection.dialect.name), rows)

    def forget(self, ids: Collection[str]) -> None:
        """Forget records that have no row, and never had one, unless they are owed one since their
        states were read."""
        rows = [
            {"mapping": self._mapping, "id": id_, "read_at": self._read_at.get(id_, 0)}
            for id_ in ids
        ]
        if rows:
            self._connection.execute(_FORGET_ONE, rows)

    def note_deletions(self, ids: Collection[str], *, count: bool) -> None:
        """Note that the rows of records were deleted, or unlinked. `count` them as lately deleted,
        or not."""
        deleted_at = now() if count else LONG_AGO
        _set_deleted_at(self._connection, self._mapping, ids, deleted_at)

    def forget_deletions(self, ids: Collection[str]) -> None:
        """Forget that the rows of records were unlinked: they have them again."""
        _set_deleted_at(self._connection, self._mapping, ids, None)

    def find_deleted(self, ids: Collection[str]) -> set[str]:
        """Return those of the records whose rows were deleted, or unlinked, and that haven't got
        them back."""
        query = sa.select(mapped_rows.c.logto_id).where(
            mapped_rows.c.mapping == self._mapping,
            among(mapped_rows.c.logto_id, "ids"),
            mapped_rows.c.deleted_at.is_not(None),
        )
        return set(self._connection.scalars(query, {"ids": list(ids)}))

    def count_deletions(self, others: Collection[str], window_ms: int) -> int:
        """Count the records whose rows were lately deleted, and those whose deletion is held or
        unconfirmed. Leave out `others`."""
        is_counted = sa.or_(
            self._was_deleted(window_ms),
            sa.and_(is_unsettled, mapped_rows.c.blocked_by.in_([SECOND_ANSWER, *_HELD])),
        )
        query = sa.select(sa.func.count()).where(
            mapped_rows.c.mapping == self._mapping,
            is_counted,
            ~among(mapped_rows.c.logto_id, "others"),
        )
        return self._connection.scalar(query, {"others": list(others)}) or 0

    def has_rows(self, count: int, window_ms: int) -> bool:
        """Whether the mapping has at least so many rows, with those that were lately deleted."""
        is_row = mapped_rows.c.row_id.is_not(None) | self._was_deleted(window_ms)
        some = sa.select(sa.literal(1)).where(mapped_rows.c.mapping == self._mapping, is_row)
        query = sa.select(sa.func.count()).select_from(some.limit(count).subquery())
        return (self._connection.scalar(query) or 0) >= count

    def _was_deleted(self, window_ms: int) -> sa.ColumnElement[bool]:
        deleted_at = mapped_rows.c.deleted_at
        return sa.and_(deleted_at.is_not(None), deleted_at > now() - window_ms)


def _set_deleted_at(
    connection: sa.Connection,
    mapping: str,
    ids: Collection[str],
    deleted_at: sa.ColumnElement[int] | int | None,
) -> None:
    statement = sa.update(mapped_rows).where(
        mapped_rows.c.mapping == mapping, among(mapped_rows.c.logto_id, "ids")
    )
    connection.execute(statement.values(deleted_at=deleted_at), {"ids": list(ids)})
