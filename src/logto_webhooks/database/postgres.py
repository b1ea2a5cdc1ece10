"""PostgreSQL: URLs as libpq reads them, the engine, and its Database."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import uuid
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy import event
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool

from logto_webhooks.database import migrate
from logto_webhooks.database.async_runner import AsyncRunner, drop_connection
from logto_webhooks.database.errors import SETTING, place_of, translate_errors
from logto_webhooks.database.migrate import DatabaseInfo, Migrated, inspect_database
from logto_webhooks.database.runner import READ_S, HandlerRunner, ThreadRunner
from logto_webhooks.database.sessions import APP_SCHEMAS, get_schema_map, make_schema_map
from logto_webhooks.database.store import WORKER_S
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.event_loop import run_in_thread

# After it gets a lock, a transaction must see what others committed before.
LEVEL: Final = "READ COMMITTED"
CONNECT_S: Final = 3.0
STATEMENT_S: Final = 8.0
_MOST_S: Final = 2_000_000.0  # PostgreSQL allows 2**31 ms


def _hide_values(record: logging.LogRecord) -> bool:
    """Let psycopg's logger name an error that it ignores only by its type: the server's message can
    quote a row."""
    if isinstance(record.msg, str) and record.msg.startswith("error ignored") and record.args:
        *others, error = record.args if isinstance(record.args, tuple) else (record.args,)
        record.args = (*others, type(error).__name__)
    return True


logging.getLogger("psycopg").addFilter(_hide_values)


class StatementLimit:
    """How long a statement may take on connections that are opened from now on: `seconds`, or any
    time if that is None. The URL overrides it."""

    def __init__(self, seconds: float | None = STATEMENT_S) -> None:
        self.seconds = seconds


def make_postgres_engine(
    url: sa.URL | str,
    name: str = "database_url",
    limit: StatementLimit | None = None,
    **pool: Any,
) -> AsyncEngine:
    """Make an engine, which connects on first use. Raises SettingInvalid with the setting's `name`.

    `postgres://…` and `postgresql://…` use asyncpg; `+asyncpg` and `+psycopg` name a driver.
    `?pgbouncer=true` is for PgBouncer in transaction mode, which shares connections: no statement
    is prepared then. `pool` are SQLAlchemy's pool options, instead of ours.
    """
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    address = parse_url(text, name)
    limit = limit or StatementLimit()
    engine = create_async_engine(
        address.url,
        isolation_level=LEVEL,
        hide_parameters=True,
        # Not `canonical_json`, which rounds numbers: the application's tables use it, too.
        json_serializer=partial(json.dumps, ensure_ascii=False),
        execution_options={SETTING: name},
        **(pool or _POOL),
    )

    @event.listens_for(engine.sync_engine, "do_connect")
    def use_limit(_: object, __: object, ___: object, arguments: dict[str, Any]) -> None:
        arguments |= _make_arguments(address, limit.seconds)

    return engine


def _make_arguments(address: Address, statement_s: float | None) -> dict[str, Any]:
    """Return the driver's arguments to connect."""
    driver, pooled = address.driver, address.pooled
    # The server's settings for our connections, unless the URL sets them. PgBouncer accepts none.
    settings = {
        "idle_in_transaction_session_timeout": _IDLE_LIMIT,
        # Also ends statements of clients that are unreachable or have given up.
        "statement_timeout": f"{(statement_s or 0) * 1000:.0f}ms",
        # Drivers rely on these, and a database can have other defaults.
        "datestyle": "ISO",
        "standard_conforming_strings": "on",
        "client_encoding": "UTF8",
    }
    if driver == ASYNCPG:
        options: dict[str, Any] = {"command_timeout": address.choose_statement_s(statement_s)}
    else:
        options = {"tcp_user_timeout": int(STATEMENT_S * 1000)}
    return {
        **options,
        **(_UNPREPARED[driver] if pooled else {}),
        **address.arguments({} if pooled else settings, CONNECT_S),
        **_choose_connect(address),
    }


