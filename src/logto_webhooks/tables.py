"""The public tables, for your joins and foreign keys, and a filter for Alembic.

Refer to their columns: `ForeignKey(tables.users.c.logto_user_id)`. The tables have their own
metadata, so your `create_all` and `drop_all` ignore them.

`logto-webhooks migrate` creates and changes the tables. In Alembic's `env.py`, pass
`include_object` of this module, so that autogenerate neither drops nor creates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from logto_webhooks.database import schema as private

__all__ = [
    "PublicTables",
    "include_name",
    "include_object",
    "organization_member_roles",
    "organization_members",
    "organizations",
    "public_tables",
    "user_identities",
    "user_roles",
    "users",
]

_PREFIX: Final = "logto_"
_OURS: Final = frozenset({*private.metadata.tables, private.VERSION_TABLE})


@dataclass(frozen=True)
class PublicTables:
    """The public tables in one schema."""

    users: sa.Table
    organizations: sa.Table
    organization_members: sa.Table
    user_identities: sa.Table
    user_roles: sa.Table
    organization_member_roles: sa.Table


def public_tables(
    *, schema: str | None = None, metadata: sa.MetaData | None = None
) -> PublicTables:
    """Return the tables in a PostgreSQL schema, as set in LOGTO_WEBHOOKS_SCHEMA.

    With your `metadata`, the tables are added to it, for foreign keys that are strings
    (`ForeignKey("logto_users.logto_user_id")`, and those of SQLModel). Its `create_all` then also
    creates them.
    """
    where = sa.MetaData() if metadata is None else metadata
    return PublicTables(
        users=_public(private.users, where, schema),
        organizations=_public(private.organizations, where, schema),
        organization_members=_public(private.members, where, schema),
        user_identities=_public(private.user_identities, where, schema),
        user_roles=_public(private.user_roles, where, schema),
        organization_member_roles=_public(private.member_roles, where, schema),
    )


def include_object(
    object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any
) -> bool:
    """Exclude the tables of this package from Alembic's autogenerate.

    Pass it to `context.configure`. It also excludes other tables in the database whose names start
    with `logto_`, unless one of your models maps them, because a newer release may have created
    them.
    """
    if type_ == "table":
        return not (name in _OURS or (reflected and compare_to is None and _is_ours(name)))
    table = getattr(object, "table", None)
    return not (isinstance(table, sa.Table) and table.name in _OURS)


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """Exclude the tables before Alembic reads them. This is optional: with `include_object` alone,
    Alembic reads more tables."""
    return type_ != "table" or name not in _OURS


def _is_ours(name: str | None) -> bool:
    return (name or "").startswith(_PREFIX)


def _public(source: sa.Table, metadata: sa.MetaData, schema: str | None) -> sa.Table:
    columns = [
        sa.Column(
            column.name,
            _public_type(column.type),
            primary_key=column.primary_key,
            nullable=column.nullable,
            unique=column.unique,
        )
        for column in source.columns
    ]
    return sa.Table(source.name, metadata, *columns, schema=schema)


def _public_type(private_type: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    """Return the standard SQLAlchemy type that reads a column's values."""
    if isinstance(private_type, private.Moment):
        return sa.DateTime(timezone=True)
    if isinstance(private_type, private.Json):
        return sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    return private_type


_default = public_tables()
users: Final = _default.users
organizations: Final = _default.organizations
organization_members: Final = _default.organization_members
user_identities: Final = _default.user_identities
user_roles: Final = _default.user_roles
organization_member_roles: Final = _default.organization_member_roles
