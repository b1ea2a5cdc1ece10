"""What can't be in a file with mappings is said in one line, which names the file and the place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.errors import MapFileInvalid
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import RoleEnd
from logto_webhooks.mapping.file import parse_map_file, read_map_file
from logto_webhooks.mapping.own_tables import OwnTables
from tests.support.map_files import OwnDatabase, own_database

NAME = "logto-webhooks.toml"
USERS = 'table = "users"\nkey = "logto_id"\nwhen_deleted = "keep"\n'
TEAMS = 'table = "teams"\nkey = "logto_id"\nwhen_deleted = "keep"\n'
MEMBERS = 'table = "team_members"\norganization = "team_id"\nuser = "user_id"\n'
ROLES = """
[map.user_roles]
table = "user_roles"
user = "user_id"
role = "role_id"
role_by = "code"
where = { name = ["editor", "owner"] }
[map.member_roles]
table = "member_roles"
member = "member_id"
role = "role"
role_by = "name"
"""
TABLES = (
    "CREATE TABLE users (id INTEGER PRIMARY KEY, logto_id VARCHAR(40) UNIQUE, email VARCHAR(99), "
    "active BOOLEAN, age INTEGER, seen TIMESTAMP, data JSON)",
    "CREATE TABLE things (id INTEGER PRIMARY KEY, logto_id VARCHAR(40), word VARCHAR(4), "
    "small SMALLINT, price NUMERIC(5, 2), share FLOAT, day DATE, file BLOB, data JSON)",
    "CREATE TABLE of_postgres (id INTEGER PRIMARY KEY, logto_id VARCHAR(40), code UUID, "
    "numbers INTEGER[], lasts INTERVAL)",
    "CREATE TABLE teams (id INTEGER PRIMARY KEY, logto_id VARCHAR(40) NOT NULL)",
    "CREATE TABLE team_members (id INTEGER PRIMARY KEY, team_id INTEGER NOT NULL REFERENCES "
    "teams (id), user_id INTEGER NOT NULL REFERENCES users (id), role VARCHAR(9))",
    "CREATE TABLE bare (logto_id VARCHAR(40))",
    "CREATE TABLE strict (id INTEGER PRIMARY KEY, logto_id VARCHAR(40), plan VARCHAR(9) NOT NULL)",
    "CREATE TABLE roles (id INTEGER PRIMARY KEY, code VARCHAR(9) UNIQUE)",
    "CREATE TABLE user_roles (user_id INTEGER REFERENCES users (id), role_id INTEGER REFERENCES "
    "roles (id), PRIMARY KEY (user_id, role_id))",
    "CREATE TABLE member_roles (member_id INTEGER REFERENCES team_members (id), role VARCHAR(9), "
    "PRIMARY KEY (member_id, role))",
)


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("psycopg", marks=pytest.mark.postgres)]
)
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OwnDatabase]:
    """An application's tables."""
    with own_database(request.param, tmp_path_factory.mktemp("own")) as own:
        keys = {"postgresql": "SERIAL PRIMARY KEY"}.get(own.engine.dialect.name)
        tables = [
            table.replace("INTEGER PRIMARY KEY", keys or "INTEGER PRIMARY KEY").replace(
                "BLOB", "BYTEA" if keys else "BLOB"
            )
            for table in TABLES
        ]
        own.execute(*(table for table in tables if keys or "of_postgres" not in table))
        yield own


