"""Mappings without code: the file logto-webhooks.toml, and the tables that it names.

A file says what `map_users` and the others take. The tables are reflected from the database, and
the same checks apply.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Struct, structs

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping, MapFileInvalid, SettingInvalid
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.cascades import OneMapping, explain_harm, read_cascades
from logto_webhooks.mapping.declare import ROW_TYPES as ENTITY_ROWS
from logto_webhooks.mapping.declare import EntityMapping, MappedKind, declare_entities
from logto_webhooks.mapping.declare_pairs import ROW_TYPES as PAIR_ROWS
from logto_webhooks.mapping.declare_pairs import (
    End,
    RoleEnd,
    declare_member_roles,
    declare_members,
    declare_user_roles,
    list_foreign_keys,
)
from logto_webhooks.mapping.file_values import read_condition, read_constant, read_source
from logto_webhooks.mapping.own_tables import OwnTables, TableNotFound, name_table
from logto_webhooks.mapping.report import warn_about_kept
from logto_webhooks.mapping.sources import find_python_type, is_unfit
from logto_webhooks.settings import Settings

FILE_NAME: Final = "logto-webhooks.toml"
_DELETIONS: Final = ("delete", "keep", "unlink")
_PARTS: Final = ("columns", "fill", "create_defaults", "when_deleted")
# What a declaration says in Python -> in a file.
_WORDS: Final = (
    ("pass create=False", "set create = false"),
    ('when_deleted="unlink"', 'when_deleted = "unlink"'),
    ("call map_members first", "add [map.members]"),
    ("map_members maps", "[map.members] maps"),
    ("pass either member", "set either member"),
    ("pass role_by, the column", "set role_by to the column"),
    ('role\'s name, or "id"', 'role\'s name, or to "id"'),
    ("pass organization and user", "set organization and user"),
)
_TYPES: Final = {
    "str": "a text in quotes",
    "bool": "true or false",
    "object": "a table",
    "int": "a whole number",
    "float": "a number",
    "array": "a list",
}


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of all sections."""

    table: str
    columns: dict[str, Any] = {}
    create_defaults: dict[str, Any] = {}


class EntitySection(_Section, frozen=True, kw_only=True):
    """`[map.users]` or `[map.organizations]`."""

    key: str
    when_deleted: Any
    fill: dict[str, Any] = {}
    link: str | None = None
    where: Any = None
    create: bool = True


class MembersSection(_Section, frozen=True, kw_only=True):
    """`[map.members]`."""

    organization: str
    user: str


class UserRolesSection(_Section, frozen=True, kw_only=True):
    """`[map.user_roles]`."""

    user: str
    role: str
    role_by: str | None = None
    where: Any = None


class MemberRolesSection(_Section, frozen=True, kw_only=True):
    """`[map.member_roles]`."""

    role: str
    organization: str | None = None
    user: str | None = None
    member: str | None = None
    role_by: str | None = None
    where: Any = None


class Sections(Struct, frozen=True, forbid_unknown_fields=True):
    """All sections, in the order in which they are declared."""

    users: EntitySection | None = None
    organizations: EntitySection | None = None
    members: MembersSection | None = None
    user_roles: UserRolesSection | None = None
    member_roles: MemberRolesSection | None = None


class _Content(Struct, frozen=True, forbid_unknown_fields=True):
    map: Sections


class MapFile(Struct, frozen=True):
    """A file with mappings, whose tables aren't known yet."""

    name: str
    sections: Sections

    def declare(self, tables: OwnTables, others: Mappings) -> Mappings:
        """Return the mappings of the file together with others, which come from code. Raises
        MapFileInvalid."""
        declared = Mappings()
        for mapping in others.all:
            declared.add(mapping)
        for kind in Sections.__struct_fields__:
            section = getattr(self.sections, kind)
            if section is not None:
                fail = Failure(f"{self.name}, [map.{kind}]")
                declared_now = _Declaration(tables, section, fail, declared).declare(kind)
                try:
                    declared.add(_connect_ends(declared_now, declared))
                except InvalidMapping as error:
                    raise fail(_to_file_words(f"{error.table}: {error.problem}")) from None
        return _connect(declared)


def _connect(mappings: Mappings) -> Mappings:
    """Return the mappings with columns that refer to the tables that are mapped: an application's
    code has its own objects for the tables of a file."""
    connected = Mappings()
    for mapping in mappings.all:
        connected.add(_connect_ends(mapping, mappings))
    return connected


