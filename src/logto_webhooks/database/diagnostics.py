"""What PostgreSQL reports of an error beside its message, which may quote values of a row."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

# Classes of SQLSTATE that blame a row, or what the database does by itself while it is written:
# bad data, a constraint, a limit of the program, a trigger, a function.
_OF_A_ROW: Final = ("09", "20", "21", "22", "23", "27", "2F", "38", "39", "44", "54", "P0")
# The functions of the server that raise whatever a trigger says, or refuse a row by a policy.
_RAISES: Final = ("exec_stmt_raise", "exec_stmt_assert")
_REFUSES: Final = "ExecWithCheckOptions"
# What a session may have from when it began, by ALTER DATABASE or ALTER ROLE: read-only,
# search_path, role. Or what it prepared, or that its server is gone.
_OF_A_SESSION: Final = ("08", "0A000", "25", "26000", "3F000", "42501", "42P01", "42P05", "57P")
# Messages of these name tables, roles and settings even where a trigger runs into them.
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
    """What a server's error reports. `raised_in` is the server's own function that raised it, and
    `context` says which functions of the database were running."""

    sqlstate: str
    table: str | None
    column: str | None
    constraint: str | None
    raised_in: str | None
    context: str | None

    @property
    def is_of_row(self) -> bool:
        """Whether it refuses the row that was written: others can be written."""
        if self.raised_in in _RAISES or self.raised_in == _REFUSES:
            return True  # whatever SQLSTATE a trigger chose
        return self.sqlstate.startswith(_OF_A_ROW)

    @property
    def is_of_session(self) -> bool:
        """Whether the session may be to blame, so that another may succeed."""
        return not self.is_of_row and self.sqlstate.startswith(_OF_A_SESSION)

    @property
    def may_quote_row(self) -> bool:
        """Whether the message may hold a value of a row."""
        if self.is_of_row:
            return True
        return self.context is not None and not self.sqlstate.startswith(_NAMES_ONLY)

    def describe(self) -> str:
        """Describe it by names and codes alone."""
        name = _NAMES.get(self.sqlstate)
        told = f"{name} ({self.sqlstate})" if name else f"SQLSTATE {self.sqlstate}"
        if self.raised_in in _RAISES:  # it may name anything
            return f"{told}, raised by a trigger or function of the database"
        names = {"table": self.table, "column": self.column, "constraint": self.constraint}
        return ", ".join([told, *(f"{kind} {name}" for kind, name in names.items() if name)])


def diagnose(error: BaseException) -> Diagnostics | None:
    """Return what the server reports of a driver's error; None if it isn't the server's."""
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
