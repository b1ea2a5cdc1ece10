"""Read the mirror's rows as the mappings' functions get them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from logto_webhooks.database.dialect import among
from logto_webhooks.database.schema import member_roles, members, organizations, records, users
from logto_webhooks.mapping.declare import ROW_TYPES, MappedKind, MemberRow
from logto_webhooks.records.record import Key, Kind, membership

TABLES: Final[dict[MappedKind, tuple[sa.Table, str]]] = {
    "user": (users, "logto_user_id"),
    "organization": (organizations, "logto_organization_id"),
}


def read_rows(connection: sa.Connection, kind: MappedKind, ids: Collection[str]) -> dict[str, Any]:
    """Read users or organizations by Logto's id; deleted ones have `deleted_at`."""
    table, key = TABLES[kind]
    row_type = ROW_TYPES[kind]
    names = row_type.__struct_fields__
    dates = [name for name in names if name.endswith("_at")]
    query = sa.select(*(table.c[name] for name in names)).where(among(table.c[key], "ids"))
    rows = {}
    for values in connection.execute(query, {"ids": sorted(ids)}):
        fields = dict(zip(names, values, strict=True))
        fields |= {name: _to_date(fields[name]) for name in dates}
        rows[fields[key]] = row_type(**fields)
    return rows


def find_doubtful(
    connection: sa.Connection, kind: MappedKind, ids: Collection[str]
) -> Sequence[str]:
    """Return those of the records that are in doubt."""
    query = sa.select(records.c.logto_id).where(
        records.c.kind == kind, among(records.c.logto_id, "ids"), records.c.doubtful
    )
    return connection.scalars(query, {"ids": sorted(ids)}).all()


def find_present(connection: sa.Connection, kind: Kind, ids: Collection[str]) -> set[str]:
    """Return those of the records that the mirror has; also deleted users and organizations."""
    if kind == "membership":
        pairs = [Key("membership", id_) for id_ in ids]
        return {pair.id for pair in read_members(connection, pairs)}
    table, key = TABLES["user" if kind == "user" else "organization"]
    query = sa.select(table.c[key]).where(among(table.c[key], "ids"))
    return set(connection.scalars(query, {"ids": sorted(ids)}))


def read_members(connection: sa.Connection, pairs: Collection[Key]) -> dict[Key, MemberRow]:
    """Read those of the memberships that are present."""
    ends = [pair.organization_and_user for pair in pairs]
    values = {
        "organizations": sorted({organization.id for organization, _ in ends}),
        "users": sorted({user.id for _, user in ends}),
    }
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


def _of_pairs(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table).where(
        among(table.c.logto_organization_id, "organizations"),
        among(table.c.logto_user_id, "users"),
    )


def _to_date(millis: int | None) -> datetime | None:
    return None if millis is None else datetime.fromtimestamp(millis / 1000, UTC)