def _connect_ends(mapping: OneMapping, mappings: Mappings) -> OneMapping:
    if isinstance(mapping, EntityMapping):
        return mapping
    tables = {other.name: other.table for other in mappings.all}
    ends = [
        end
        if isinstance(end, RoleEnd)
        else structs.replace(
            end, referred=tuple(_find_in_code(own, tables) for own in end.referred)
        )
        for end in mapping.ends
    ]
    return structs.replace(mapping, ends=tuple(ends))


def _find_in_code(column: sa.Column[Any], tables: Mapping[str, sa.Table]) -> sa.Column[Any]:
    """Return a column as the application's code has it, if its table is mapped there."""
    table = tables.get(name_table(column.table), column.table)
    return next((own for own in table.c if own.name == column.name), column)


class Failure:
    """Makes MapFileInvalid about one section."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __call__(self, problem: str) -> MapFileInvalid:
        """Say what is wrong, and what to write instead."""
        return MapFileInvalid(place=self._place, problem=problem)


def find_map_file(settings: Settings) -> MapFile | None:
    """Read the file of the settings, or else the one in the current folder, if there is one. Raises
    SettingInvalid, MapFileInvalid."""
    path = Path(settings.map_file or FILE_NAME)
    if settings.map_file is not None and not path.exists():
        problem = f"there is no file {settings.map_file}"
        raise SettingInvalid(name=settings.name_of("map_file"), problem=problem)
    return read_map_file(path) if path.exists() else None


async def map_tables(host: TransactionRunner, file: MapFile, mappings: Mappings) -> None:
    """Add the mappings of a file, all or none. The tables are reflected from the database. Raises
    MapFileInvalid, InvalidMapping, StoreUnavailable."""
    declared = await host.read(partial(_declare, file=file, others=mappings))
    declared.check_complete()
    known = {mapping.name for mapping in mappings.all}
    mappings.entities[:], mappings.pairs[:] = declared.entities, declared.pairs
    for mapping in mappings.all:
        if mapping.name not in known:
            warn_about_kept(mapping)


def _declare(store: Store, file: MapFile, others: Mappings) -> Mappings:
    """Declare the mappings of a file. Tables that it doesn't name aren't reflected, but rows can be
    deleted by way of them."""
    declared = file.declare(OwnTables(store.connection), others)
    known = {mapping.name for mapping in others.all}
    for harm in read_cascades(store.connection, declared.all).list_harms():
        if not known.issuperset((harm.mapping.name, harm.parent.name)):
            problem = f"{harm.mapping.name}: {explain_harm(harm)}"
            raise MapFileInvalid(place=file.name, problem=problem)
    return declared


def read_map_file(path: Path) -> MapFile:
    """Read a file. Raises MapFileInvalid."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MapFileInvalid(
            place=str(path), problem=f"it can't be read ({error.strerror})"
        ) from None
    except UnicodeDecodeError:
        raise MapFileInvalid(place=str(path), problem="it isn't a UTF-8 text file") from None
    return parse_map_file(str(path), text)