# A worker that is paused in the middle of a transaction must not keep its locks for ever.
_IDLE_LIMIT: Final = "10s"
# Handlers may hold all but one of the first 8. Opening a connection for each job would be slow.
_POOL: Final[dict[str, Any]] = {"pool_size": 8, "max_overflow": 2, "pool_timeout": CONNECT_S}
_UNPREPARED: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"logto_{uuid.uuid4().hex}",
    },
    "psycopg": {"prepare_threshold": None},
}


HOST_S: Final = 1.0  # for each host but the last: accepting has time for little more than two


def _choose_connect(address: Address) -> dict[str, Any]:
    """Return the options for several hosts, of which one may not answer. With prefer-standby, the
    driver chooses, because all hosts must be tried."""
    preferred = address.parameters.get("target_session_attrs") == "prefer-standby"
    if len(address.hosts) < 2 or address.driver != ASYNCPG or preferred:
        return {}
    return {"async_creator_fn": _connect_to_one}


async def _connect_to_one(host: Sequence[str], port: Sequence[int], **arguments: Any) -> Any:
    """Connect to the first usable host. asyncpg itself would spend all its time on one that doesn't
    answer."""
    asyncpg: Any = importlib.import_module(ASYNCPG)
    *first, last = zip(host, port, strict=True)
    for name, number in first:
        briefly = {**arguments, "timeout": min(HOST_S, arguments["timeout"])}
        with suppress(
            OSError,
            asyncpg.PostgresConnectionError,
            asyncpg.CannotConnectNowError,
            asyncpg.TargetServerAttributeNotMatched,
        ):
            return await asyncpg.connect(host=name, port=number, **briefly)
    name, number = last
    return await asyncpg.connect(host=name, port=number, **arguments)


CHECK_S: Final = 5.0
# Our transactions need it, whatever the application's engine is set to.
_LEVEL: Final[dict[str, Any]] = {"isolation_level": LEVEL}


class Postgres:
    """A PostgreSQL server, used on the event loop or, with a synchronous engine, in threads. Only
    `migrate` migrates it."""

    budget_s = WORKER_S
    files: Sequence[Path] = ()

    def __init__(
        self,
        engine: AsyncEngine | sa.Engine,
        schema: str | None,
        owns: bool = True,
        limit: StatementLimit | None = None,
        migrator: AsyncEngine | None = None,
    ) -> None:
        """`owns`: whether the engine is ours, not the application's. `limit`: of its statements.
        `migrator`: the engine to migrate with, if it is another."""
        self._limit = limit
        self.name = place_of(engine.url)
        self.place = f"{self.name}, schema {schema}" if schema else self.name  # of the tables
        self.any_loop = isinstance(engine, sa.Engine)  # whether any event loop can use it
        self._schema = schema
        options = {
            "schema_translate_map": make_schema_map(schema),
            APP_SCHEMAS: get_schema_map(engine),
        }
        options |= {} if owns else _LEVEL
        self._engine = engine.execution_options(**options)
        self._migrator = migrator.execution_options(**options) if migrator else self._engine
        self._runner = self._make_runner(owns)
        self.host: HandlerRunner = self._runner

    def _make_runner(self, owns: bool) -> ThreadRunner | AsyncRunner:
        add_pool = None if owns else EngineWithOwnPool
        if isinstance(self._engine, sa.Engine):
            _forget_connections_after_fork(self._engine)
            return ThreadRunner(self._engine, add_pool)
        unlimited = self._migrator if isinstance(self._migrator, AsyncEngine) and owns else None
        return AsyncRunner(self._engine, add_pool, unlimited=unlimited)

    @classmethod
    def at(cls, url: str, schema: str | None, name: str) -> Postgres:
        """Return the database at a URL from the setting `name`. Raises SettingInvalid."""
        limit = StatementLimit()
        engine = make_postgres_engine(url, name, limit)
        migrator = make_postgres_engine(url, name, StatementLimit(None), poolclass=NullPool)
        return cls(engine, schema, limit=limit, migrator=migrator)

    def allow_statements(self, seconds: float) -> None:
        """Let statements of handlers take so long, unless the engine is the application's."""
        if self._limit is not None:
            self._limit.seconds = min(max(STATEMENT_S, seconds), _MOST_S)

    async def open(self) -> None:
        """Raise StoreUnavailable, or SchemaMismatch if `migrate` must be run first."""
        await self.check()

    async def migrate(self) -> Migrated:
        """Migrate the tables to this release. Wait for others that migrate them, however long that
        takes, unless the application's engine limits it. Raises StoreUnavailable, SettingInvalid,
        SchemaUnknown."""
        engine = self._migrator
        with translate_errors(engine):
            if isinstance(engine, sa.Engine):
                return await run_in_thread(_migrate, engine, self._schema)
            async with engine.connect() as connection:
                try:
                    migrated = await connection.run_sync(migrate.upgrade, self._schema)
                    await connection.commit()
                    return migrated
                finally:
                    await drop_connection(connection)

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch if the database can't be used as it is."""
        await self._runner.look(partial(migrate.check, schema=self._schema), CHECK_S)

    async def inspect(self) -> DatabaseInfo:
        """Return information on the database, whatever its schema. Raises StoreUnavailable."""
        return await self._runner.look(
            partial(inspect_database, place=self.name, schema=self._schema), READ_S
        )

    def may_work(self) -> bool:
        """Return True: any number of processes may run workers on a server."""
        return True

    def migration_sql(self) -> str:
        """Return the SQL that creates the schema."""
        return migrate.sql("postgresql", self._schema)


