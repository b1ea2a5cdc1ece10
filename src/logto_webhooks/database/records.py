"""Records and their rows in the mirror: lock, save, find."""

from __future__ import annotations

import functools
import itertools
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from typing import Any, Final

import sqlalchemy as sa
from msgspec import UNSET, Struct, structs
from msgspec.structs import replace

from logto_webhooks import canonical_json
from logto_webhooks.canonical_json import is_equal
from logto_webhooks.database.dialect import (
    Row,
    among,
    among_pairs,
    execute_rows,
    folded,
    insert_values,
    inserted_values,
    now,
)
from logto_webhooks.database.schema import (
    is_to_refetch,
    is_unsettled,
    mapped_rows,
    member_roles,
    members,
    organizations,
    records,
    user_identities,
    user_roles,
    users,
)
from logto_webhooks.records.projection import Part, child_rows, project
from logto_webhooks.records.record import (
    CONFIRMED_MS,
    MEMBERS,
    NEVER,
    Contender,
    Group,
    Key,
    Kind,
    Record,
)

MIRROR: Final[dict[Kind, sa.Table]] = {
    "user": users,
    "organization": organizations,
    "membership": members,
}
_PARTS: Final[dict[Part, sa.Table]] = {
    "identities": user_identities,
    "roles": user_roles,
    "member_roles": member_roles,
}
LOOKED: Final = 5_000  # records that a query looks through
_is_not_deleted = records.c.deleted_at.is_(None) | records.c.doubtful
_SELECT_PART: Final = {
    part: sa.select(table).where(
        among_pairs(table.c.logto_organization_id, table.c.logto_user_id, "owners")
        if part == "member_roles"
        else among(table.c.logto_user_id, "owners")
    )
    for part, table in _PARTS.items()
}
_of_kind = (records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids"))
is_among_memberships = sa.and_(
    records.c.kind == sa.literal_column("'membership'"), among(records.c.logto_id, "ids")
)
_SELECT_IDS: Final = sa.select(records.c.logto_id).where(*_of_kind)
_DOCUMENTS: Final = ("data", "groups", "facts", "needs")
_SELECT_ENCODED: Final = sa.select(
    *(
        sa.type_coerce(column, sa.Text).label(column.name) if column.name in _DOCUMENTS else column
        for column in records.c
    )
).where(*_of_kind)
_FIND_ENDED: Final = _SELECT_IDS.where(
    records.c.gone_at.is_not(None) | records.c.absent_at.is_not(None)
).limit(1)
_in_order = (records.c.kind, records.c.logto_id)
_ORDERED: Final = sa.select(records).where(*_of_kind).order_by(*_in_order)
# Without the contents of groups.
_HEADS: Final = (
    sa.select(*(column for column in records.c if column.name != "data"))
    .where(*_of_kind)
    .order_by(*_in_order)
)
_LOCK: Final = (_ORDERED.with_for_update(read=True), _ORDERED.with_for_update())
_LOCK_HEADS: Final = (_HEADS.with_for_update(read=True), _HEADS.with_for_update())
LOCK_MEMBERSHIPS: Final = (
    sa.select(records.c.doubtful)
    .where(is_among_memberships)
    .order_by(records.c.logto_id)
    .with_for_update()
)
# Each uses one index. With an OR in one statement, a planner may use none.
_SELECT_MEMBERSHIPS: Final[dict[Kind, sa.Select[Any]]] = {
    kind: sa.select(records.c.logto_id).where(among(records.c[f"{kind}_id"], "ids"))
    for kind in ("user", "organization")
}
_DELETE_MEMBER: Final = sa.delete(members).where(
    members.c.logto_organization_id == sa.bindparam("organization"),
    members.c.logto_user_id == sa.bindparam("user"),
)


class RefetchNeed(Struct, frozen=True, kw_only=True):
    """A record that needs a refetch, and why."""

    key: Key
    reason: str
    doubtful: bool


class StoredRecord(Struct, frozen=True):
    """A record as it is stored, with its documents as JSON. `size` is theirs."""

    row: dict[str, Any]
    size: int

    def decode(self) -> Record:
        """Decode its documents, which may be large."""
        decoded = {name: canonical_json.decode(self.row[name].encode()) for name in _DOCUMENTS}
        return from_row(self.row | decoded)


class FoundRow(Struct, frozen=True, kw_only=True):
    """A user's or an organization's row, why it needs a refetch, and its memberships.

    Memberships in doubt are listed separately, whether they exist or not. `roles` are the names of
    a user's roles. `own_rows` says for each mapped table why the row in it isn't written.
    """

    row: dict[str, Any]
    waiting_for: str | None
    memberships: list[str]
    memberships_in_doubt: list[str]
    roles: list[str] = []
    own_rows: list[str] = []


class RecordStore:
    """The part of a Store for records and their rows in the mirror."""

    _connection: sa.Connection
    _changed: set[Key]  # since the application's rows were written

    def lock(
        self,
        keys: Sequence[Key],
        *,
        share: bool = False,
        ends: Sequence[Key] = (),
        heads: Set[Key] = frozenset(),
    ) -> dict[Key, Record]:
        """Lock records until the transaction ends, and return them. Unknown ones are empty stubs.
        Those of the keys that are `heads` are returned as by `read_heads`: they mustn't be saved.

        With `share`, other transactions may read the records, too. All memberships of `ends` are
        locked but not returned, because there can be many. They are locked in one pass with the
        others: else two transactions that end each other's memberships could deadlock.
        """
        by_kind = _group_by_kind(keys)
        whole = [key for key in keys if key not in heads] if heads else keys
        if self._connection.dialect.name != "postgresql":  # SQLite has one writer
            return self.read_unlocked(whole) | self.read_heads(heads)
        self._insert_stubs(keys, by_kind)  # only existing rows can be locked
        if ends:
            self._lock_memberships(keys, ends)
        # A record that was ever deleted is locked for writing at once: two transactions that share
        # it and then write would deadlock.
        to_read, to_write = _LOCK_HEADS if heads else _LOCK
        if share and not any(self._connection.execute(_FIND_ENDED, ids).first() for ids in by_kind):
            locked = self._read(to_read, keys, by_kind)
            share = all(record.ended_at == NEVER for record in locked.values())
        else:
            share = False
        # A membership of a deleted user or organization is evidence that changes that one's record.
        if not share:
            locked = self._read(to_write, keys, by_kind)
        return locked | self.read_unlocked(whole) if heads else locked

    def save(self, changed: Sequence[Record]) -> list[Record]:
        """Write locked records and their rows in the mirror. Return the records with their local
        ids."""
        ids = _make_local_ids(sum(not record.kept for record in changed))
        kept = [
            record if record.kept else replace(record, local_id=next(ids)) for record in changed
        ]
        self._changed.update(record.key for record in kept)
        _upsert(self._connection, records, [to_row(record) for record in kept])
        for kind in MIRROR:
            self._save_mirror(kind, [record for record in kept if record.key.kind == kind])
        by_part: dict[Part, dict[Key, list[Row]]] = {}
        for record in kept:
            for part, rows in child_rows(record).items():
                by_part.setdefault(part, {})[record.key] = rows
        for part, by_key in by_part.items():
            self._save_part(part, by_key)
        return kept

    def read_unlocked(self, keys: Collection[Key]) -> dict[Key, Record]:
        """Return records without locking them. Unknown ones are empty."""
        return self._read(_ORDERED, keys, _group_by_kind(sorted(keys)))

    def read_heads(self, keys: Collection[Key]) -> dict[Key, Record]:
        """Return records without locking them, and without the contents of their groups, which can
        be large. Unknown ones are empty. To see whether they are here, and what is known of it."""
        return self._read(_HEADS, keys, _group_by_kind(sorted(keys)))

    def read_encoded(self, key: Key) -> StoredRecord | None:
        """Return a record without decoding its documents; None if it is unknown."""
        wanted = {"of_kind": key.kind, "ids": [key.id]}
        row = self._connection.execute(_SELECT_ENCODED, wanted).mappings().one_or_none()
        if row is None:
            return None
        return StoredRecord(dict(row), sum(len(row[name]) for name in _DOCUMENTS))

    def keys(self, kind: Kind, limit: int) -> list[Key]:
        """List the first known users or organizations by id, without those that are certainly
        deleted."""
        column = records.c.logto_id
        query = sa.select(column).where(records.c.kind == kind, _is_not_deleted)
        ids = self._connection.scalars(query.order_by(column).limit(limit))
        return [Key(kind, id_) for id_ in ids]

    def memberships_of(
        self, end: Key, *, after: str = "", current: bool = False
    ) -> tuple[list[Key], str | None]:
        """Look through the next LOOKED memberships of a user or an organization after the id
        `after`, and list them, present or not; with `current`, only those that are present or in
        doubt. Return them, and the last id; None at the end.
        """
        listed: sa.ColumnElement[bool] = sa.true()
        if current:
            pair = members.c.logto_organization_id, members.c.logto_user_id
            has_row = sa.exists().where(
                pair[0] == records.c.organization_id, pair[1] == records.c.user_id
            )
            listed = sa.or_(records.c.doubtful, has_row)
        column = records.c.logto_id
        query = (
            sa.select(column, listed)
            .where(records.c[f"{end.kind}_id"] == end.id, column > after)
            .order_by(column)
            .limit(LOOKED)
        )
        rows = self._connection.execute(query).all()
        last = rows[-1][0] if len(rows) == LOOKED else None
        return [Key("membership", id_) for id_, is_listed in rows if is_listed], last

    def unread_keys(
        self, kind: Kind, since: int, *, after: str = "", with_roles: bool = False
    ) -> tuple[list[Key], str | None]:
        """Look through the next LOOKED records after the id `after`, and list those of `keys` that
        weren't read from Logto `since` then (ms), also those of which only one answer of Logto says
        that they are gone. With `with_roles`, look through the users who have roles, and at when
        these were read. Return them, and the last id; None at the end.
        """
        read_at: sa.ColumnElement[int]
        if with_roles:
            column, read_at = user_roles.c.logto_user_id, user_roles.c.read_at
            wanted = sa.select(column).distinct()
            is_listed: list[sa.ColumnElement[bool]] = []
        else:
            column, read_at = records.c.logto_id, sa.func.coalesce(records.c.read_at, -1)
            wanted = sa.select(column).where(records.c.kind == kind)
            is_gone_once = records.c.absent_at < records.c.absent_since + CONFIRMED_MS
            is_listed = [_is_not_deleted | is_gone_once]
        # A query for unread ones alone would read the whole table if there are none.
        looked_at = wanted.where(column > after).order_by(column)
        last = self._connection.scalar(looked_at.offset(LOOKED - 1).limit(1))
        query = looked_at.where(read_at < since, *is_listed)
        if last is not None:
            query = query.where(column <= last)
        return [Key(kind, id_) for id_ in self._connection.scalars(query)], last

    def waiting(self, limit: int) -> list[RefetchNeed]:
        """List the records that must be fetched from Logto, the longest waiting first.

        If the limit is reached, organizations whose members must be listed come first: one list
        replaces many requests for single records.
        """
        columns = records.c["kind", "logto_id", "waiting_reason", "doubtful"]
        query = (
            sa.select(*columns)
            .where(is_to_refetch)
            .order_by(records.c.refetch_since, records.c.kind, records.c.logto_id)
            .limit(limit)
        )
        rows = self._connection.execute(query).all()
        if len(rows) == limit:
            of_kind = records.c.kind == "organization"
            to_list = of_kind, records.c.waiting_reason.contains(MEMBERS)
            first = self._connection.execute(query.where(*to_list)).all()
            rows = list(dict.fromkeys([*first, *rows]))[:limit]
        return [
            RefetchNeed(key=Key(kind, logto_id), reason=reason, doubtful=doubtful)
            for kind, logto_id, reason, doubtful in rows
        ]

    def count_records(self, condition: sa.ColumnElement[bool]) -> int:
        """Count the records that meet a condition."""
        query = sa.select(sa.func.count()).select_from(records).where(condition)
        return self._connection.scalar(query) or 0

    def find(self, kind: Kind, query: str, limit: int) -> list[FoundRow]:
        """Find users by Logto id, local id, email, phone or username, and organizations by Logto
        id, local id or name. If none matches, find those with the query in a name, email or phone.

        One with the ID comes first, deleted ones last. An empty query finds all.
        """
        table, names = MIRROR[kind], _NAME_COLUMNS[kind]
        order = [table.c.deleted_at.is_not(None), table.c.id]
        ids = [table.c[f"logto_{kind}_id"] == query]
        ids += [table.c.id == local_id for local_id in _parse_uuid(query)]
        same = [*ids, *(table.c[name] == query for name in names.exact)]
        same += [folded(table.c[name]) == query.lower() for name in names.any_case]
        alike = [table.c[name].icontains(query, autoescape=True) for name in names.parts]
        if not query:
            alike.append(sa.true())
        for conditions, first in ((same, [sa.or_(*ids).desc()]), (alike, [])):
            wanted = sa.select(table).where(sa.or_(*conditions)).limit(limit)
            wanted = wanted.order_by(*first, *order)
            if rows := self._connection.execute(wanted).mappings().all():
                return [self._with_memberships(kind, dict(row)) for row in rows]
        return []

    def _with_memberships(self, kind: Kind, row: Row) -> FoundRow:
        logto_id = row[f"logto_{kind}_id"]
        other = OTHER_END[kind]
        reason = sa.select(records.c.waiting_reason)
        reason = reason.where(records.c.kind == kind, records.c.logto_id == logto_id)
        ends = members.c[f"logto_{other}_id"]
        present = sa.select(ends).where(members.c[f"logto_{kind}_id"] == logto_id).order_by(ends)
        doubtful_ends = records.c[f"{other}_id"]
        doubtful = sa.select(doubtful_ends).order_by(doubtful_ends)
        doubtful = doubtful.where(records.c[f"{kind}_id"] == logto_id, records.c.doubtful)
        role = user_roles.c.name
        roles = sa.select(role).where(user_roles.c.logto_user_id == logto_id).order_by(role)
        return FoundRow(
            row=row,
            waiting_for=self._connection.scalar(reason),
            memberships=list(self._connection.scalars(present)),
            memberships_in_doubt=list(self._connection.scalars(doubtful)),
            roles=list(self._connection.scalars(roles)) if kind == "user" else [],
            own_rows=self._describe_own_rows(kind, logto_id),
        )

    def _describe_own_rows(self, kind: Kind, logto_id: str) -> list[str]:
        own = mapped_rows.c
        query = sa.select(own.mapping, own.state, own.reason).where(
            is_unsettled,
            own.kind == kind,
            sa.or_(own.logto_id == logto_id, own.record_id == logto_id),
        )
        rows = self._connection.execute(query.order_by(own.mapping, own.logto_id))
        return [f"{mapping}: {state}, {reason}" for mapping, state, reason in rows]

    def _read(
        self, statement: sa.Select[Any], keys: Collection[Key], by_kind: Sequence[Row]
    ) -> dict[Key, Record]:
        known = {
            record.key: record
            for ids in by_kind
            for record in map(from_row, self._connection.execute(statement, ids).mappings())
        }
        return {key: known.get(key) or Record(key) for key in keys}

    def _insert_stubs(self, keys: Sequence[Key], by_kind: Sequence[Row]) -> None:
        known = {
            (ids["of_kind"], logto_id)
            for ids in by_kind
            for logto_id in self._connection.scalars(_SELECT_IDS, ids)
        }
        new = [key for key in keys if key not in known]
        if new:
            stubs = map(Record, new)
            ids = _make_local_ids(len(new))
            rows = [to_row(replace(stub, local_id=next(ids))) for stub in stubs]
            statement = _insert(records, tuple(rows[0]), self._connection.dialect.name)
            execute_rows(self._connection, statement.on_conflict_do_nothing(), rows)

    def _lock_memberships(self, keys: Sequence[Key], ends: Sequence[Key]) -> None:
        """Lock the memberships of `ends`. These are locked already, so they get no new ones."""
        held = {key.id for key in keys}
        for kind, statement in _SELECT_MEMBERSHIPS.items():
            if ids := [end.id for end in ends if end.kind == kind]:
                held.update(self._connection.scalars(statement, {"ids": ids}))
        self._connection.execute(LOCK_MEMBERSHIPS, {"ids": list(held)}).close()

    def _save_mirror(self, kind: Kind, changed: Sequence[Record]) -> None:
        present, absent = [], []
        for record in changed:
            row = project(record)
            if kind == "membership" and row is None:
                organization, user = record.key.organization_and_user
                absent.append({"organization": organization.id, "user": user.id})
            elif row is not None:
                present.append(row if kind == "membership" else row | {"id": record.local_id})
        _upsert(self._connection, MIRROR[kind], present)
        if absent:
            self._connection.execute(_DELETE_MEMBER, absent)

    def _save_part(self, part: Part, by_key: dict[Key, list[Row]]) -> None:
        """Replace the rows that records have in a part's table."""
        table = _PARTS[part]
        names = [column.name for column in table.primary_key]
        owners = [
            [end.id for end in key.organization_and_user] if key.kind == "membership" else key.id
            for key in sorted(by_key)
        ]
        there = self._connection.execute(_SELECT_PART[part], {"owners": owners}).mappings()
        old = {tuple(row[name] for name in names): dict(row) for row in there}
        new = {tuple(row[name] for name in names): row for rows in by_key.values() for row in rows}
        if dropped := [key for key, row in old.items() if not is_equal(new.get(key), row)]:
            own = [table.c[name] == sa.bindparam(f"of_{name}") for name in names]
            values = [
                dict(zip((f"of_{name}" for name in names), key, strict=True)) for key in dropped
            ]
            self._connection.execute(sa.delete(table).where(*own), values)
        if added := [row for key, row in new.items() if not is_equal(old.get(key), row)]:
            self._connection.execute(sa.insert(table), added)


OTHER_END: Final[dict[Kind, Kind]] = {"user": "organization", "organization": "user"}


class _Columns(Struct, frozen=True):
    """The columns by which a row can be found."""

    exact: list[str]
    any_case: list[str]
    parts: list[str]


_NAME_COLUMNS: Final[dict[Kind, _Columns]] = {
    "user": _Columns(
        exact=["phone", "username"],
        any_case=["email"],
        parts=["email", "username", "name", "phone"],
    ),
    "organization": _Columns(exact=[], any_case=["name"], parts=["name"]),
}
_NEVER_CHANGED: Final = {"id", "local_id"}


def _group_by_kind(keys: Iterable[Key]) -> list[Row]:
    """Return the parameters of a query for each kind, from sorted keys."""
    return [
        {"of_kind": kind, "ids": [key.id for key in group]}
        for kind, group in itertools.groupby(keys, key=lambda key: key.kind)
    ]


def _upsert(connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    """Insert or update rows, which all have the same columns. A local id never changes."""
    if rows:
        statement = _upsert_statement(table, tuple(rows[0]), connection.dialect.name)
        execute_rows(connection, statement, rows)


@functools.cache
def _insert(table: sa.Table, columns: tuple[str, ...], dialect: str) -> Any:
    values = inserted_values(table, columns, dialect)
    if table is records:
        values["refetch_since"] = sa.case((values["waiting_reason"].is_not(None), now()))
        values["absent_since"] = sa.case((_is_absent(values), values["absent_at"]))
    return insert_values(table, values, dialect)


@functools.cache
def _upsert_statement(table: sa.Table, columns: tuple[str, ...], dialect: str) -> Any:
    statement = _insert(table, columns, dialect)
    new = statement.excluded
    # A row is identified by Logto's ids, and a record's also by its kind.
    key = [name for name in columns if name == "kind" or name.startswith("logto_")]
    changed = {name: new[name] for name in columns if name not in {*key, *_NEVER_CHANGED}}
    if table is records:  # `refetch_since` stays while the record waits
        since = sa.func.coalesce(records.c.refetch_since, new.refetch_since)
        changed["refetch_since"] = sa.case((new.waiting_reason.is_not(None), since), else_=None)
        first = sa.func.coalesce(records.c.absent_since, new.absent_since)
        changed["absent_since"] = sa.case((_is_absent(new), first), else_=None)
    return statement.on_conflict_do_update(index_elements=key, set_=changed)


def _is_absent(row: Any) -> sa.ColumnElement[bool]:
    """Whether the last answer of Logto's API was that there is no such record."""
    return sa.and_(row["deleted_at"].is_not(None), row["read_at"] == row["absent_at"])


def _make_local_ids(count: int) -> Iterator[str]:
    """Make UUIDs of version 7. They are ordered by time, which keeps an index compact."""
    now_ms, chance = time.time_ns() // 1_000_000 << 80, os.urandom(10 * count)
    for start in range(0, 10 * count, 10):
        number = now_ms | int.from_bytes(chance[start : start + 10])
        number = number & ~(0xF << 76) | 7 << 76
        yield str(uuid.UUID(int=number & ~(0x3 << 62) | 0x2 << 62))


def to_row(record: Record) -> Row:
    """Return the columns of a record, except `refetch_since`: the database's clock sets it."""
    organization = user = None
    if record.key.kind == "membership":
        organization, user = (end.id for end in record.key.organization_and_user)
    return {
        "kind": record.key.kind,
        "logto_id": record.key.id,
        "local_id": record.local_id,
        "organization_id": organization,
        "user_id": user,
        "data": {name: group.content for name, group in record.groups.items()},
        "groups": {name: _from_group(group) for name, group in record.groups.items()},
        "facts": record.facts,
        "needs": record.needs,
        "deleted_at": record.deleted_at,
        "gone_at": _to_moment(record.gone_at),
        "absent_at": _to_moment(record.absent_at),
        "stamp": _to_moment(record.stamp),
        "told_at": _to_moment(record.told_stamp),
        "told_end": _to_moment(record.told_end),
        "read_at": record.read_at,
        "doubtful": bool(record.doubts),
        "announced": record.announced,
        "waiting_reason": record.waiting_for,
    }


def from_row(row: sa.RowMapping | Row) -> Record:
    """Return the record of a row. Without the column `data`, the contents of its groups are UNSET,
    which can't be saved."""
    data = row["data"] if "data" in row else dict.fromkeys(row["groups"], UNSET)
    return Record(
        key=Key(row["kind"], row["logto_id"]),
        groups={name: _to_group(data[name], standing) for name, standing in row["groups"].items()},
        facts=row["facts"],
        needs=row["needs"],
        gone_at=_read_gone_at(row),
        absent_at=_from_moment(row["absent_at"]),
        told_stamp=_from_moment(row["told_at"]),
        told_end=_from_moment(row["told_end"]),
        announced=row["announced"],
        local_id=row["local_id"],
    )


def _read_gone_at(row: sa.RowMapping | Row) -> int:
    """Return when it was deleted. Releases without `gone_at` wrote only `deleted_at`."""
    gone_at, deleted_at = _from_moment(row["gone_at"]), row["deleted_at"]
    if deleted_at is None or deleted_at in (gone_at, row["absent_at"]):
        return gone_at
    return max(gone_at, int(deleted_at))


def _to_moment(number: int) -> int | None:
    return None if number == NEVER else number


def _from_moment(moment: int | None) -> int:
    return NEVER if moment is None else moment


def _from_group(group: Group) -> Row:
    return {name: value for name, value in structs.asdict(group).items() if name != "content"}


def _to_group(content: Any, standing: Row) -> Group:
    ends = tuple(Contender(end, digest) for end, digest in standing["ends"])
    return Group(**standing | {"content": content, "ends": ends})


def _parse_uuid(query: str) -> list[str]:
    try:
        return [str(uuid.UUID(query))]
    except ValueError:
        return []
