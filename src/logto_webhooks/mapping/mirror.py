"""Read the mirror's rows as the mappings' functions get them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.dialect import among, among_pairs
from logto_webhooks.database.records import from_row
from logto_webhooks.database.schema import (
    mapped_rows,
    member_roles,
    members,
    organizations,
    records,
    user_roles,
    users,
)
from logto_webhooks.mapping.declare import ROW_TYPES, MappedKind
from logto_webhooks.mapping.declare_pairs import (
    MemberRoleRow,
    MemberRow,
    PairKind,
    PairRow,
    UserRoleRow,
)
from logto_webhooks.records.record import Key, membership

TABLES: Final[dict[MappedKind, tuple[sa.Table, str]]] = {
    "user": (users, "logto_user_id"),
    "organization": (organizations, "logto_organization_id"),
}


# Without the contents of groups, which can be large.
_SELECT_HEADS: Final = sa.select(*(column for column in records.c if column.name != "data")).where(
    records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids")
)


@functools.cache  # made once, because a batch needs it several times
def _select_rows(kind: MappedKind) -> sa.Select[Any]:
    table, key = TABLES[kind]
    columns = (table.c[name] for name in ROW_TYPES[kind].__struct_fields__)
    return sa.select(*columns).where(among(table.c[key], "ids"))


def read_rows(connection: sa.Connection, kind: MappedKind, ids: Collection[str]) -> dict[str, Any]:
    """Read users or organizations by Logto's id; deleted ones have `deleted_at`."""
    _, key = TABLES[kind]
    row_type = ROW_TYPES[kind]
    names = row_type.__struct_fields__
    dates = [name for name in names if name.endswith("_at")]
    rows = {}
    for values in connection.execute(_select_rows(kind), {"ids": sorted(ids)}):
        fields = dict(zip(names, values, strict=True))
        fields |= {name: _to_date(fields[name]) for name in dates}
        rows[fields[key]] = row_type(**fields)
    return rows


def has_unknown(
    connection: sa.Connection, mapping: str, kind: MappedKind, ids: Collection[str]
) -> bool:
    """Whether the mirror has records, other than these, of which a mapping knows nothing yet."""
    table, name = TABLES[kind]
    is_known = sa.exists().where(
        mapped_rows.c.mapping == mapping, mapped_rows.c.logto_id == table.c[name]
    )
    query = sa.select(sa.literal(1)).where(
        table.c.deleted_at.is_(None), ~is_known, ~among(table.c[name], "ids")
    )
    # Records are compared in this order, so the last one is uncompared for the longest time.
    query = query.order_by(table.c[name].desc()).limit(1)
    return connection.scalar(query, {"ids": sorted(ids)}) is not None


def find_doubtful(
    connection: sa.Connection, kind: MappedKind, ids: Collection[str]
) -> Sequence[str]:
    """Return those of the records that are in doubt."""
    query = sa.select(records.c.logto_id).where(
        records.c.kind == kind, among(records.c.logto_id, "ids"), records.c.doubtful
    )
    return connection.scalars(query, {"ids": sorted(ids)}).all()


def find_partial(connection: sa.Connection, kind: MappedKind, ids: Collection[str]) -> set[str]:
    """Return those of the records of which Logto hasn't sent all yet."""
    rows = connection.execute(_SELECT_HEADS, {"of_kind": kind, "ids": sorted(ids)}).mappings()
    heads = map(from_row, rows)
    return {head.key.id for head in heads if head.is_in_part}


def find_present(connection: sa.Connection, kind: MappedKind, ids: Collection[str]) -> set[str]:
    """Return those of the records that the mirror has, deleted or not."""
    table, key = TABLES[kind]
    query = sa.select(table.c[key]).where(among(table.c[key], "ids"))
    return set(connection.scalars(query, {"ids": sorted(ids)}))


class Pair(Struct, frozen=True):
    """A membership, or a role that a user or a member has. Its record is the membership or the
    user."""

    id: str
    record_id: str
    row: PairRow


def read_pairs(connection: sa.Connection, pair: PairKind, ids: Collection[str]) -> list[Pair]:
    """Read the memberships or roles of records, in order."""
    if pair == "user_role":
        return _read_user_roles(connection, ids)
    keys = [Key("membership", id_) for id_ in ids]
    if pair == "member_role":
        return _read_member_roles(connection, keys)
    return [Pair(key.id, key.id, row) for key, row in read_members(connection, keys).items()]


def _read_user_roles(connection: sa.Connection, users: Collection[str]) -> list[Pair]:
    query = (
        sa.select(user_roles.c.logto_user_id, user_roles.c.role_id, user_roles.c.name)
        .where(among(user_roles.c.logto_user_id, "users"))
        .order_by(user_roles.c.logto_user_id, user_roles.c.role_id)
    )
    return [
        Pair(f"{user}:{role}", user, UserRoleRow(user_id=user, role_id=role, name=name))
        for user, role, name in connection.execute(query, {"users": sorted(users)})
    ]


def _read_member_roles(connection: sa.Connection, memberships: Collection[Key]) -> list[Pair]:
    rows: dict[Key, list[MemberRoleRow]] = {}
    query = _of_pairs(member_roles).order_by(member_roles.c.role_id)
    for row in connection.execute(query, _name_pairs(memberships)):
        role = MemberRoleRow(
            organization_id=row.logto_organization_id,
            user_id=row.logto_user_id,
            role_id=row.role_id,
            name=row.name,
        )
        rows.setdefault(membership(role.organization_id, role.user_id), []).append(role)
    return [
        Pair(f"{key.id}:{role.role_id}", key.id, role)
        for key in memberships
        for role in rows.get(key, ())
    ]


def _name_pairs(memberships: Collection[Key]) -> dict[str, list[list[str]]]:
    return {"pairs": [[end.id for end in key.organization_and_user] for key in memberships]}


def read_members(connection: sa.Connection, pairs: Collection[Key]) -> dict[Key, MemberRow]:
    """Read those of the memberships that are present."""
    values = _name_pairs(pairs)
    roles: dict[Key, list[tuple[str, str]]] = {}
    for row in connection.execute(_of_pairs(member_roles), values):
        key = membership(row.logto_organization_id, row.logto_user_id)
        roles.setdefault(key, []).append((row.name, row.role_id))
    rows = {}
    for row in connection.execute(_of_pairs(members), values):
        key = membership(row.logto_organization_id, row.logto_user_id)
        named = sorted(roles.get(key, ()))
        rows[key] = MemberRow(
            organization_id=row.logto_organization_id,
            user_id=row.logto_user_id,
            joined_at=_to_date(row.joined_at),
            roles=tuple(name for name, _ in named),
            role_ids=tuple(role_id for _, role_id in named),
        )
    return {pair: rows[pair] for pair in pairs if pair in rows}


@functools.cache  # made once, because a batch needs it several times
def _of_pairs(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table).where(
        among_pairs(table.c.logto_organization_id, table.c.logto_user_id, "pairs")
    )


def _to_date(millis: int | None) -> datetime | None:
    return None if millis is None else datetime.fromtimestamp(millis / 1000, UTC)