def parse_map_file(name: str, text: str) -> MapFile:
    """Parse the text of a file. Raises MapFileInvalid."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MapFileInvalid(place=name, problem=f"it isn't valid TOML: {error}") from None
    except RecursionError:
        raise MapFileInvalid(place=name, problem="it is nested too deeply") from None
    try:
        sections = msgspec.convert(content, _Content).map
    except msgspec.ValidationError as error:
        raise _explain(name, str(error), content) from None
    if not any(structs.astuple(sections)):
        raise MapFileInvalid(place=name, problem=_NOTHING)
    return MapFile(name, sections)


_SECTIONS: Final = ", ".join(f"[map.{kind}]" for kind in Sections.__struct_fields__)
_NOTHING: Final = f"it maps nothing; add one of {_SECTIONS}"
_STRUCTS: Final[dict[str, type[Struct]]] = {
    "users": EntitySection,
    "organizations": EntitySection,
    "members": MembersSection,
    "user_roles": UserRolesSection,
    "member_roles": MemberRolesSection,
}


def _explain(name: str, error: str, content: Mapping[str, Any]) -> MapFileInvalid:
    """Say in plain words what msgspec found."""
    problem, _, path = error.partition(" - at `$")
    _, _, place = path.rstrip("`").lstrip(".").partition("map")
    kind, _, key = place.lstrip(".").partition(".")
    if kind not in _STRUCTS:
        if unknown := re.search(r"unknown field `(.*)`", problem):
            section = f"{'map.' if path.startswith('.map') else ''}{unknown[1]}"
            problem = f"there is no section [{section}]; use one of {_SECTIONS}"
            return MapFileInvalid(place=name, problem=problem)
        return MapFileInvalid(place=name, problem=_NOTHING)
    where = f"{name}, [map.{kind}]"
    allowed = ", ".join(_STRUCTS[kind].__struct_fields__)
    if unknown := re.search(r"unknown field `(.*)`", problem):
        return MapFileInvalid(
            place=where, problem=f"there is no key {unknown[1]}; its keys are {allowed}"
        )
    if missing := re.search(r"missing required field `(.*)`", problem):
        hint = _find_misplaced(content["map"][kind], kind, missing[1])
        return MapFileInvalid(place=where, problem=f"{missing[1]} is missing{hint}")
    expected, got = re.findall(r"`(\w+)[^`]*`", problem)
    words = _TYPES.get(expected, expected)
    return MapFileInvalid(
        place=where, problem=f"{key or 'it'} must be {words}, not {_TYPES.get(got, got)}"
    )


def _find_misplaced(section: Mapping[str, Any], kind: str, option: str) -> str:
    """Return a hint if an option is in one of the section's tables: in TOML, what follows the
    header of a table belongs to it."""
    parts = (part for part, values in section.items() if isinstance(values, dict))
    return next((_hint(kind, part, option) for part in parts if option in section[part]), "")


def _hint(kind: str, part: str, option: str) -> str:
    return f"; {option} is an option: write it above [map.{kind}.{part}]"


class _Declaration:
    """Declares the mapping of one section."""

    def __init__(self, tables: OwnTables, section: Any, fail: Failure, others: Mappings) -> None:
        self._tables = tables
        self._section = section
        self._fail = fail
        self._others = others

    def declare(self, kind: str) -> OneMapping:
        """Declare it. Raises MapFileInvalid."""
        self._kind = kind
        try:
            self._table = self._tables.find(self._section.table)
            mapping = self._declare(kind)
        except TableNotFound as error:
            raise self._fail(error.problem) from None
        except InvalidMapping as error:
            raise self._fail(_to_file_words(f"{error.table}: {error.problem}")) from None
        definition = _digest(self._section)
        if isinstance(mapping, EntityMapping):
            return structs.replace(mapping, definition=definition)
        for end in mapping.ends:
            self._check_end(end)
        return structs.replace(mapping, definition=definition)

    def _declare(self, kind: str) -> OneMapping:
        if kind == "users":
            return self._declare_entities("user")
        if kind == "organizations":
            return self._declare_entities("organization")
        if kind == "members":
            return declare_members(
                self._table, **self._find_ends("organization", "user"), **self._read_pairs("member")
            )
        if kind == "user_roles":
            return declare_user_roles(
                self._table,
                **self._find_ends("user", "role"),
                **self._read_pairs("user_role"),
                **self._read_role("user_role"),
            )
        return declare_member_roles(
            self._table,
            **self._find_ends("organization", "user", "member", "role"),
            **self._read_pairs("member_role"),
            **self._read_role("member_role"),
        )

    def _declare_entities(self, kind: MappedKind) -> EntityMapping:
        section, row_type = self._section, ENTITY_ROWS[kind]
        sources = {name: self._read_sources(name, row_type) for name in ("columns", "fill")}
        link = None if section.link is None else self._find_column(section.link, "link").key
        if link is not None and link not in {*sources["columns"], *row_type.__struct_fields__}:
            raise self._fail(f"link: rows can be linked by {link} only if it is in columns, too")
        where = section.where
        return declare_entities(
            kind,
            self._table,
            key=self._find_key(section.key),
            columns=sources["columns"],
            fill=sources["fill"],
            create_defaults=self._read_constants(section.create_defaults, "create_defaults"),
            link=link,
            where=None if where is None else read_condition(where, row_type, self._at("where")),
            create=section.create,
            when_deleted=self._read_deletion(section.when_deleted),
        )

    def _read_pairs(self, pair: Literal["member", "user_role", "member_role"]) -> dict[str, Any]:
        return {
            "columns": self._read_sources("columns", PAIR_ROWS[pair]),
            "create_defaults": self._read_constants(
                self._section.create_defaults, "create_defaults"
            ),
        }

    def _read_role(self, pair: Literal["user_role", "member_role"]) -> dict[str, Any]:
        section = self._section
        by: Any = section.role_by
        column = self._find_column(section.role, "role")
        referred = next((key.column for key in list_foreign_keys(column)), None)
        if referred is not None and by not in (None, "id", "name"):
            by = self._find_in(referred.table, by, "role_by")
        where = section.where
        if where is not None:
            where = read_condition(where, PAIR_ROWS[pair], self._at("where"))
        return {"role_by": by, "where": where}

    def _find_ends(self, *names: str) -> dict[str, Any]:
        ends: dict[str, Any] = {}
        for name in names:
            wanted = getattr(self._section, name)
            if wanted is not None:
                column = self._find_column(wanted, name)
                self._tables.find_parents(column)
                ends[name] = column.key
        return ends

    def _check_end(self, end: End) -> None:
        """Check that what a column refers to is mapped, to records of its own kind."""
        if isinstance(end, RoleEnd) or not end.referred:
            return
        tables = [name_table(own.table) for own in end.referred]
        mapped = next((other for other in self._others.all if other.name in tables), None)
        referred = tables[0] if mapped is None else mapped.name
        own_type = find_python_type(end.column)
        holds_id = own_type is None or not is_unfit(str, own_type)
        if mapped is None and holds_id and not any(own.primary_key for own in end.referred):
            return
        if mapped is None:
            section = {"user": "users", "organization": "organizations"}.get(end.kind, "members")
            raise self._fail(
                f"{end.kind}: {end.column.name} refers to {referred}, which isn't mapped; add "
                f"[map.{section}] for it"
            )
        mapped_kind = mapped.kind if isinstance(mapped, EntityMapping) else mapped.pair
        if mapped_kind != end.kind:
            raise self._fail(
                f"{end.kind}: {end.column.name} refers to {referred}, which has the rows of "
                f"{mapped_kind.replace('_', ' ')}s; the columns are probably swapped"
            )

    def _read_sources(self, name: str, row_type: type[Struct]) -> dict[str, Any]:
        sources = {}
        for column_name, value in getattr(self._section, name).items():
            column = self._find_column(column_name, name)
            sources[column.key] = read_source(
                value, row_type, column, self._tables.dialect, self._at(name)
            )
        return sources

    def _read_constants(self, values: Mapping[str, Any], name: str) -> dict[str, Any]:
        constants = {}
        for column_name, value in values.items():
            column = self._find_column(column_name, name)
            constants[column.key] = read_constant(
                value, column, self._tables.dialect, self._at(name)
            )
        return constants

    def _read_deletion(self, value: Any) -> Any:
        if isinstance(value, dict) and value:
            return self._read_constants(value, "when_deleted")
        if value not in _DELETIONS:
            raise self._fail(
                'when_deleted must be "delete", "keep", "unlink", or a table of columns with their '
                "values, such as { active = false }"
            )
        return value

    def _find_key(self, key: str) -> Any:
        """Find the column of the key, or the path inside a JSON column."""
        if key in self._table.c or "." not in key:
            return self._find_column(key, "key").key
        name, *path = key.split(".")
        if not all(path):
            raise self._fail(f'key: the path "{key}" has an empty part')
        column: Any = self._find_column(name, "key")
        if not isinstance(column.type, sa.JSON):
            raise self._fail(f"key: {name} isn't of type JSON, so there is nothing inside it")
        for part in path:
            column = column[part]
        return column

    def _find_column(self, name: str, place: str) -> sa.Column[Any]:
        return self._find_in(self._table, name, place)

    def _find_in(self, table: sa.Table, name: str, place: str) -> sa.Column[Any]:
        column = table.c.get(name)
        if column is None:
            names = ", ".join(table.c.keys())
            problem = f"the table {table.fullname} has no column {name}; its columns are {names}"
            if place in _PARTS and name in self._section.__struct_fields__:
                problem += _hint(self._kind, place, name)
            raise self._fail(f"{place}: {problem}")
        return column

    def _at(self, place: str) -> Callable[[str], MapFileInvalid]:
        return lambda problem: self._fail(f"{place}: {problem}")


def _digest(section: Struct) -> str:
    """Digest what a section says. The order of its keys makes no difference."""
    return hashlib.sha256(msgspec.json.encode(section, order="sorted")).hexdigest()[:32]


def _to_file_words(problem: str) -> str:
    for python, toml in _WORDS:
        problem = problem.replace(python, toml)
    return problem
