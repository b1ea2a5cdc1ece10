"""What a mapping says: your table, its columns, and what fills each of them.

A mapping is checked when it is registered, against the table alone: nothing is read from a
database.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy.sql import visitors

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.events.local import OrganizationRow, UserRow
from logto_webhooks.mapping.definition import describe_definition
from logto_webhooks.mapping.sources import (
    FunctionFailed,
    check_function,
    check_type,
    find_python_type,
    is_function,
    is_unfit,
    is_unfit_constant,
    takes_none,
)

MappedKind = Literal["user", "organization"]
ColumnName = Any  # sa.Column, an attribute of a mapped class, or a name
Read = Callable[[Any], Any]  # a row of the mirror -> the value of a column
Deletion = Literal["delete", "keep", "unlink"] | Mapping[ColumnName, Any]


ROW_TYPES: Final[dict[MappedKind, type[Struct]]] = {
    "user": UserRow,
    "organization": OrganizationRow,
}
_JSON_FIELDS: Final = ("profile", "custom_data", "identities")
_FOLDED: Final = "email"  # in it, the case of letters doesn't tell mailboxes apart


class KeyColumn(Struct, frozen=True):
    """The column that holds Logto's id: all of it, or the text at a `path` inside its JSON."""

    column: sa.Column[Any]
    path: tuple[str, ...] = ()

    @property
    def text(self) -> sa.ColumnElement[Any]:
        """Logto's id, in SQL."""
        return self.column[self.path].as_string() if self.path else self.column


class Link(Struct, frozen=True):
    """How an existing row without a key is found: by equal values, or by a condition. `calls` says
    that a function of the application computes it."""

    column: sa.Column[Any] | None = None
    read: Read | None = None
    folds_case: bool = False
    calls: bool = True
    condition: Callable[[Any], sa.ColumnElement[bool]] | None = None


class UniqueColumn(Struct, frozen=True):
    """A column with a unique constraint or index. Unless it `is_sure`, two rows can have the same
    value: those that don't fulfil the `condition` of the index, or in which an expression differs.
    """

    column: sa.Column[Any]
    condition: Any = None
    is_sure: bool = True
    by_expression: bool = False  # mostly lower(email), in an index or a generated column


class OwnValues(Struct, frozen=True):
    """What a mapping makes of a record: the values of columns, and of those to fill."""

    columns: dict[str, Any]
    fill: dict[str, Any]


class EntityMapping(Struct, frozen=True, kw_only=True):
    """A mapping of users or of organizations onto a table."""

    name: str
    kind: MappedKind
    target: Any
    table: sa.Table
    key: KeyColumn
    columns: dict[str, Read]
    fill: dict[str, Read]
    create_defaults: dict[str, Any]
    link: Link | None
    where: Callable[[Any], bool]
    create: bool
    when_deleted: Literal["delete", "keep", "unlink"] | dict[str, Any]
    has_functions: bool
    definition: str

    def evaluate(self, row: Any) -> OwnValues | None:
        """Return the values for a row of the mirror; None if `where` excludes it. Raises what the
        application's functions raise."""
        if not self.where(row):
            return None
        return OwnValues(
            {name: read(row) for name, read in self.columns.items()},
            {name: read(row) for name, read in self.fill.items()},
        )

    @property
    def needs_whole(self) -> str | None:
        """The option that decides by all of a record whether it gets an existing row, a new one or
        none; None if there is no such option."""
        if self.link is not None:
            return "link"
        return "where" if self.create and self.where is not _every else None

    @property
    def primary_key(self) -> tuple[sa.Column[Any], ...]:
        """The primary key of the table."""
        return tuple(self.table.primary_key)

    @property
    def is_free(self) -> sa.ColumnElement[bool]:
        """Which rows can be linked: those of the class that have no key."""
        return sa.and_(self.key.text.is_(None), *match_class(self.target))

    @property
    def unique_columns(self) -> list[sa.Column[Any]]:
        """The mapped columns whose value surely only one row may have."""
        unique = [each.column for each in self.list_unique("postgresql") if each.is_sure]
        return list(dict.fromkeys(unique))

    def list_unique(self, dialect: str) -> list[UniqueColumn]:
        """List the mapped columns whose value only one row may have, surely unique ones first."""
        unique = [
            of_column
            for of_column in _list_unique(self.table, dialect)
            for name in (*self.columns, *self.fill)
            if self.table.c[name] is of_column.column
        ]
        return sorted(unique, key=lambda of_column: not of_column.is_sure)


