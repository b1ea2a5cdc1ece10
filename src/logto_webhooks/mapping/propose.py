"""Propose a file with mappings for the tables that a database has: `init --map`.

What is proposed can be loaded. What isn't sure is a comment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.errors import MapFileInvalid, NoUsersTable
from logto_webhooks.events.local import OrganizationRow, UserRow
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import is_required
from logto_webhooks.mapping.declare_pairs import MemberRow
from logto_webhooks.mapping.file import FILE_NAME, parse_map_file
from logto_webhooks.mapping.file_values import read_source
from logto_webhooks.mapping.own_tables import OwnTables, name_table

_HEAD: Final = """\
# Maps Logto's users, organizations and members to your tables. `logto-webhooks init --map`
# proposed it, based on the names of your tables and columns. Check each line, then run
# `logto-webhooks serve`. All options: docs/how-to/your-own-tables-without-code.md
"""
_USERS: Final = ("users", "user", "people", "accounts", "account", "customers", "members")
_ORGANIZATIONS: Final = (
    *("organizations", "organization", "orgs", "teams", "team", "companies", "company"),
    *("tenants", "tenant", "workspaces", "workspace"),
)
_EMAIL: Final = ("email", "email_address", "primary_email", "mail")
# Names of columns -> what fills them. The first group has fallbacks if they are NOT NULL.
_NAMES: Final = {
    "username": ("username", "user_name", "login", "handle"),
    "name": ("name", "full_name", "fullname", "display_name", "displayname"),
    "profile.givenName": ("first_name", "firstname", "given_name"),
    "profile.familyName": ("last_name", "lastname", "family_name", "surname"),
}
_OTHERS: Final = {
    "email": _EMAIL,
    "phone": ("phone", "phone_number", "primary_phone", "mobile"),
    "avatar": ("avatar", "avatar_url", "picture", "picture_url", "image_url", "photo_url"),
    "not is_suspended": ("active", "is_active", "enabled", "is_enabled"),
    "is_suspended": (
        *("suspended", "is_suspended", "disabled", "is_disabled"),
        *("blocked", "is_blocked", "banned", "is_banned"),
    ),
}
_FALLBACKS: Final = ("name", "username", "email", "logto_user_id")
_OF_ORGANIZATION: Final = {
    "name": ("name", "title", "display_name"),
    "description": ("description",),
}
_MAYBE_KEYS: Final = ("external_id", "auth_id", "identity_id", "oidc_sub", "sub", "auth0_id")
_ROLE: Final = ("role", "member_role", "role_name")
_TIME: Final = re.compile(
    "_at$|^(created|updated|modified|joined)(_on)?$|(^|_)date_(created|updated|modified|joined)$"
)
_PASSWORD: Final = re.compile("passw|pwd|hash|salt")
_KEEPS: Final = "set only while NULL. To copy each change, move it to columns"
_CHECK: Final = "NOT NULL, and Logto has no value for it: check this one"


_NO_MEMBERS: Final = """
# There is no [map.members], because no table with a primary key refers to {users} and to
# {organizations}. If you have a table of members, add what it lacks: a FOREIGN KEY to each of them.
# Then remove this file, and run `logto-webhooks init --map` again.
"""


class _ProposedSection(Struct, kw_only=True):
    """A section as it will be written. A line is a key, a value in TOML and a remark."""

    name: str
    dialect: str  # of the database
    unsure: str = ""  # why it is a comment
    notes: list[str] = []
    main: list[tuple[str, str, str]] = []
    columns: list[tuple[str, str, str]] = []
    fill: list[tuple[str, str, str]] = []
    create_defaults: list[tuple[str, str, str]] = []
    maybe: list[tuple[str, str]] = []  # a part, and what may be in it

    def render(self) -> str:
        """Return its text."""
        lines = [*(f"# {note}" for note in self.notes), f"[map.{self.name}]"]
        lines += map(_render_line, self.main)
        for part in ("columns", "fill", "create_defaults"):
            entries = getattr(self, part)
            remarks = [remark for place, remark in self.maybe if place == part]
            if entries or remarks:
                lines += ["", f"[map.{self.name}.{part}]", *map(_render_line, entries)]
                lines += [f"# {remark}" for remark in remarks]
        return "\n".join(lines)

    def comment_out(self, reason: str) -> str:
        """Return its text as a comment."""
        text = f"{reason}\n{self.render()}"
        return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def propose_map_file(tables: OwnTables) -> tuple[str, list[str]]:
    """Return the text of a file, and the names of the tables that it maps. Raises NoUsersTable."""
    users = _find_users(tables)
    if users is None:
        names = ", ".join(tables.list_names()) or "none"
        raise NoUsersTable(names=names)
    sections = [(_propose_users(tables, users), users)]
    last = ""
    organizations = _find_named(tables, _ORGANIZATIONS, {users.name})
    if organizations is not None:
        is_sure = _find_key(organizations) is not None
        unsure = "" if is_sure else "If these are Logto's organizations, uncomment these lines:"
        section = _propose_organizations(tables, organizations)
        section.unsure = unsure
        sections.append((section, organizations))
        members = _find_members(tables, users, organizations)
        if members is None:
            last = _NO_MEMBERS.format(users=users.name, organizations=organizations.name)
        else:
            section = _propose_members(tables, members, users, organizations)
            section.unsure = section.unsure or unsure
            sections.append((section, members))
    text, mapped = _write(tables, sections)
    return text + last, mapped


def _write(
    tables: OwnTables, sections: Sequence[tuple[_ProposedSection, sa.Table]]
) -> tuple[str, list[str]]:
    """Write those sections that can be loaded, and the others as comments."""
    texts, active, names = [_HEAD.rstrip()], "", []
    for section, table in sections:
        text = f"{active}\n\n{section.render()}"
        problem = section.unsure
        try:
            parse_map_file(FILE_NAME, text).declare(tables, Mappings())
        except MapFileInvalid as error:
            if not active:
                raise NoUsersTable(names=f"{table.name}, but {error.problem}") from None
            problem = section.unsure or f"Not complete, because {error.problem}:"
        if problem:
            texts.append(section.comment_out(problem))
        else:
            active = text
            texts.append(section.render())
            names.append(table.name)
    return "\n\n".join(texts) + "\n", names


def _propose_users(tables: OwnTables, table: sa.Table) -> _ProposedSection:
    section = _ProposedSection(name="users", dialect=tables.dialect)
    key = _add_key(section, tables, table, "logto_user_id")
    email = _find(table, _EMAIL)
    if email is not None:
        remark = "finds rows that existed before Logto"
        section.main.append(("link", _quote(email.name), remark))
    for source, names in _NAMES.items():
        for column in _find_all(table, names):
            own = {"logto_user_id"} if _is_unique(column) else _FALLBACKS
            others = [name for name in _FALLBACKS if name in own and name != source]
            value: Any = source if column.nullable else [source, *others]
            _add_column(section, UserRow, column, value, _KEEPS, part="fill")
    for source, names in _OTHERS.items():
        for column in _find_all(table, names):
            if source in ("phone", "avatar"):
                if column.nullable:  # many users have none
                    _add_column(section, UserRow, column, source, _KEEPS, part="fill")
                continue
            remark = ""
            if source == "email" and not column.nullable:
                remark = "NOT NULL: a user without an email gets no row"
            _add_column(section, UserRow, column, source, remark)
    _add_deletion(section, table, key)
    _add_required(section, table, {key}, UserRow)
    return section


def _propose_organizations(tables: OwnTables, table: sa.Table) -> _ProposedSection:
    section = _ProposedSection(name="organizations", dialect=tables.dialect)
    key = _add_key(section, tables, table, "logto_organization_id")
    for source, names in _OF_ORGANIZATION.items():
        column = _find(table, names)
        if column is not None:
            is_sure = column.nullable or source == "name"
            _add_column(section, OrganizationRow, column, source if is_sure else [source, "name"])
    _add_deletion(section, table, key)
    _add_required(section, table, {key}, OrganizationRow)
    return section


def _propose_members(
    tables: OwnTables, table: sa.Table, users: sa.Table, organizations: sa.Table
) -> _ProposedSection:
    section = _ProposedSection(name="members", dialect=tables.dialect)
    [user, *_] = _list_references(table, users)
    [organization, *_] = _list_references(table, organizations)
    section.main = [
        ("table", _quote(name_table(table)), ""),
        ("organization", _quote(organization.name), ""),
        ("user", _quote(user.name), ""),
    ]
    role = _find(table, _ROLE)
    if role is not None and not role.foreign_keys and isinstance(role.type, sa.String):
        value = {"if_role": "admin", "then": "admin", "else": "member"}
        remark = "the names of Logto's role and of yours"
        _add_column(section, MemberRow, role, value, remark)
    _add_required(section, table, {user.name, organization.name}, MemberRow)
    section.unsure = _ask_for_defaults(tables, table)
    return section


def _ask_for_defaults(tables: OwnTables, table: sa.Table) -> str:
    """Say how to give the times of a membership a default. `joined_at` can't fill them: it is null
    for members who joined before their first delivery."""
    columns = [
        column
        for column in table.c
        if (isinstance(column.type, sa.DateTime | sa.Date) or _holds_time_as_text(column))
        and is_required(column)
        and not column.foreign_keys
    ]
    if not columns:
        return ""
    names = ", ".join(column.name for column in columns)
    lines = [
        f"NOT NULL, without a default: {names}.",
        "Logto doesn't say when its existing members joined, so your database must fill these.",
    ]
    if tables.dialect == "sqlite":
        lines.append("Create the table again, with DEFAULT CURRENT_TIMESTAMP for each of these.")
    else:
        lines.append("Give each a default:")
        lines += [
            f"    ALTER TABLE {tables.quote(table)} ALTER COLUMN {tables.quote(column.name)} "
            "SET DEFAULT now();"
            for column in columns
        ]
    return "\n".join([*lines, "Then uncomment the lines below:"])


def _add_key(section: _ProposedSection, tables: OwnTables, table: sa.Table, name: str) -> str:
    """Add the table and the key's column; if there is none, say how to create it."""
    column = _find_key(table)
    key = name if column is None else str(column.name)
    section.main += [("table", _quote(name_table(table)), ""), ("key", _quote(key), "")]
    if column is None or not _is_unique(column):
        quoted_table, quoted_key = tables.quote(table), tables.quote(key)
        index = tables.quote(f"{table.name}_{key}")
        create = f"    CREATE UNIQUE INDEX {index} ON {quoted_table} ({quoted_key});"
        if column is None:
            maybe = _find(table, _MAYBE_KEYS)
            also = f" Or is it {maybe.name}?" if maybe is not None else ""
            section.notes += [
                f"{table.name} has no column for Logto's ID.{also} Add one before you start:",
                f"    ALTER TABLE {quoted_table} ADD COLUMN {quoted_key} TEXT;",
            ]
            table.append_column(sa.Column(key, sa.Text))
        else:
            section.notes.append(f"{key} has no unique index. Create one:")
        section.notes.append(create)
    return key