def declare(database: OwnDatabase, text: str, others: Mappings | None = None) -> Mappings:
    """Map what a file says."""
    with database.engine.connect() as connection:
        tables = OwnTables(connection)
        return parse_map_file(NAME, text).declare(tables, others or Mappings())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it maps nothing; add one of [map.users], "),
        ("map = 1", "it maps nothing; "),
        ("[map]", "it maps nothing; "),
        ("[map.users\n", "it isn't valid TOML: "),
        ("[map.user]", "there is no section [map.user]; use one of [map.users], "),
        ("[maps.users]", "there is no section [maps]; use one of [map.users], "),
    ],
)
def test_what_is_wrong_with_the_file(text: str, problem: str) -> None:
    """Its syntax, or its sections."""
    with pytest.raises(MapFileInvalid) as error:
        parse_map_file(NAME, text)
    assert str(error.value).startswith(f"{NAME}: {problem}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"[map.users]\n{USERS}emial = 1", "there is no key emial; its keys are table, columns, "),
        ('[map.users]\ntable = "users"\nwhen_deleted = "keep"', "key is missing."),
        (
            '[map.users]\ntable = "users"\nkey = "a"\n[map.users.fill]\nwhen_deleted = "keep"',
            "when_deleted is missing; when_deleted is an option: write it above [map.users.fill].",
        ),
        ("[map.users]\ntable = 1", "table must be a text in quotes, not a whole number."),
        (
            f'[map.users]\n{USERS}create = "no"',
            "create must be true or false, not a text in quotes.",
        ),
        (
            f'[map.users]\n{USERS}columns = "email"',
            "columns must be a table, not a text in quotes.",
        ),
        ("[map]\nusers = 1", "it must be a table, not a whole number."),
        ("[map]\nmembers = []", "it must be a table, not a list."),
    ],
)
def test_what_is_wrong_with_a_section(text: str, problem: str) -> None:
    """Its keys, and their types."""
    with pytest.raises(MapFileInvalid) as error:
        parse_map_file(NAME, text)
    section = "members" if "members" in text else "users"
    assert str(error.value).startswith(f"{NAME}, [map.{section}]: {problem}")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            'columns = { emial = "email" }',
            "columns: the table users has no column emial; its columns",
        ),
        ('columns = { email = "emial" }', 'columns: Logto has no "emial"; the closest is email.'),
        ('columns = { email = "email.x" }', "columns: there is nothing inside email, so "),
        ("columns = { email = 1 }", "columns: email is filled by a name such as "),
        (
            'columns = { active = "email" }',
            'columns: active is of type BOOLEAN, and "email" is a text.',
        ),
        ('columns = { email = "is_suspended" }', "columns: email is of type VARCHAR(99), and "),
        ('columns = { seen = "email" }', "columns: seen is of type TIMESTAMP, and "),
        ('columns = { age = "created_at" }', "columns: age is of type INTEGER, and "),
        ('columns = { email = "custom_data" }', "columns: email is of type VARCHAR(99), and "),
        (
            'columns = { email = "created_at" }',
            'columns: email is of type VARCHAR(99), and "created_at" is a time, which a file '
            "can't format: use a column for times, or map the table in Python, with a function "
            "that formats it.",
        ),
        (
            'columns = { email = { if_role = "a", then = 1, else = 2 } }',
            "columns: email must look ",
        ),
        (
            'columns = { active = { if = "email", then = "yes", else = false } }',
            'columns: active is of type BOOLEAN, and can\'t be "yes".',
        ),
        (
            'fill = { email = "email" }\ncolumns = { email = "email" }',
            "users: email would be filled twice.",
        ),
        ('columns = { logto_id = "email" }', "users: logto_id would be filled twice."),
        (
            'create_defaults = { active = "true" }',
            "create_defaults: active is of type BOOLEAN, and ",
        ),
        (
            "create_defaults = { email = true }",
            "create_defaults: email is of type VARCHAR(99), and ",
        ),
        (
            'columns = { where = "email" }',
            "columns: the table users has no column where; its columns are id, logto_id, email, "
            "active, age, seen, data; where is an option: write it above [map.users.columns].",
        ),
        (
            "[map.users.create_defaults]\ncreate = false",
            "create_defaults: the table users has no column create; its columns are id, logto_id, "
            "email, active, age, seen, data; create is an option: write it above "
            "[map.users.create_defaults].",
        ),
        ("create_defaults = { age = 1.5 }", "create_defaults: age is of type INTEGER, and "),
        (
            "create_defaults = { email = { a = 1 } }",
            "create_defaults: email is of type VARCHAR(99)",
        ),
        ('link = "age"', "link: rows can be linked by age only if it is in columns, too."),
        ('link = "nix"', "link: the table users has no column nix; its columns are "),
        ('where = "nix"', 'where: Logto has no "nix"; '),
        ("where = 1", "where: a condition is a name such as "),
        ("where = []", "where: a condition is a name such as "),
    ],
)
def test_what_does_not_fit_the_tables(database: OwnDatabase, lines: str, problem: str) -> None:
    """Columns, types, and what fills them."""
    with pytest.raises(MapFileInvalid) as error:
        declare(database, f"[map.users]\n{USERS}{lines}")
    assert str(error.value).startswith(f"{NAME}, [map.users]: {problem}"), str(error.value)
    assert "\n" not in str(error.value)