def declare_entities(
    kind: MappedKind,
    target: Any,
    *,
    key: ColumnName,
    columns: Mapping[ColumnName, str | Read],
    when_deleted: Deletion,
    link: Any = None,
    fill: Mapping[ColumnName, str | Read] | None = None,
    create_defaults: Mapping[ColumnName, Any] | None = None,
    where: Callable[[Any], bool] | None = None,
    create: bool = True,
) -> EntityMapping:
    """Check a mapping of users or organizations. Raises InvalidMapping."""
    table = find_table(target)
    problem = Problem(table.fullname)
    finder = ColumnFinder(table, target, problem)
    key_column = finder.find_key(key)
    read_by_key = {
        finder.find(name).key: make_reader(ROW_TYPES[kind], source, finder.find(name), problem)
        for name, source in columns.items()
    }
    sources = {finder.find(name).key: source for name, source in columns.items()}
    own_link = _find_link(kind, link, finder, read_by_key, sources, problem)
    functions = [where, own_link and own_link.condition, *columns.values(), *(fill or {}).values()]
    defaults = read_defaults(create_defaults or {}, finder, read_by_key)
    mapping = EntityMapping(
        name=str(table.fullname),  # a subclass of str can't be encoded
        kind=kind,
        target=target,
        table=table,
        key=key_column,
        columns=read_by_key,
        fill={
            finder.find(name).key: make_reader(ROW_TYPES[kind], source, finder.find(name), problem)
            for name, source in (fill or {}).items()
        },
        create_defaults=defaults,
        link=own_link,
        where=_every if where is None else check_where(where, problem),
        create=create,
        when_deleted=_read_deletion(when_deleted, finder),
        has_functions=any(map(is_function, functions)),
        definition=describe_definition(
            {
                "key": [key_column.column, *key_column.path],
                "primary_key": describe_primary_key(table),
                "columns": name_columns(columns, finder),
                "fill": name_columns(fill or {}, finder),
                "where": where,
                "create": create,
                "link": link,
                "create_defaults": name_columns(create_defaults or {}, finder),
                "when_deleted": when_deleted
                if isinstance(when_deleted, str)
                else name_columns(when_deleted, finder),
            },
            problem,
        ),
    )
    _check(mapping, problem)
    return mapping


def read_defaults(
    defaults: Mapping[ColumnName, Any], finder: ColumnFinder, columns: Collection[str]
) -> dict[str, Any]:
    """Return the defaults by column, and what tells the class of a row from others' in its table.
    Raises InvalidMapping, also for a default of one of the mapped `columns`."""
    values = _read_values("create_defaults", defaults, finder)
    if twice := values.keys() & set(columns):
        raise finder.problem(
            f"create_defaults would have no effect on {min(twice)}, which is in columns: leave it "
            "out of one of them, or put the column in fill"
        )
    of_class = {}
    if (column := _find_discriminator(finder.target)) is not None:
        of_class = {column.key: _find_mapper(finder.target).polymorphic_identity}
    return of_class | values


def _find_mapper(target: Any) -> Any:
    """Return the mapper of a class; None for a table."""
    return None if isinstance(target, sa.Table) else sa.inspect(target)


def match_class(target: Any) -> list[sa.ColumnElement[bool]]:
    """Return the condition for the rows of a class and its subclasses, if others share its table;
    else none."""
    mapper = _find_mapper(target)
    if mapper is None or mapper.polymorphic_on is None or not _is_told_in_own_table(mapper):
        return []
    identities = [own.polymorphic_identity for own in mapper.self_and_descendants]
    names = [identity for identity in identities if identity is not None]
    is_one_of_several = mapper.inherits is not None or mapper.polymorphic_identity is not None
    return [mapper.polymorphic_on.in_(names)] if is_one_of_several and names else []


def _is_told_in_own_table(mapper: Any) -> bool:
    """Whether the columns that tell the class of a row are in its own table, if any do."""
    told_by = mapper.polymorphic_on
    parts = [] if told_by is None else visitors.iterate(told_by)
    tables = {part.table for part in parts if isinstance(part, sa.Column)}
    return tables <= {mapper.local_table}


def _find_discriminator(target: Any) -> sa.Column[Any] | None:
    """Return the column that tells the class of each row, if several classes share a table."""
    mapper = _find_mapper(target)
    if mapper is None or mapper.polymorphic_identity is None:
        return None
    column = mapper.polymorphic_on
    is_own = isinstance(column, sa.Column) and column.table is mapper.local_table
    return column if is_own else None


