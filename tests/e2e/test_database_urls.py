"""URLs of PostgreSQL as hosts of databases hand them out: they work, or one line says why not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from logto_webhooks.clock import SystemClock
from logto_webhooks.database import open_database
from logto_webhooks.database.migrate import _LOCK
from logto_webhooks.database.postgres import (
    Postgres,
    StatementLimit,
    make_postgres_engine,
    parse_url,
)
from logto_webhooks.deliveries import identify
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.service import command, one_line

DRIVERS = ("postgresql+asyncpg", "postgresql+psycopg")
SECRET = "s3cr3t-Pa55word"


def test_parts(tmp_path: Path) -> None:
    """Users, passwords, hosts and names, wherever they stand and whatever is in them."""
    for text, user, password, hosts, name in [
        ("postgres://u:p@h/d", "u", "p", (("h", None),), "d"),
        ("postgresql://u:p@ss@h:1/d", "u", "p@ss", (("h", 1),), "d"),
        ("postgresql://u:a%40b%3A%2F+c%zz@h/d", "u", "a@b:/+c%zz", (("h", None),), "d"),
        ("postgresql://u:a:b@h/d", "u", "a:b", (("h", None),), "d"),
        ("postgresql://h/d?user=u&password=p%26q+r", "u", "p&q+r", (("h", None),), "d"),
        ("postgresql://u:old@h/d?password=new", "u", "new", (("h", None),), "d"),
        ("postgresql://[::1]:5433/d", None, None, (("::1", 5433),), "d"),
        ("postgresql://a:1,b,[::1]:3/d", None, None, (("a", 1), ("b", None), ("::1", 3)), "d"),
        ("postgresql:///d?host=a:1&host=b:2", None, None, (("a", 1), ("b", 2)), "d"),
        ("postgresql:///d?host=a,b&port=1,2", None, None, (("a", 1), ("b", 2)), "d"),
        ("postgresql:///d?host=a,b&port=1", None, None, (("a", 1), ("b", 1)), "d"),
        ("postgresql:///?host=/run/pg&port=1&dbname=d", None, None, (("/run/pg", 1),), "d"),
        ("postgresql://%2Frun%2Fpg/d", None, None, (("/run/pg", None),), "d"),
        ("postgresql://", None, None, (), None),
    ]:
        address = parse_url(text, "x")
        found = (address.url.username, address.url.password, address.hosts, address.url.database)
        assert found == (user, password, hosts, name), text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"postgresql://u:{SECRET}/x@h/d", "percent-encode"),
        (f"postgresql://u:{SECRET}?x@h/d", "percent-encode"),
        (f"postgresql://u:{SECRET}@h:port/d", "its port isn't a number"),
        (f"postgresql://u:{SECRET}@h:99999/d", "its port isn't a number"),
        (f"postgresql://u:{SECRET}@[bad/d", "an IPv6 address goes in brackets"),
        (f"postgresql://h/d?sslmode={SECRET}", "sslmode must be one of disable"),
        (f"postgresql://h/d?ssl={SECRET}", "sslmode must be one of disable"),
        (f"postgresql://h/d?target_session_attrs={SECRET}", "must be one of any"),
        (f"postgresql://h/d?connect_timeout={SECRET}", "connect_timeout must be a whole number"),
        (f"postgresql://h/d?sslrootcert=/{SECRET}", "sslrootcert names a file"),
        (f"postgresql://h/d?connection_limit={SECRET}", "connection_limit isn't a parameter"),
        (f"postgresql://h/d?{SECRET}", "isn't of the form name=value"),
        (f"postgresql://h/d?schema={SECRET}", "LOGTO_WEBHOOKS_SCHEMA"),
        (f"postgresql://a,b,c/d?port=1,2&password={SECRET}", "3 hosts and 2 ports"),
        (f"postgresql+psycopg2://u:{SECRET}@h/d", "driver psycopg2 isn't asyncpg or psycopg; use"),
        (f"postgresql+{SECRET}://h/d", "isn't asyncpg or psycopg"),
        (f"postgresql+asyncpg://u:{SECRET}@h/d?channel_binding=require", "use psycopg"),
        (f"postgresql+asyncpg://u:{SECRET}@h/d?keepalives_idle=30", "use psycopg"),
        (f"postgresql+psycopg://u:{SECRET}@h/d?statement_cache_size=0", "write pgbouncer=true"),
        (f"'postgresql://u:{SECRET}@h/d'", "remove the quotes"),
        (f"mysql://u:{SECRET}@h/d", "not mysql"),
        (f"{SECRET}://h/d", "isn't a URL"),
        (f"postgresql:u:{SECRET}@h/d", "isn't a URL"),
        (f"u:{SECRET}@h/d", "isn't a URL"),
    ],
)
def test_what_can_not_be_used_is_told_without_its_values(text: str, says: str) -> None:
    """By the name of the setting, and with what to do."""
    with pytest.raises(SettingInvalid) as raised:
        open_database(text, name="DATABASE_URL in .env")
    assert says in str(raised.value)
    assert str(raised.value).startswith("DATABASE_URL in .env can't be used")
    assert SECRET not in str(raised.value)


def test_a_url_that_names_no_driver_takes_the_one_that_can() -> None:
    """Neon's has channel_binding=require, which asyncpg doesn't know."""
    assert parse_url("postgresql://h/d?sslmode=require", "x").driver == "asyncpg"
    assert parse_url("postgresql://h/d?channel_binding=require", "x").driver == "psycopg"
    assert parse_url("postgresql://h/d?channel_binding=prefer", "x").driver == "asyncpg"


def server(scheme: str, query: str, **parts: Any) -> str:
    """The URL of the tests' server, with more in its query."""
    text = postgres.server_url().set(**parts).render_as_string(hide_password=False)
    bare = text.replace("postgresql://", f"{scheme}://")
    return f"{bare}{'&' if '?' in bare else '?'}{query}"


