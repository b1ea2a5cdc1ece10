"""Translate errors of SQLAlchemy and its drivers into ours, which quote no value of a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Union

import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy import exc

from logto_webhooks.errors import (
    LogtoWebhooksError,
    NoAnswer,
    RowRejected,
    StoreUnavailable,
    TimedOut,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

# The execution option of an engine with the name of the setting that its URL came from.
SETTING: Final = "logto_setting"
# A lock or a statement took too long. Other work in the same database can still succeed.
_TIMED_OUT: Final = ("55P03", "57014")
_INTERRUPTED: Final = "SQLITE_INTERRUPT"
NO_PERMISSION: Final = (
    "run the command as the service's user, or give this user write permission for the file and "
    "its folder, which reading needs, too"
)
# Primary keys of our tables whose values are from a sequence.
_NUMBERED: Final = tuple(
    f"logto_{table}_pkey" for table in ("deliveries", "jobs", "lines", "rejected")
)
# A pattern of the SQLSTATE and the message -> what to do. psycopg's errors while connecting have no
# SQLSTATE.
_HINTS: Final = (
    ("^3D000|database .* does not exist", "create it, then run: logto-webhooks migrate"),
    ("channel binding", "remove channel_binding from {setting}, or use a server with TLS"),
    ("SSL|ssl|certificate", "check what the server supports, and correct sslmode in {setting}"),
    ("^28|role .* does not exist|authentication failed", "correct user and password in {setting}"),
    ("resolve|not known", "correct the host in {setting}"),
    (
        "refused|Connect call|No such file",
        "check that the server is running, and that {setting} is right",
    ),
    ("unrecognized configuration parameter", "correct options in {setting}"),
    ("not a database", "set {setting} to another file"),
    ("unable to open database file|readonly database", NO_PERMISSION),
    (
        f"unique_violation.*constraint ({'|'.join(_NUMBERED)})",
        "its sequence is behind, as after a failover by logical replication: run logto-webhooks "
        "migrate",
    ),
    ("is locked", "wait, or end the program that locks it, which fuser shows"),
)
_PAGE: Final = "docs/how-to/database-rights.md"
# A pattern of a server's "permission denied" -> how to grant what is missing.
_RIGHTS: Final = (
    (
        r"for (?:table|relation|view) (\S+)",
        "an owner must run: GRANT SELECT, INSERT, UPDATE, DELETE ON {0} TO {role}",
    ),
    (r"for sequence (\S+)", "an owner must run: GRANT USAGE ON SEQUENCE {0} TO {role}"),
    (
        r"for schema (\S+)",
        "an owner must run: GRANT {rights} ON SCHEMA {0} TO {role}; or set LOGTO_WEBHOOKS_SCHEMA "
        "to a schema that belongs to {role}",
    ),
    (
        r"for database (\S+)",
        "creating a schema needs CREATE on the database: an owner must run "
        "CREATE SCHEMA name AUTHORIZATION {role}, with the name in LOGTO_WEBHOOKS_SCHEMA",
    ),
    (r"must be owner of (?:table|relation|index|sequence) (\S+)", "run it as the owner of {0}"),
)
_NO_SCHEMA: Final = "^3F000|no schema has been selected"
_NO_SCHEMA_HINT: Final = (
    "the role's search_path contains no schema that it can use: set LOGTO_WEBHOOKS_SCHEMA, or run "
    "ALTER ROLE {role} SET search_path = name"
)

Place = Union[sa.URL, sa.Engine, "AsyncEngine"]


@contextmanager
def translate_errors(place: Place) -> Iterator[None]:
    """Turn errors of SQLAlchemy and its drivers into StoreUnavailable or RowRejected.

    The message is the driver's first line, or only names and codes if that may quote a row. The
    place of the URL follows, and what to do if that is known. Drivers raise some errors while
    connecting unwrapped, which are recognized by their SQLSTATE.
    """
    try:
        yield
    except LogtoWebhooksError:
        raise
    except exc.TimeoutError as error:
        raise StoreUnavailable(problem="all connections are in use") from error
    except exc.DBAPIError as error:
        error.hide_parameters = True  # a traceback would show them: personal data, keys
        raise _to_error(error.orig or error, error, place) from error
    except exc.StatementError as error:
        error.hide_parameters = True
        raise RowRejected(problem=type(error.orig or error).__name__) from error
    except OverflowError as error:  # from SQLite's driver
        raise RowRejected(problem="a number is too large") from error
    except (OSError, TimeoutError) as error:
        raise _to_unavailable(error, place) from error
    except Exception as error:
        if not hasattr(error, "sqlstate") and not _is_of_asyncpg(error):
            raise
        raise _to_error(error, error, place) from error


def place_of(url: sa.URL) -> str:
    """Return the URL without user, password and options, which may contain secrets."""
    backend = url.get_backend_name()
    host = url.host or ""
    if not host:  # SQLAlchemy also takes it from the query
        queried = url.query.get("host", "")
        host = queried if isinstance(queried, str) else ",".join(queried)
    if "," in host or host.startswith("/"):
        return f"{backend}://{host}/{url.database or ''}"
    bare = sa.URL.create(backend, host=host or None, port=url.port, database=url.database)
    return bare.render_as_string()


def _is_of_asyncpg(error: Exception) -> bool:
    """Whether asyncpg raised the error by itself. Such errors have no SQLSTATE."""
    return any(base.__module__ == "asyncpg.exceptions._base" for base in type(error).__mro__)


def _to_error(
    cause: BaseException, error: Exception, place: Place
) -> StoreUnavailable | RowRejected:
    diagnostics = diagnose(cause)
    if diagnostics is not None and diagnostics.is_of_row:
        return RowRejected(problem=diagnostics.describe())
    if diagnostics is None and isinstance(error, exc.DataError | exc.IntegrityError):
        return RowRejected(problem=_describe_sqlite(cause))
    return _to_unavailable(cause, place, getattr(error, "statement", None) or "")


def _describe_sqlite(cause: BaseException) -> str:
    """Describe an error of SQLite by names and codes only."""
    name: str = getattr(cause, "sqlite_errorname", type(cause).__name__)
    # Others can quote what a trigger raises.
    names_columns = name.endswith(("_UNIQUE", "_PRIMARYKEY", "_NOTNULL"))
    columns = str(cause).partition("constraint failed: ")[2]
    return f"{name}: {columns}" if names_columns and columns else name


def _to_unavailable(cause: BaseException, place: Place, statement: str = "") -> StoreUnavailable:
    url = place if isinstance(place, sa.URL) else place.url
    diagnostics = diagnose(cause)
    if diagnostics is not None and diagnostics.may_quote_row:
        text = diagnostics.describe()
    else:
        line = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        text = _hide_secrets(line, url)
    sqlstate = diagnostics.sqlstate if diagnostics else ""
    coded = f"{sqlstate} {text}"
    setting = "the database's URL"
    if not isinstance(place, sa.URL):
        setting = place.get_execution_options().get(SETTING, "the application's engine")
    hint = _find_hint(coded, setting, url.username or "the role", statement)
    kind: type[StoreUnavailable] = StoreUnavailable
    if isinstance(cause, TimeoutError):
        kind = NoAnswer
    if sqlstate in _TIMED_OUT or getattr(cause, "sqlite_errorname", None) == _INTERRUPTED:
        kind = TimedOut
    return kind(problem=f"{text} ({place_of(url)}){hint}")


def _find_hint(coded: str, setting: str, role: str, statement: str) -> str:
    """Return what to do, after a semicolon; an empty text if that isn't known."""
    rights = "USAGE, CREATE" if re.match(r"\s*(CREATE|ALTER|DO)\b", statement) else "USAGE"
    role = role if role.isidentifier() else f'"{role}"'
    if "permission denied" in coded or "must be owner" in coded:
        for sign, do in _RIGHTS:
            if match := re.search(sign, coded):
                return f"; {do.format(*match.groups(), role=role, rights=rights)} ({_PAGE})"
    if re.search(_NO_SCHEMA, coded):
        return f"; {_NO_SCHEMA_HINT.format(role=role)} ({_PAGE})"
    return next(
        (f"; {do.format(setting=setting)}" for sign, do in _HINTS if re.search(sign, coded)), ""
    )