def _read_values(
    option: str, values: Mapping[ColumnName, Any], finder: ColumnFinder
) -> dict[str, Any]:
    for name, value in values.items():
        column = finder.find(name)
        if callable(value):
            instead = ": if each row has a value of its own, use the column's default"
            raise finder.problem(
                f"{option} needs a value for {column.name}, not a function"
                f"{instead if option == 'create_defaults' else ''}"
            )
        if isinstance(value, sa.ClauseElement) or hasattr(value, "__clause_element__"):
            raise finder.problem(
                f"{option} needs a value for {column.name}, not SQL: let a default or a trigger of "
                "the table set it"
            )
        if value is None and not takes_none(column):
            raise finder.problem(f"{option} sets {column.name} to null, but it is NOT NULL")
        if is_unfit_constant(value, column):
            raise finder.problem(
                f"{option} sets {column.name} to a value of type {type(value).__name__}, which the "
                f"column can't hold, because it is of type {column.type!r}"
            )
    return {finder.find(name).key: _fit_to(finder.find(name))(v) for name, v in values.items()}


def check_where(where: Any, problem: Problem) -> Callable[[Any], bool]:
    """Check the function that selects records. Raises InvalidMapping."""
    return check_function("`where`", where, problem, "true or false")


def name_columns(values: Mapping[ColumnName, Any], finder: ColumnFinder) -> dict[str, Any]:
    """Return values by the names of their columns, however the application wrote these."""
    return {str(finder.find(name).key): value for name, value in values.items()}


def find_table(target: Any) -> sa.Table:
    """The table of a mapped class, or the table itself. Raises InvalidMapping."""
    if isinstance(target, sa.Table):
        table = target
    else:
        inspected = sa.inspect(target, raiseerr=False)
        local_table = getattr(inspected, "local_table", None)
        if not isinstance(local_table, sa.Table):
            raise InvalidMapping(
                table=getattr(target, "__name__", repr(target)),
                problem="pass a mapped class or a Table",
            )
        table = local_table
        if inspected.single and not _is_told_in_own_table(inspected):
            other = inspected.inherits.class_.__name__
            problem = (
                f"{target.__name__} shares the table with {other}, and a column of another table "
                f"tells which rows are whose: map {other} instead"
            )
            raise InvalidMapping(table=table.fullname, problem=problem)
    if not list(table.primary_key):
        raise InvalidMapping(table=table.fullname, problem="the table has no primary key")
    return table


def describe_primary_key(table: sa.Table) -> list[list[str]]:
    """Return the columns of the primary key, and the kinds of values that they have."""
    return [
        [str(column.key), getattr(find_python_type(column), "__name__", "")]
        for column in table.primary_key
    ]


class Problem:
    """Makes InvalidMapping about one table."""

    def __init__(self, table: str) -> None:
        self._table = table

    def __call__(self, problem: str) -> InvalidMapping:
        """Say what is wrong, and what to write instead."""
        return InvalidMapping(table=self._table, problem=problem)


class ColumnFinder:
    """Finds the columns of a table by what an application calls them."""

    def __init__(self, table: sa.Table, target: Any, problem: Problem) -> None:
        self.table = table
        self.target = target
        self._mapper = _find_mapper(target)
        self.problem = problem

    def find(self, name: ColumnName) -> sa.Column[Any]:
        """Find a column. Raises InvalidMapping."""
        columns: Sequence[Any] = [name]
        if isinstance(name, str):
            attributes = {} if self._mapper is None else self._mapper.column_attrs
            columns = attributes[name].columns if name in attributes else [self.table.c.get(name)]
        elif not isinstance(name, sa.Column):
            columns = getattr(getattr(name, "property", None), "columns", [None])
        column = columns[0]
        if not isinstance(column, sa.Column) or self.table.c.get(column.key) is not column:
            other = getattr(column, "table", None)
            if isinstance(other, sa.Table) and other is not self.table:
                raise self.problem(f"{column} is a column of {other.fullname}, another table")
            names = ", ".join(self.table.c.keys())
            shown = name if isinstance(name, str) else getattr(name, "key", name)
            raise self.problem(f"it has no column {shown!r}; its columns are {names}")
        return column

    def find_key(self, key: Any) -> KeyColumn:
        """Find the column of the key, or the path inside a JSON column. Raises InvalidMapping."""
        path: list[str] = []
        while isinstance(key, sa.BinaryExpression):  # User.custom_data["logtoUserId"]
            if not isinstance(key.right, sa.BindParameter) or not isinstance(key.right.value, str):
                break
            path.insert(0, key.right.value)
            key = key.left
        if "" in path:
            raise self.problem("the key's path in a JSON column has an empty part")
        if path:
            key = self.table.c.get(str(getattr(key, "key", "")), key)
        column = self.find(key)
        if path and not isinstance(column.type, sa.JSON):
            raise self.problem(f"the key's column {column.name} isn't of type JSON")
        if not path:
            self.check_id(column)
        return KeyColumn(column, tuple(path))

    def check_id(self, column: sa.Column[Any]) -> None:
        """Check that a column can hold Logto's ids. Raises InvalidMapping."""
        own = find_python_type(column)
        if isinstance(column.type, sa.CHAR):
            raise self.problem(
                f"{column.name} is of type {column.type!r}, in which a database may add spaces to "
                "Logto's ID: use a text column"
            )
        if own is not None and is_unfit(str, own):
            raise self.problem(
                f"{column.name} is of type {column.type!r}, which can't hold Logto's ID: use a "
                "text column, or a foreign key to the rows of your own"
            )