class EngineWithOwnPool(OptionEngine):
    """An engine with a pool of its own, and all else of another engine: options, dialect, and the
    listeners of both the engine and its pool. It logs no parameters, which can be signing keys."""

    def __init__(self, engine: sa.Engine) -> None:
        self._own_pool = engine.pool.recreate()
        super().__init__(engine, {})
        self.hide_parameters = True
        _forget_connections_after_fork(self)

    @property
    def pool(self) -> Pool:
        """Its own pool."""
        return self._own_pool

    @pool.setter
    def pool(self, pool: Pool) -> None:
        self._own_pool = pool


def _forget_connections_after_fork(engine: sa.Engine) -> None:
    """In a forked process, leave the connections of its parent alone, and open others."""
    reference = weakref.ref(engine)

    def forget() -> None:
        if (inherited := reference()) is not None:
            inherited.dispose(close=False)

    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=forget)


def _migrate(engine: sa.Engine, schema: str | None) -> Migrated:
    with engine.begin() as connection:
        return migrate.upgrade(connection, schema)


ASYNCPG: Final = "asyncpg"
PSYCOPG: Final = "psycopg"

_EXAMPLE: Final = "postgresql://user:password@host:5432/name"
_ENCODE: Final = (
    "in a user or password, percent-encode the characters @ : / ? # [ ] % (@ is %40, / is %2F)"
)
_SCHEMES: Final = ("postgresql", "postgres")
# Drivers that an error may name. Any other text may be part of a password.
_OTHER_DRIVERS: Final = ("psycopg2", "psycopg2cffi", "psycopg_async", "pg8000", "aiopg", "pygresql")
# libpq's parameters except host and port, the caches of SQLAlchemy's asyncpg, and our `pgbouncer`.
_PARAMETERS: Final = re.compile(
    "application_name|channel_binding|client_encoding|connect_timeout"
    "|fallback_application_name|gssdelegation|gssencmode|gsslib|hostaddr|keepalives"
    "|keepalives_count|keepalives_idle|keepalives_interval|krbsrvname|load_balance_hosts"
    "|max_protocol_version|min_protocol_version|options|passfile|replication|require_auth"
    "|requirepeer|service|servicefile|ssl_max_protocol_version|ssl_min_protocol_version"
    "|sslcert|sslcertmode|sslcompression|sslcrl|sslcrldir|sslkey|sslmode|sslnegotiation"
    "|sslpassword|sslrootcert|sslsni|target_session_attrs|tcp_user_timeout"
    "|user|password|dbname|statement_cache_size|prepared_statement_cache_size|pgbouncer"
)
# asyncpg reads these from a DSN as libpq does.
_DSN_PARAMETERS: Final = re.compile(
    "gsslib|krbsrvname|passfile|service|servicefile|ssl_max_protocol_version"
    "|ssl_min_protocol_version|sslcert|sslcrl|sslkey|sslmode|sslnegotiation|sslpassword"
    "|sslrootcert|target_session_attrs"
)
# Parameters that asyncpg lacks, with the values that ask for what it does anyway.
_ASYNCPG_DEFAULTS: Final[dict[str, frozenset[str]]] = {
    "channel_binding": frozenset({"disable", "prefer"}),
    "client_encoding": frozenset({"auto", "utf8", "utf-8", "unicode"}),
    "gssencmode": frozenset({"disable", "prefer"}),
    "load_balance_hosts": frozenset({"disable"}),
    "sslcompression": frozenset({"0", "1"}),  # libpq also ignores it
    "sslsni": frozenset({"1"}),
}
_CHOICES: Final = {
    "channel_binding": "disable, prefer, require",
    "sslmode": "disable, allow, prefer, require, verify-ca, verify-full",
    "target_session_attrs": "any, read-write, read-only, primary, standby, prefer-standby",
}
_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_CACHES: Final = ("statement_cache_size", "prepared_statement_cache_size")
_NUMBERS: Final = ("connect_timeout", *_CACHES)
_ON_OFF: Final = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
# `-c name=value`, `-cname=value` or `--name=value`, as the server splits them.
_OPTION: Final = re.compile(r"(?:^|\s)(?:-c\s*|--)([A-Za-z_][\w.-]*)\s*=((?:\\.|[^\s\\])*)")
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s|min|h|d)?")
_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3_600, "d": 86_400}