def declare_defaults(database: OwnDatabase, table: str, defaults: str) -> None:
    text = f"[map.users]\n{USERS.replace('users', table)}create_defaults = {{ {defaults} }}"
    declare(database, text)


@pytest.mark.parametrize(
    "default",
    [
        "price = nan",
        "day = 2026-01-02T03:04:05",
        'day = "2026-01-02"',
        'file = "text"',
        "file = 1",
        "data = { since = 2026-01-02 }",
        "data = [nan]",
        "small = 9223372036854775808",
    ],
)
def test_a_constant_that_no_database_holds(database: OwnDatabase, default: str) -> None:
    """It would fail row by row."""
    name = default.partition(" ")[0]
    with pytest.raises(MapFileInvalid, match=f"create_defaults: {name} is of type .* can't be"):
        declare_defaults(database, "things", default)


@pytest.mark.parametrize(
    "default",
    [
        'word = "words"',
        'word = "a\\u0000"',
        "small = 32768",
        "small = -32769",
        "price = 1000",
        "price = 999.996",
    ],
)
def test_a_constant_that_is_too_large_for_postgres(database: OwnDatabase, default: str) -> None:
    """SQLite holds it."""
    if database.engine.dialect.name == "sqlite":
        declare_defaults(database, "things", default)
        return
    with pytest.raises(MapFileInvalid, match=r" is of type .* can't be "):
        declare_defaults(database, "things", default)


@pytest.mark.parametrize(
    ("default", "problem"),
    [
        ('code = "no"', 'code is of type UUID, and can\'t be "no"'),
        ('numbers = [1, ["x"]]', 'an item of numbers is of type INTEGER, and can\'t be "x"'),
        ("numbers = 1", "numbers is of type .*, and can't be 1"),
        ('lasts = "1 day"', "lasts is of type INTERVAL, and can't be"),
    ],
)
def test_a_constant_of_a_type_of_postgres(
    database: OwnDatabase, default: str, problem: str
) -> None:
    """UUIDs, lists and intervals."""
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no such types")
    with pytest.raises(MapFileInvalid, match=problem):
        declare_defaults(database, "of_postgres", default)


@pytest.mark.parametrize(
    "defaults",
    [
        'word = "four", small = -32768, price = 999.99, share = 1, day = 2026-01-02',
        "small = true, price = 1, data = { a = [1, { b = 'c' }] }",
        "price = true, share = inf, word = 'four  '",
    ],
)
def test_constants_that_fit(database: OwnDatabase, defaults: str) -> None:
    """Up to their limits."""
    declare_defaults(database, "things", defaults)