def seen(url: str, *names: str) -> list[str]:
    """What the server says of these settings, on a connection by this URL."""

    async def ask() -> list[str]:
        engine = make_postgres_engine(url)
        async with engine.connect() as connection:
            found = [
                await connection.scalar(sa.select(sa.func.current_setting(name))) for name in names
            ]
        await engine.dispose()
        return [str(each) for each in found]

    return asyncio.run(ask())


@pytest.mark.parametrize("scheme", DRIVERS)
@pytest.mark.parametrize("option", ["-c {}", "-c{}", "--{}"])
def test_settings_of_the_url_win_and_ours_stay_beside_them(scheme: str, option: str) -> None:
    """However `options` spells them."""
    options = quote(
        option.format("search_path=theirs") + " " + option.format("statement_timeout=7s")
    )
    url = server(scheme, f"application_name=shop&connect_timeout=9&options={options}")
    names = ("search_path", "statement_timeout", "application_name")
    assert seen(url, *names) == ["theirs", "7s", "shop"]
    assert seen(url, "idle_in_transaction_session_timeout") == ["10s"]
    assert seen(server(scheme, "sslmode=prefer"), *names[1:]) == ["8s", "logto-webhooks"]


@pytest.mark.parametrize("scheme", DRIVERS)
def test_the_limit_of_statements_is_ours_or_the_urls(scheme: str) -> None:
    """On the server, and for the driver, which gives up by itself. Connections that are opened
    later have a later limit."""

    async def sleep(url: str, limit: StatementLimit) -> None:
        engine = make_postgres_engine(url, limit=limit, poolclass=NullPool)

        async def sleep_once() -> None:
            async with engine.connect() as connection:
                await connection.execute(sa.text("SELECT pg_sleep(0.5)"))

        with pytest.raises((sa.exc.DBAPIError, TimeoutError)):
            await sleep_once()
        limit.seconds = None
        await sleep_once()

    bare, theirs = server(scheme, "connect_timeout=9"), quote("-c statement_timeout={}")
    asyncio.run(sleep(bare, StatementLimit(0.1)))

    async def sleep_in_theirs(value: str) -> None:
        url = server(scheme, f"options={theirs.replace(quote('{}'), value)}")
        engine = make_postgres_engine(url, limit=StatementLimit(0.1), poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(sa.text("SELECT pg_sleep(0.5)"))

    for value in ("0", "5s", "5000", "1min"):
        asyncio.run(sleep_in_theirs(value))


@pytest.mark.parametrize("scheme", DRIVERS)
def test_migrate_waits_for_another_longer_than_a_statement_may_take(scheme: str) -> None:
    """Nor is a long statement of it ended."""
    with postgres.own_database() as url:
        text = url.set(drivername=scheme).render_as_string(hide_password=False)

        async def run() -> None:
            database = open_database(text)
            assert isinstance(database, Postgres)
            assert database._limit is not None
            database._limit.seconds = 0.1
            engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
            with engine.connect() as other:
                other.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                migrating = asyncio.create_task(database.migrate())
                await asyncio.sleep(1)
                assert not migrating.done()
            await migrating
            await database.check()
            await database.host.close()
            engine.dispose()

        asyncio.run(run())


@pytest.mark.process
@pytest.mark.parametrize("scheme", DRIVERS)
def test_a_statement_of_a_handler_may_take_as_long_as_the_handler(
    scheme: str, tmp_path: Path
) -> None:
    """The longest time limit of a handler with a transaction counts."""
    (tmp_path / "app.py").write_text(LIMITED)
    with postgres.own_database() as url:
        postgres.migrate_database(url)
        text = url.set(drivername=scheme).render_as_string(hide_password=False)

        async def fill() -> None:
            database = open_database(text)
            now = SystemClock().now() + 3_000
            new = identify(trust(make.user_created(id="ana", at=now).body), now)
            await database.host.run(lambda store: store.add([new]))
            await database.host.close()

        options = ["--app", "app:logto", "--database-url", text]
        first = command("worker", "--drain", *options, folder=tmp_path)
        assert first.returncode == 0, first.stderr
        asyncio.run(fill())
        second = command("worker", "--drain", *options, folder=tmp_path)
        assert second.returncode == 0, second.stderr
        assert (tmp_path / "limit").read_text() == "90s"


LIMITED = """
import pathlib
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from logto_webhooks import LogtoWebhooks

logto = LogtoWebhooks.from_env()

@logto.on("LocalUserCreated", time_limit=90)
async def look(session: AsyncSession):
    limit = await session.scalar(sa.text("SELECT current_setting('statement_timeout')"))
    pathlib.Path("limit").write_text(limit)

@logto.on("LocalUserCreated", name="long", time_limit=1e9)
async def long(): ...
"""


@pytest.mark.parametrize("scheme", DRIVERS)
@pytest.mark.parametrize(
    "query",
    [
        "sslmode=disable",
        "sslmode=allow",
        "ssl=false",
        "channel_binding=disable&gssencmode=disable",
        "fallback_application_name=shop&client_encoding=utf8",
        "target_session_attrs=read-write",
        f"password={SECRET}",
    ],
)
def test_what_both_drivers_take(scheme: str, query: str) -> None:
    """They connect."""
    assert seen(server(scheme, query), "server_encoding") == ["UTF8"]


@pytest.mark.parametrize("scheme", DRIVERS)
def test_the_second_of_several_hosts_is_tried(scheme: str, tmp_path: Path) -> None:
    """Where the first doesn't answer."""
    place = postgres.server_url()
    socket = place.query.get("host") or place.host
    hosts, ports = f"{tmp_path},{socket}", f"1,{place.port or 5432}"
    url = f"{scheme}://{place.username}@/{place.database}?host={hosts}&port={ports}"
    assert seen(url, "server_encoding") == ["UTF8"]


@pytest.mark.parametrize("scheme", DRIVERS)
def test_an_error_names_what_was_read_and_no_secret(scheme: str, tmp_path: Path) -> None:
    """The option, the variable, or the variable and its file."""
    url = f"{scheme}://u:{SECRET}@127.0.0.1:1/d?connect_timeout=2"
    (tmp_path / "file.env").write_text(f"DATABASE_URL='{url}'\n")
    (tmp_path / "secret").write_text(url)
    for arguments, variables, name in [
        (["--database-url", url], {}, "that --database-url is right"),
        ([], {"DATABASE_URL": url}, "that DATABASE_URL is right"),
        (["--env-file", "file.env"], {}, "that DATABASE_URL in file.env is right"),
        (
            [],
            {"LOGTO_WEBHOOKS_DATABASE_URL_FILE": "secret"},
            "that LOGTO_WEBHOOKS_DATABASE_URL_FILE is right",
        ),
    ]:
        ended = command("status", *arguments, folder=tmp_path, **variables)
        assert ended.returncode == 2
        assert name in one_line(ended.stderr)
        assert SECRET not in ended.stdout + ended.stderr
    examined = command("doctor", "--json", folder=tmp_path, DATABASE_URL=url)
    assert "that DATABASE_URL is right" in examined.stdout
    assert SECRET not in examined.stdout + examined.stderr