def _add_column(
    section: _ProposedSection,
    row_type: type[Struct],
    column: sa.Column[Any],
    value: Any,
    remark: str = "",
    part: Literal["columns", "fill"] = "columns",
) -> None:
    """Add a column, as a comment if the value doesn't fit."""
    written = _to_toml(value)
    try:
        read_source(value, row_type, column, section.dialect, ValueError)
    except ValueError as error:
        section.maybe.append((part, f"{_key(column.name)} = {written}  # {error}"))
    else:
        entries = section.fill if part == "fill" else section.columns
        entries.append((_key(column.name), written, remark))


def _add_deletion(section: _ProposedSection, table: sa.Table, key: str) -> None:
    """Add what becomes of the row of a deleted user or organization. Nothing is deleted."""
    written = {name for name, _, _ in section.columns}
    inactive = ""
    for source, gone in (("not is_suspended", False), ("is_suspended", True)):
        for column in _find_all(table, _OTHERS[source] if section.name == "users" else ()):
            if _key(column.name) in written:
                inactive = inactive or f"{_key(column.name)} = {str(gone).lower()}"
    _warn_about_taken(section, table, inactive)
    if inactive:
        value = f"{{ {inactive} }}"
        section.main.append(("when_deleted", value, 'or "delete", "unlink", "keep"'))
    elif table.c[key].nullable:
        remark = 'the row stays, without Logto\'s ID. Or "delete", "keep"'
        section.main.append(("when_deleted", '"unlink"', remark))
    else:
        section.main.append(("when_deleted", '"keep"', 'the row stays as it is. Or "delete"'))