def test_lists_and_uuids_that_fit(database: OwnDatabase) -> None:
    """Of PostgreSQL."""
    if database.engine.dialect.name != "sqlite":
        code = "6f5b9c1e-1111-4222-8333-444455556666"
        declare_defaults(database, "of_postgres", f'code = "{code}", numbers = [1, 2]')


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("email = true", "email is a text, so it never equals true"),
        ("email = ['a', 1]", "email is a text, so it never equals 1"),
        ("email = []", "email can't be one of no values"),
        ("is_suspended = 1", "is_suspended is a boolean, so it never equals 1"),
        ("created_at = 2026-01-02", "created_at is a time, so it never equals "),
        ("created_at = 2026-01-02T03:04:05", "created_at is a time, so it never equals "),
        ("custom_data = 'x'", 'custom_data is a JSON, so it never equals "x"'),
        ("'profile.birthdate' = 2026-01-02", "is a value inside JSON, so it never equals "),
    ],
)
def test_a_condition_that_never_holds(database: OwnDatabase, condition: str, problem: str) -> None:
    """By the types of what Logto has."""
    for text in (
        f"where = {{ {condition} }}",
        f"columns = {{ active = {{ if = {{ {condition} }}, then = true, else = false }} }}",
    ):
        with pytest.raises(MapFileInvalid) as error:
            declare(database, f"[map.users]\n{USERS}{text}")
        assert problem in str(error.value)


@pytest.mark.parametrize(
    "condition",
    [
        "email = ['a', 'b'], is_suspended = false",
        "created_at = 2026-01-02T03:04:05Z, 'profile.nickname' = 1, custom_data = { a = 1 }",
    ],
)
def test_a_condition_that_may_hold(database: OwnDatabase, condition: str) -> None:
    """Values inside JSON can be of any type."""
    declare(database, f"[map.users]\n{USERS}where = {{ {condition} }}")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("logto_id", "data."), 'key: the path "data." has an empty part.'),
        (
            ('"keep"', "{ data = { null = true } }"),
            "when_deleted: data can't be null, because it is of type JSON; use {}.",
        ),
        (("users", "usres"), "there is no table usres; the closest is users."),
        (("users", "nix.users"), "there is no schema nix; the database has "),
        (("users", "logto_users"), "logto_users is a table of logto-webhooks, not of yours."),
        (("users", "bare"), "bare: the table has no primary key."),
        (
            ("users", "strict"),
            "strict: nothing fills plan, which is NOT NULL: add it to columns or",
        ),
        (("logto_id", "age"), "users: age is of type INTEGER"),
        (("logto_id", "email.x"), "key: email isn't of type JSON, so there is nothing inside it."),
        (("keep", "remove"), 'when_deleted must be "delete", "keep", "unlink", or a table of '),
        (('"keep"', "{}"), 'when_deleted must be "delete", "keep", "unlink", or a table of '),
        (('"keep"', "true"), 'when_deleted must be "delete", "keep", "unlink", or a table of '),
        (('"keep"', "{ nix = 1 }"), "when_deleted: the table users has no column nix; "),
        (('"keep"', "{ active = 1 }"), "when_deleted: active is of type BOOLEAN, and can't be 1."),
        (('"keep"', "{ id = { null = true } }"), "when_deleted: id can't be null, because it is "),
    ],
)
def test_what_a_section_cannot_name(
    database: OwnDatabase, changed: tuple[str, str], problem: str
) -> None:
    """Tables, keys, and what becomes of deleted users."""
    with pytest.raises(MapFileInvalid) as error:
        declare(database, f"[map.users]\n{USERS.replace(*changed)}")
    assert str(error.value).startswith(f"{NAME}, [map.users]: {problem}"), str(error.value)


def test_a_column_that_is_not_null_can_be_left_to_the_application(database: OwnDatabase) -> None:
    """In the words of the file."""
    text = f"[map.users]\n{USERS.replace('users', 'strict')}"
    with pytest.raises(MapFileInvalid, match="or set create = false"):
        declare(database, text)
    assert declare(database, f"{text}create = false").entities


def members(**changed: str) -> str:
    """A file with users, teams and members."""
    text = MEMBERS
    for old, new in changed.items():
        text = text.replace(old, new)
    return f"[map.users]\n{USERS}[map.organizations]\n{TEAMS}[map.members]\n{text}"