def _hide_secrets(text: str, url: sa.URL) -> str:
    """Hide the secrets of a URL, because a driver may quote them."""
    secrets = [str(url.password or "")]
    if ":" in (url.username or ""):
        secrets.append(str(url.username).partition(":")[2])
    for name in ("password", "sslpassword"):
        secrets.extend(url.normalized_query.get(name, ()))
    for secret in secrets:
        if len(secret) > 3:  # a shorter one would hide parts of words
            text = text.replace(secret, "***")
    return text


# Classes of SQLSTATE that are about a row, or about what the database runs while it is written: bad
# data, a constraint, a program limit, a trigger, a function.
_ROW_CLASSES: Final = ("09", "20", "21", "22", "23", "27", "2F", "38", "39", "44", "54", "P0")
# The server's functions for RAISE and ASSERT in a trigger, and for refusing a row by a policy.
_RAISING_FUNCTIONS: Final = ("exec_stmt_raise", "exec_stmt_assert")
_POLICY_FUNCTION: Final = "ExecWithCheckOptions"
_OF_ALL: Final = ("25", "40", "53", "55P03", "57")
# Errors that a new session may not have: the old one may have outdated settings of ALTER DATABASE
# or ALTER ROLE (read-only, search_path, role), outdated prepared statements, or no server any more.
_SESSION_CLASSES: Final = ("08", "0A000", "25", "26000", "3F000", "42501", "42P01", "42P05", "57P")
# Messages of these only name tables, roles and settings, even if a trigger causes them.
_NAMES_ONLY: Final = ("25", "40", "42501", "53", "55", "57")
_NAMES: Final = {
    "22001": "string_data_right_truncation",
    "22003": "numeric_value_out_of_range",
    "22007": "invalid_datetime_format",
    "22008": "datetime_field_overflow",
    "22012": "division_by_zero",
    "22021": "character_not_in_repertoire",
    "22023": "invalid_parameter_value",
    "22P02": "invalid_text_representation",
    "23001": "restrict_violation",
    "23502": "not_null_violation",
    "23503": "foreign_key_violation",
    "23505": "unique_violation",
    "23514": "check_violation",
    "23P01": "exclusion_violation",
    "42501": "insufficient_privilege",
    "44000": "with_check_option_violation",
    "54000": "program_limit_exceeded",
    "P0001": "raise_exception",
    "P0002": "no_data_found",
    "P0003": "too_many_rows",
    "P0004": "assert_failure",
}