def _warn_about_taken(section: _ProposedSection, table: sa.Table, inactive: str) -> None:
    """Say that the row of a deleted user keeps what only one row can have, and how to free it."""
    written = {name for name, _, _ in (*section.columns, *section.fill)}
    unique = [column for column in table.c if _key(column.name) in written and _is_unique(column)]
    if not unique:
        return
    names = ", ".join(column.name for column in unique)
    nulls = [f"{_key(column.name)} = {{ null = true }}" for column in unique if column.nullable]
    again = "somebody signs up" if section.name == "users" else "another one is created"
    section.notes += [
        f"The row of a deleted {section.name.removesuffix('s')} stays, and keeps its unique "
        f"values: {names}.",
        f"If {again} with the same value, the new row is a conflict. To free the value:",
    ]
    if nulls:
        values = ", ".join([inactive, *nulls] if inactive else nulls)
        section.notes.append(f"    when_deleted = {{ {values} }}")
    fixed = ", ".join(column.name for column in unique if not column.nullable)
    if fixed:
        section.notes.append(f'{fixed} can\'t be NULL: change that, or delete the row ("delete").')


def _add_required(
    section: _ProposedSection, table: sa.Table, filled: Collection[str], row_type: type[Struct]
) -> None:
    """Add values for the other NOT NULL columns of new rows."""
    written = (*section.columns, *section.fill)
    names = {*filled, *(name.strip('"') for name, _, _ in written)}
    unfilled: list[str] = []
    for column in table.c:
        if column.name in names or not is_required(column):
            continue
        key = _key(column.name)
        source, constant = _find_value(column, row_type)
        if source is not None:
            section.fill.append((key, _to_toml(source), "NOT NULL: for new rows"))
        elif constant is not None:
            section.create_defaults.append((key, _to_toml(constant), _CHECK))
        elif row_type is not MemberRow:
            if _holds_time_as_text(column):
                _add_column(section, row_type, column, "created_at", part="fill")
            unfilled.append(column.name)
    if unfilled:
        are, them = ("is", "it") if len(unfilled) == 1 else ("are", "them")
        remark = (
            f"{', '.join(unfilled)} {are} NOT NULL, and nothing fills {them}: no rows are "
            f"inserted. To insert rows, give {them} a default in your database, and remove this"
        )
        section.main.append(("create", "false", remark))