def test_ends_that_are_swapped(database: OwnDatabase) -> None:
    """The tables to which they refer tell."""
    swapped = members(team_id="x", user_id="team_id").replace('"x"', '"user_id"')
    with pytest.raises(MapFileInvalid) as error:
        declare(database, swapped)
    assert str(error.value) == (
        f"{NAME}, [map.members]: organization: user_id refers to users, which has the rows of "
        "users; the columns are probably swapped."
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            f"[map.members]\n{MEMBERS}",
            "refers to teams, which isn't mapped; add [map.organizations] ",
        ),
        (members(team_id="user_id"), "user_id would be filled twice"),
        (members(team_id="nix"), "organization: the table team_members has no column nix; "),
        (f'{members()}columns = {{ role = {{ if_role = "a" }} }}', "columns: role must look like "),
        (f'{members()}columns = {{ role = "roles" }}', 'and "roles" is a list'),
        (
            f"{members()}columns = {{ role = {{ if = {{ roles = 'admin' }}, then = 'a', "
            "else = 'b' } }",
            "columns: roles is a list, so it never equals a constant; to compare a role, use "
            'if_role = "admin"',
        ),
        (
            f'{members()}columns = {{ role = "email" }}',
            'columns: Logto has no "email"; use one of ',
        ),
    ],
)
def test_what_is_wrong_with_members(database: OwnDatabase, text: str, problem: str) -> None:
    """Their ends and their columns."""
    with pytest.raises(MapFileInvalid) as error:
        declare(database, text)
    assert str(error.value).startswith(f"{NAME}, [map.members]: ")
    assert problem in str(error.value)


def test_roles_are_found_as_in_code(database: OwnDatabase) -> None:
    """By a column of the table of roles, or as text; of users and of members."""
    members_, users_roles, _ = declare(database, f"{members()}{ROLES}").pairs
    assert members_.pair == "member"
    role = users_roles.ends[1]
    assert isinstance(role, RoleEnd)
    assert role.match is not None
    assert role.match.name == "code"
    with pytest.raises(MapFileInvalid) as error:
        declare(database, f"{members()}{ROLES.replace('code', 'nix')}")
    assert "[map.user_roles]: role_by: the table roles has no column nix" in str(error.value)
    with pytest.raises(MapFileInvalid, match="set either member, or both organization and user"):
        declare(database, f'{members()}{ROLES}user = "member_id"')


def test_a_table_is_mapped_once(database: OwnDatabase) -> None:
    """In the file, or together with the code of an application."""
    twice = f"[map.users]\n{USERS}[map.organizations]\n{USERS}"
    with pytest.raises(MapFileInvalid, match="users: it is mapped already"):
        declare(database, twice)
    others = Mappings()
    own = sa.Table("users", sa.MetaData(), autoload_with=database.engine)
    others.add(declare_entities("user", own, key="logto_id", columns={}, when_deleted="keep"))
    with pytest.raises(MapFileInvalid, match="users: it is mapped already"):
        declare(database, f"[map.users]\n{USERS}", others)
    text = f"[map.organizations]\n{TEAMS}[map.members]\n{MEMBERS}"
    [pair] = declare(database, text, others).pairs
    assert pair.ends[1].referred == (own.c.id,)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"\xff", "it isn't a UTF-8"), (None, "can't be")]
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """Another encoding, or a folder."""
    file = tmp_path / NAME
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(MapFileInvalid, match=problem):
        read_map_file(file)


def definition(database: OwnDatabase, text: str) -> str:
    [mapping] = declare(database, text).entities
    return mapping.definition


def test_a_definition_changes_with_the_file(database: OwnDatabase) -> None:
    """But not with the order of keys, or with comments."""
    text = f'[map.users]\n{USERS}columns = {{ email = "email", active = "not is_suspended" }}\n'
    first = definition(database, text)
    other = "\n".join(["[map.users]  # mine", *reversed(text.splitlines()[1:])])
    swapped = other.replace(
        'email = "email", active = "not is_suspended"',
        'active = "not is_suspended", email = "email"',
    )
    assert definition(database, swapped) == first
    for old, new in (
        ("not is_suspended", "not email"),
        ('"keep"', '"unlink"'),
        ('email = "email"', 'email = ["email"]'),
        ("[map.users]", '[map.users]\nwhere = "email"'),
    ):
        assert definition(database, text.replace(old, new)) != first