class Diagnostics(Struct, frozen=True):
    """The fields of a server's error. `raised_in` is the function in the server's source that
    raised it, and `context` says which functions of the database were running."""

    sqlstate: str
    table: str | None
    column: str | None
    constraint: str | None
    raised_in: str | None
    context: str | None

    @property
    def is_of_row(self) -> bool:
        """Whether the error is about the row that was written, so that others can be written."""
        if self.is_of_sequence:
            return False
        if self.raised_in in _RAISING_FUNCTIONS or self.raised_in == _POLICY_FUNCTION:
            return True  # a trigger can choose any SQLSTATE
        return self.sqlstate.startswith(_ROW_CLASSES)

    @property
    def is_of_function(self) -> bool:
        """Whether it came from a trigger or a function, not from a lack of something that all need,
        such as time, memory or a lock."""
        return self.context is not None and not self.sqlstate.startswith(_OF_ALL)

    @property
    def is_of_sequence(self) -> bool:
        """Whether a number that the database made for one of our rows is taken."""
        return self.sqlstate == "23505" and self.constraint in _NUMBERED

    @property
    def is_of_session(self) -> bool:
        """Whether the session may be the cause, so that another may succeed."""
        return not self.is_of_row and self.sqlstate.startswith(_SESSION_CLASSES)

    @property
    def may_quote_row(self) -> bool:
        """Whether the message may contain a value of a row."""
        if self.is_of_row or self.is_of_sequence:
            return True
        return self.context is not None and not self.sqlstate.startswith(_NAMES_ONLY)

    def describe(self) -> str:
        """Describe the error by names and codes only."""
        name = _NAMES.get(self.sqlstate)
        error = f"{name} ({self.sqlstate})" if name else f"SQLSTATE {self.sqlstate}"
        if self.raised_in in _RAISING_FUNCTIONS:  # it may give any name
            return f"{error}, raised by a trigger or function of the database"
        names = {"table": self.table, "column": self.column, "constraint": self.constraint}
        return ", ".join([error, *(f"{kind} {name}" for kind, name in names.items() if name)])


def diagnose(error: BaseException) -> Diagnostics | None:
    """Return the server's fields of a driver's error; None if the error isn't the server's."""
    sqlstate: str | None = getattr(error, "sqlstate", None)
    if not sqlstate:
        return None
    of_psycopg: Any = getattr(error, "diag", None)
    if of_psycopg is not None:
        return Diagnostics(
            sqlstate,
            of_psycopg.table_name,
            of_psycopg.column_name,
            of_psycopg.constraint_name,
            of_psycopg.source_function,
            of_psycopg.context,
        )
    # SQLAlchemy wraps asyncpg's errors.
    of_asyncpg = error if hasattr(error, "server_source_function") else error.__cause__
    names = ("table_name", "column_name", "constraint_name", "server_source_function", "context")
    return Diagnostics(sqlstate, *(getattr(of_asyncpg, name, None) for name in names))
