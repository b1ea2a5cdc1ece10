"""Roles of users and members, as a file maps them: from deliveries and Logto's answers to rows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.file import map_tables, parse_map_file
from logto_webhooks.records.record import Change
from logto_webhooks.testing import make
from tests.integration.test_mapping_roles import (
    ACME,
    ANA,
    BO,
    EDITOR,
    JOINED,
    VIEWER,
    RoleApplication,
    read_member_roles,
    read_user_roles,
)
from tests.support.mapped_application import KINDS, learn
from tests.support.stores import Copy, StoreKind

LEFT = make.organization_membership_updated(
    id="acme", at=9_000, addedUserIds=[], removedUserIds=["ana"]
).body
FILE = """
[map.users]
table = "SCHEMA.users"
key = "logto_user_id"
columns = { email = "email", active = "not is_suspended" }
create_defaults = { plan = "free" }
when_deleted = "delete"

[map.organizations]
table = "SCHEMA.teams"
key = "logto_id"
columns = { name = "name" }
when_deleted = "delete"

[map.members]
table = "SCHEMA.team_members"
organization = "team_id"
user = "user_id"
columns = { role = { if_role = "admin", then = "admin", else = "member" } }

[map.user_roles]
table = "SCHEMA.user_roles"
user = "user_id"
role = "role_id"
columns = { logto_role = "role_id" }
create_defaults = { source = "logto" }
where = { name = ["editor", "viewer"] }

[map.member_roles]
table = "SCHEMA.member_roles"
member = "member_id"
role = "role"
role_by = "name"
"""


async def map_file(application: RoleApplication) -> HandlerRunner:
    """Map all five tables, as a service does."""
    schema = application.users.schema
    text = FILE.replace("SCHEMA.", "" if schema is None else f"{schema}.")
    application.mappings = Mappings()
    host = application.host
    await map_tables(host, parse_map_file("logto-webhooks.toml", text), application.mappings)
    host.project = application.mappings.write
    registered = application.mappings.registered
    await host.run(lambda store: store.mappings.register(registered))
    return host


@pytest.mark.parametrize("kind", KINDS)
def test_roles_come_and_go(kind: StoreKind, tmp_path: Path) -> None:
    """With the answers of Logto, in any order with the deliveries, and with their member."""

    async def live(application: RoleApplication) -> None:
        host = await map_file(application)
        other = {"r9": "other:editor"}  # which `where` excludes
        steps: list[bytes | list[Change]] = [
            *(ANA, BO, ACME, JOINED),
            read_user_roles("ana", EDITOR | VIEWER | other, 3_000),
            read_user_roles("bo", VIEWER, 3_000),
            read_member_roles({"o1": "admin", "o2": "billing"}, 3_000),
        ]
        random.Random(kind).shuffle(steps)
        for step in steps:
            if isinstance(step, bytes):
                await Copy(host).take([step])
            else:
                await learn(host, step)
        expected = [("ana", "editor"), ("ana", "viewer"), ("bo", "viewer")]
        assert application.user_role_names == expected
        assert application.member_role_names == [("ana", "admin"), ("ana", "billing")]
        rows = application.rows(application.user_roles, "logto_role", "source")
        assert rows == [("r1", "logto"), ("r2", "logto"), ("r2", "logto")]
        assert application.rows(application.members, "role") == [("admin",)]
        assert await application.problems() == []
        await learn(host, read_user_roles("ana", VIEWER, 4_000))
        await learn(host, read_member_roles({"o2": "billing"}, 4_000))
        assert application.user_role_names == expected[1:]
        assert application.member_role_names == [("ana", "billing")]
        assert application.rows(application.members, "role") == [("member",)]
        await Copy(host).take([LEFT])
        assert application.member_role_names == []
        assert application.rows(application.members, "role") == []
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)