class Address(Struct, frozen=True, kw_only=True):
    """Where a database is, and how to connect to it.

    `url` has user, password, host and name, but no query: it is for SQLAlchemy and for messages.
    `hosts` are all hosts with their ports, in the order in which they are tried. `parameters` are
    all others, by libpq's names. `pooled` says that PgBouncer shares connections.
    """

    driver: str
    url: sa.URL
    hosts: tuple[tuple[str, int | None], ...]
    parameters: dict[str, str]
    pooled: bool

    def arguments(self, ours: Mapping[str, str], connect_s: float) -> dict[str, object]:
        """Return the driver's arguments to connect.

        `ours` are the server's settings that this package wants, and `connect_s` is how long it
        waits for a connection. The URL overrides both.
        """
        get = self.parameters.get
        name = get("application_name") or get("fallback_application_name") or NAME
        theirs = self._read_options()
        settings = {option: value for option, value in ours.items() if option not in theirs}
        build = _to_asyncpg if self.driver == ASYNCPG else _to_psycopg
        return build(self, name, settings, connect_s)

    def choose_statement_s(self, ours: float | None) -> float | None:
        """Return how long a driver may wait for a statement; None if for any time. A setting of the
        server in the URL overrides `ours`."""
        text = self._read_options().get("statement_timeout")
        if text is None:
            return ours
        match = _DURATION.fullmatch(text)
        if match is None:
            return None  # the server knows what it means
        return float(match[1]) * _UNITS_S[match[2] or "ms"] or None

    def _read_options(self) -> dict[str, str]:
        """Return the server's settings in the URL."""
        options = _OPTION.findall(self.parameters.get("options", ""))
        return {option.lower().replace("-", "_"): value for option, value in options}


NAME: Final = "logto-webhooks"
_LIBPQ_LEAST_S: Final = 2  # libpq's shortest wait for a host


def parse_url(text: str, name: str) -> Address:
    """Parse the URL of a PostgreSQL database. Raises SettingInvalid with the setting's `name`.

    No error quotes a value of the URL: any part may contain a password.
    """
    try:
        return _parse(text.strip())
    except _Unusable as problem:
        raise SettingInvalid(name=name, problem=str(problem)) from None


class _Unusable(Exception):
    """What is wrong with a URL."""


def _parse(text: str) -> Address:
    scheme, _, rest = text.partition("://")
    driver = _parse_driver(scheme)
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    userinfo, _, hostspec = authority.rpartition("@")
    if "@" in path:
        raise _Unusable(f"it can't be read; {_ENCODE}")
    user, _, password = userinfo.partition(":")
    parameters = _parse_query(query)
    hosts = _parse_hosts(hostspec, parameters)
    _check_parameters(parameters)
    pooled = parameters.pop("pgbouncer", "false").lower() == "true"
    user = parameters.pop("user", unquote(user))
    password = parameters.pop("password", unquote(password))
    database = parameters.pop("dbname", unquote(path))
    chosen = _choose_driver(driver, parameters)
    return Address(
        driver=chosen,
        url=sa.URL.create(
            f"postgresql+{chosen}",
            username=user or None,
            password=password or None,
            host=_host_for_messages(hosts),
            port=hosts[0][1] if len(hosts) == 1 else None,
            database=database or None,
        ),
        hosts=hosts,
        parameters=parameters,
        pooled=pooled,
    )