def make_reader(
    row_type: type[Struct], source: str | Read, column: sa.Column[Any], problem: Problem
) -> Read:
    """Return what reads the column's value from a row of the mirror."""
    fit = _fit_to(column)
    if callable(source):
        compute = check_function(f"the function of {column.name}", source, problem)
        return lambda row: fit(compute(row))
    if not isinstance(source, str):
        raise problem(f"{column.name} must be filled by a column's name or a function of the row")
    field, *path = source.split(".")
    fields = row_type.__struct_fields__
    if field not in fields or (path and field not in _JSON_FIELDS) or not all(path):
        raise problem(
            f"{column.name} can't be filled by {source!r}; use one of {', '.join(fields)}, "
            'a path such as "profile.givenName", or a function of the row'
        )
    if not path:
        check_type(row_type, field, column, problem)

    def read(row: Any) -> Any:
        value = getattr(row, field)
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return fit(value)

    return read


def _fit_to(column: sa.Column[Any]) -> Read:
    """Times and days are in UTC where a value or its column has no time zone. A tuple is written as
    a list."""
    if isinstance(column.type, sa.DateTime):
        zone = UTC if column.type.timezone else None
        return lambda value: (
            _to_utc(value).replace(tzinfo=zone) if isinstance(value, datetime) else value
        )
    if isinstance(column.type, sa.Date):
        return lambda value: _to_utc(value).date() if isinstance(value, datetime) else value
    if isinstance(column.type, sa.ARRAY | sa.JSON):
        length = getattr(getattr(column.type, "item_type", None), "length", None) or sys.maxsize
        return lambda value: _check_lengths(
            list(value) if isinstance(value, tuple) else value, length, column.name
        )
    return lambda value: value


def _check_lengths(items: Any, length: int, name: str) -> Any:
    """Refuse texts that are too long for an array: SQLAlchemy's cast would cut them off."""
    is_list = isinstance(items, list | set | frozenset)
    if is_list and any(isinstance(item, str) and len(item) > length for item in items):
        raise FunctionFailed(f"a text is longer than the {length} letters of an item of {name}")
    return items


def _to_utc(moment: datetime) -> datetime:
    """Return a time in UTC. One without a zone is in UTC already, whatever this process has."""
    return moment if moment.tzinfo is None else moment.astimezone(UTC)


def _find_link(
    kind: MappedKind,
    link: Any,
    finder: ColumnFinder,
    columns: dict[str, Read],
    sources: Mapping[str, str | Read],
    problem: Problem,
) -> Link | None:
    if link is None:
        return None
    if callable(link) and not isinstance(link, sa.sql.ClauseElement) and not _is_attribute(link):
        return Link(condition=check_function("`link`", link, problem, "a condition in SQL"))
    column = finder.find(link)
    read = columns.get(column.key)
    if read is None:
        if column.key not in ROW_TYPES[kind].__struct_fields__:
            raise problem(f"map {column.name}, by which rows are linked, or pass a function")
        read = make_reader(ROW_TYPES[kind], column.key, column, problem)
    source = sources.get(column.key, column.key)
    name = source if isinstance(source, str) else column.key
    return Link(column, read, _FOLDED in _split(name), calls=is_function(source))