def _find_value(column: sa.Column[Any], row_type: type[Struct]) -> tuple[Any, Any]:
    """Return what can fill a column that must have a value, or else a constant for it."""
    logto_id = "logto_user_id" if row_type is UserRow else "logto_organization_id"
    is_text = isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)
    if column.foreign_keys:
        return None, None
    if isinstance(column.type, sa.DateTime):
        if row_type is MemberRow:
            return None, None
        return (["updated_at", "created_at"] if "updat" in column.name else "created_at"), None
    if row_type is not MemberRow:
        if column.primary_key and (is_text or isinstance(column.type, sa.Uuid)):
            return "id", None
        if is_text and _is_unique(column):
            return logto_id, None
    if column.primary_key or _is_unique(column) or _holds_time_as_text(column):
        return None, None
    if isinstance(column.type, sa.Enum):
        return None, column.type.enums[0]
    constants: tuple[tuple[Any, Any], ...] = (
        (sa.Boolean, False),
        (sa.Integer, 0),
        (sa.Numeric, 0),
        (sa.String, "!" if _PASSWORD.search(_plain(column.name)) else ""),
        (sa.JSON, {}),
        (sa.ARRAY, []),
    )
    return None, next((value for kind, value in constants if isinstance(column.type, kind)), None)


def _holds_time_as_text(column: sa.Column[Any]) -> bool:
    """Whether a column of text seems to hold a time, by its name."""
    is_text = isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)
    return is_text and _TIME.search(_plain(column.name)) is not None