def _parse_driver(scheme: str) -> str | None:
    """Return the driver that a URL names, if it names one."""
    backend, plus, driver = scheme.lower().partition("+")
    if backend not in _SCHEMES:
        raise _Unusable(f"it isn't a URL of a PostgreSQL database, as {_EXAMPLE}")
    if not plus:
        return None
    if driver not in (ASYNCPG, PSYCOPG):
        named = f"the driver {driver}" if driver in _OTHER_DRIVERS else "its driver"
        raise _Unusable(
            f"{named} isn't asyncpg or psycopg; use postgresql+asyncpg:// or postgresql+psycopg://"
        )
    return driver


def _parse_query(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        name = unquote(name)
        if not equals or not re.fullmatch(r"[A-Za-z_]{1,40}", name):
            raise _Unusable(f"a part of its query isn't of the form name=value; {_ENCODE}")
        if name == "options":
            value = value.replace("+", " ")
        value = unquote(value)
        name = {"database": "dbname", "username": "user"}.get(name, name)
        if name in ("host", "port") and name in parameters:
            value = f"{parameters[name]},{value}"
        parameters[name] = value
    if (ssl := parameters.pop("ssl", None)) is not None:
        parameters.setdefault("sslmode", _ON_OFF.get(ssl.lower(), ssl))
    return {name: value for name, value in parameters.items() if value}


def _parse_hosts(hostspec: str, parameters: dict[str, str]) -> tuple[tuple[str, int | None], ...]:
    """Return all hosts with their ports, from the URL's query, or else from its authority."""
    queried, ports = parameters.pop("host", None), parameters.pop("port", None)
    decoded = [_parse_host(text) for text in hostspec.split(",")] if hostspec else []
    if queried is not None:
        # "host=a:1&host=b:2" is SQLAlchemy's spelling, "host=a,b&port=1,2" libpq's.
        decoded = [_parse_queried_host(text) for text in queried.split(",")]
    if ports is None:
        return tuple(decoded)
    numbers = [_parse_port(text) for text in ports.split(",")]
    if len(numbers) == 1:
        numbers *= max(1, len(decoded))
    if decoded and len(numbers) != len(decoded):
        raise _Unusable(f"it names {len(decoded)} hosts and {len(numbers)} ports")
    if not decoded:
        return tuple(("", number) for number in numbers)
    return tuple((host, number) for (host, _), number in zip(decoded, numbers, strict=True))


def _parse_queried_host(text: str) -> tuple[str, int | None]:
    alone = text.startswith("/") or (text.count(":") > 1 and not text.startswith("["))
    return (text, None) if alone else _parse_host(text)


def _parse_host(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:]*))(?::([^:]*))?", text)
    if match is None:
        raise _Unusable(
            "its host or port can't be read: an IPv6 address goes in brackets, as [::1]:5432; "
            f"{_ENCODE}"
        )
    return unquote(match[1] or match[2] or ""), _parse_port(match[3] or "")