def _split(name: str) -> list[str]:
    """Split a path or a name, such as profile.workEmail or work_email, into words."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace(".", "_").split("_")


def _is_attribute(value: Any) -> bool:
    return hasattr(value, "property")


def _read_deletion(
    when_deleted: Any, finder: ColumnFinder
) -> Literal["delete", "keep", "unlink"] | dict[str, Any]:
    if when_deleted in ("delete", "keep", "unlink"):
        action: Literal["delete", "keep", "unlink"] = when_deleted
        return action
    if isinstance(when_deleted, Mapping) and when_deleted:
        return _read_values("when_deleted", when_deleted, finder)
    raise finder.problem(
        'when_deleted must be "delete", "keep", "unlink", or columns with their values'
    )


def _check(mapping: EntityMapping, problem: Problem) -> None:
    key = mapping.key
    own = {key.column.key} if not key.path else set()
    written = {*mapping.columns, *mapping.fill}
    if computed := [name for name in written if mapping.table.c[name].computed is not None]:
        raise problem(f"{min(computed)} is a generated column, which the database fills itself")
    if twice := own & written or set(mapping.columns) & set(mapping.fill):
        raise problem(f"{min(twice)} would be filled twice")
    if (
        isinstance(mapping.when_deleted, Mapping)
        and not key.path
        and own & mapping.when_deleted.keys()
    ):
        raise problem(
            f"when_deleted can't set {key.column.name}, which holds Logto's ID: use \"unlink\", "
            "which empties it"
        )
    if mapping.link is not None and not key.path and not key.column.nullable:
        raise problem(
            f"link takes over rows in which {key.column.name} is null, but it is NOT NULL: let it "
            "be null, or leave out link"
        )
    if mapping.when_deleted == "unlink" and not key.path and not key.column.nullable:
        raise problem(f'when_deleted="unlink" sets {key.column.name} to null, but it is NOT NULL')
    if key.path:
        _check_document(mapping, problem)
    filled = {key.column.key, *written, *mapping.create_defaults}
    if mapping.create:
        check_required(mapping.table, filled, problem)


def _check_document(mapping: EntityMapping, problem: Problem) -> None:
    """Check that nothing else writes the document in which the key is. Raises InvalidMapping."""
    column = mapping.key.column
    at_end = mapping.when_deleted if isinstance(mapping.when_deleted, Mapping) else {}
    if column.key in {*mapping.columns, *mapping.fill, *at_end}:
        raise problem(
            f"{column.name} holds Logto's ID, so {column.name} can't be in columns, fill or "
            "when_deleted, which replace the whole document: keep the ID in a column of its own"
        )
    default = mapping.create_defaults.get(column.key, {})
    if not isinstance(default, dict):
        raise problem(f"{column.name} holds Logto's ID, so its default must be an object")


def check_required(table: sa.Table, filled: Collection[str], problem: Problem) -> None:
    """Check that each NOT NULL column is filled. Raises InvalidMapping."""
    for column in table.c:
        if column.key not in filled and is_required(column):
            raise problem(
                f"nothing fills {column.name}, which is NOT NULL: add it to columns or "
                "create_defaults, or pass create=False"
            )


def is_required(column: sa.Column[Any]) -> bool:
    """Whether an INSERT must give the column's value."""
    table = column.table
    counts_itself = isinstance(table, sa.Table) and table.autoincrement_column is column
    return not (
        (column.nullable and not column.primary_key)  # as SQLite's can be
        or column.default is not None
        or column.server_default is not None
        or column.identity is not None
        or column.computed is not None
        or counts_itself
    )


def is_unique(column: sa.Column[Any]) -> bool:
    """Whether a column of a table is known to be unique by itself."""
    table = column.table
    unique = [of.column for of in _list_unique(table, "postgresql") if of.is_sure]
    is_key = list(table.primary_key) == [column]
    return is_key or any(own is column for own in unique)


def _list_unique(table: sa.Table, dialect: str) -> Iterator[UniqueColumn]:
    for constraint in table.constraints:
        if isinstance(constraint, sa.UniqueConstraint) and len(constraint.columns) == 1:
            yield from _find_unique(table, constraint.columns[0], None)
    for index in table.indexes:
        if index.unique and len(index.expressions) == 1:
            condition = index.dialect_options[dialect]["where"]
            if isinstance(condition, str):  # as a reflected table has it
                condition = sa.literal_column(f"({condition})", sa.Boolean())
            yield from _find_unique(table, index.expressions[0], condition)


def _find_unique(table: sa.Table, expression: Any, condition: Any) -> Iterator[UniqueColumn]:
    """Find the column that is unique if an expression is; none if it is made of several."""
    if isinstance(expression, sa.Column):
        if expression.computed is None:
            yield UniqueColumn(expression, condition, is_sure=condition is None)
            return
        expression = expression.computed.sqltext
    parts = visitors.iterate(expression)
    names = {part.name for part in parts if isinstance(part, sa.Column)}
    names = names or set(re.findall(r"\w+", str(expression)))  # if it is text
    columns = [column for column in table.c if column.name in names]
    if len(columns) == 1:
        yield UniqueColumn(columns[0], condition, is_sure=False, by_expression=True)


def _every(row: Any) -> bool:
    return True