def _find_users(tables: OwnTables) -> sa.Table | None:
    table = _find_named(tables, _USERS, (), needs_email=True)
    return table if table is not None else _find_named(tables, _USERS, (), needs_email=False)


def _find_named(
    tables: OwnTables,
    wanted: Sequence[str],
    without: Collection[str],
    needs_email: bool | None = None,
) -> sa.Table | None:
    """Find a table by what it may be called, alone or after a prefix such as `app_`."""
    names = [name for name in tables.list_names() if name not in without]
    exact = [name for want in wanted for name in names if _plain(name) == want]
    prefixed = [name for want in wanted for name in names if _plain(name).endswith(f"_{want}")]
    for name in (*exact, *prefixed):
        table = tables.find(name)
        if not list(table.primary_key):
            continue
        has_email = _find(table, _EMAIL) is not None
        if needs_email is None or has_email or (not needs_email and _find_key(table) is not None):
            return table
    return None


def _find_members(tables: OwnTables, users: sa.Table, organizations: sa.Table) -> sa.Table | None:
    """Find the table that refers to both. If several do, the name or the size tells."""
    wanted = {users.name, organizations.name}
    found = [
        tables.find(name)
        for name, referred in tables.list_referred().items()
        if wanted <= referred and name not in wanted
    ]
    found = [table for table in found if list(table.primary_key)]
    return min(
        found,
        key=lambda table: (not re.search("member|user", _plain(table.name)), len(table.c)),
        default=None,
    )


def _list_references(table: sa.Table, parent: sa.Table) -> list[sa.Column[Any]]:
    """List the columns of a table that refer to the primary key of another."""
    [*keys] = (str(column.name) for column in parent.primary_key)
    return [
        column
        for column in table.c
        if any(
            key.target_fullname in {f"{parent.fullname}.{name}" for name in keys}
            for key in column.foreign_keys
        )
    ]


def _find_key(table: sa.Table) -> sa.Column[Any] | None:
    """Find the column of Logto's id: its name says so. Of several, a unique one is probable."""
    named = [
        column
        for column in table.c
        if "logto" in _plain(column.name) and isinstance(column.type, sa.String)
    ]
    return next(iter(sorted(named, key=_is_unique, reverse=True)), None)


def _find(table: sa.Table, names: Sequence[str]) -> sa.Column[Any] | None:
    return next(iter(_find_all(table, names)), None)


def _find_all(table: sa.Table, names: Sequence[str]) -> list[sa.Column[Any]]:
    return [
        column
        for name in names
        for column in table.c
        if _plain(column.name) == name and not column.primary_key
    ]


def _is_unique(column: sa.Column[Any]) -> bool:
    table = column.table
    assert isinstance(table, sa.Table)
    unique = [
        list(constraint.columns)
        for constraint in table.constraints
        if isinstance(constraint, sa.UniqueConstraint | sa.PrimaryKeyConstraint)
    ]
    unique += [list(index.columns) for index in table.indexes if index.unique]
    return [column] in unique


def _plain(name: str) -> str:
    """`userName` and `UserName` as `user_name`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _render_line(line: tuple[str, str, str]) -> str:
    key, value, remark = line
    return f"{key} = {value}  # {remark}" if remark else f"{key} = {value}"


def _key(name: str) -> str:
    return str(name) if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quote(name)


def _quote(text: str) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _to_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = [f"{_key(name)} = {_to_toml(part)}" for name, part in value.items()]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_to_toml, value))}]"
    return _quote(value) if isinstance(value, str) else json.dumps(value)