def _parse_port(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 2**16:
        raise _Unusable(f"its port isn't a number from 1 to 65535; {_ENCODE}")
    return int(text)


def _check_parameters(parameters: Mapping[str, str]) -> None:
    """Raise _Unusable if a parameter is unknown or has an invalid value."""
    for name, value in parameters.items():
        if name == "schema":
            raise _Unusable(
                "schema isn't a parameter of PostgreSQL; remove it, and set LOGTO_WEBHOOKS_SCHEMA "
                "(--schema), or add options=-csearch_path%3D and the schema's name"
            )
        if not _PARAMETERS.fullmatch(name):
            raise _Unusable(
                f"{name} isn't a parameter of a PostgreSQL connection; remove it (a setting of the "
                f"server is written options=-c%20name%3Dvalue)"
            )
        if name in _CHOICES and value not in _CHOICES[name].split(", "):
            raise _Unusable(f"{name} must be one of {_CHOICES[name]}")
        if name in _NUMBERS and not re.fullmatch(r"[0-9]{1,6}", value):
            raise _Unusable(f"{name} must be a whole number")
        if name in _FILES and not _is_readable(name, value):
            raise _Unusable(f"{name} names a file that can't be read here")


def _is_readable(name: str, value: str) -> bool:
    if name == "sslrootcert" and value == "system":
        return True
    try:
        with Path(value).open("rb"):
            return True
    except OSError:
        return False


def _choose_driver(driver: str | None, parameters: Mapping[str, str]) -> str:
    """Return the driver: the named one, or else asyncpg if it can do what the URL asks for."""
    if driver == PSYCOPG:
        if cache := next((name for name in _CACHES if name in parameters), None):
            raise _Unusable(f"psycopg has no {cache}; behind PgBouncer, write pgbouncer=true")
        return PSYCOPG
    missing = next(
        (name for name, value in parameters.items() if not _asyncpg_can(name, value)), ""
    )
    if not missing:
        return ASYNCPG
    if driver is None and find_spec(PSYCOPG) is not None:
        return PSYCOPG
    raise _Unusable(
        f"the driver asyncpg can't do what {missing} asks for; remove it, or use psycopg "
        '(postgresql+psycopg://, with the extra "psycopg" of this package)'
    )


def _asyncpg_can(name: str, value: str) -> bool:
    translated = ("application_name", "connect_timeout", "fallback_application_name", "options")
    if _DSN_PARAMETERS.fullmatch(name) or name in _CACHES or name in translated:
        return True
    return value.lower() in _ASYNCPG_DEFAULTS.get(name, ())


def _to_asyncpg(
    address: Address, name: str, settings: dict[str, str], connect_s: float
) -> dict[str, object]:
    parameters = address.parameters
    settings["application_name"] = name
    if options := parameters.get("options"):
        settings["options"] = options
    timeout = int(parameters.get("connect_timeout", 0)) or connect_s
    arguments: dict[str, object] = {"timeout": timeout, "server_settings": settings}
    arguments |= {cache: int(parameters[cache]) for cache in _CACHES if cache in parameters}
    passed = {key: value for key, value in parameters.items() if _DSN_PARAMETERS.fullmatch(key)}
    if passed.get("sslrootcert") == "system":
        del passed["sslrootcert"]
        passed.pop("sslmode", None)  # with it, libpq allows only verify-full
        arguments["ssl"] = True
    if passed:
        arguments["dsn"] = f"postgresql://?{urlencode(passed, quote_via=quote)}"
    if len(address.hosts) > 1:
        arguments["host"] = [host for host, _ in address.hosts]
        arguments["port"] = [port or 5432 for _, port in address.hosts]
    return arguments


def _to_psycopg(
    address: Address, name: str, settings: dict[str, str], connect_s: float
) -> dict[str, object]:
    parameters = address.parameters
    ours = [f"-c {setting}={value}" for setting, value in settings.items()]
    arguments: dict[str, object] = {**parameters, "application_name": name}
    arguments["options"] = " ".join([*ours, *filter(None, [parameters.get("options")])])
    arguments["connect_timeout"] = int(parameters.get("connect_timeout", 0)) or int(connect_s)
    if len(address.hosts) > 1:
        if "connect_timeout" not in parameters:
            arguments["connect_timeout"] = _LIBPQ_LEAST_S  # for each: one may not answer
        arguments["host"] = ",".join(host for host, _ in address.hosts)
        arguments["port"] = ",".join(str(port or "") for _, port in address.hosts)
    return arguments


def _host_for_messages(hosts: tuple[tuple[str, int | None], ...]) -> str | None:
    if len(hosts) < 2:
        return hosts[0][0] or None if hosts else None
    shown = [f"[{host}]" if ":" in host else host for host, _ in hosts]
    return ",".join(
        f"{host}:{port}" if port else host for host, (_, port) in zip(shown, hosts, strict=True)
    )
