"""Settings that a database or a role has for all its sessions."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa

from logto_webhooks.database import open_database
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.stores import Copy

BODY = make.user_created(id="ana", name="A \\ na", customData={"text": "\\x7b"}).body


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    "setting",
    ["DateStyle = 'SQL, DMY'", "standard_conforming_strings = off", "client_encoding = SQL_ASCII"],
)
def test_defaults_that_drivers_do_not_expect(driver: str, setting: str) -> None:
    """Deliveries are stored and applied as they came."""

    async def live(url: sa.URL) -> None:
        named = url.set(drivername=f"postgresql+{driver}")
        database = open_database(named.render_as_string(hide_password=False))
        await Copy(database.host).take([BODY])
        [row] = await database.host.read(lambda store: store.find("user", "ana", 2))
        assert row.row["name"] == "A \\ na"
        assert row.row["custom_data"]["text"] == "\\x7b"
        created = await database.host.read(
            lambda store: store.connection.scalar(sa.text("SELECT created_at FROM logto_users"))
        )
        assert created.year > 2000
        await database.host.close()

    with postgres.own_database() as url:
        postgres.migrate_database(url)
        server = postgres.sync_engine().execution_options(isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(sa.text(f"ALTER DATABASE {url.database} SET {setting}"))
        asyncio.run(live(url))
