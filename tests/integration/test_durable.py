"""What is answered 200 is on the disk of the database, whatever is set for its role."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.database import open_database
from logto_webhooks.ingest.spool import SpoolDirectory
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.stores import StoreKind, delivery, open_host

TRIGGER = """
CREATE OR REPLACE FUNCTION note_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.last_error := current_setting('synchronous_commit'); RETURN NEW; END $$;
DROP TRIGGER IF EXISTS note_commit ON logto_deliveries;
CREATE TRIGGER note_commit BEFORE INSERT ON logto_deliveries
FOR EACH ROW EXECUTE FUNCTION note_commit();
"""


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg", "postgres-thread"])
@pytest.mark.parametrize(
    ("of_role", "used"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")]
)
def test_accepting_waits_for_the_disk(
    of_role: str, used: str, kind: StoreKind, tmp_path: Path
) -> None:
    """Where the role's commits don't; what promises more, or was chosen, stays."""
    host = open_host(kind, tmp_path)
    server = postgres.sync_engine().execution_options(isolation_level="AUTOCOMMIT")
    table = f"{postgres.schema()}.logto_deliveries"

    def run(*statements: str) -> None:
        with server.connect() as connection:
            connection.execute(sa.text(f"SET search_path TO {postgres.schema()}"))
            for statement in statements:
                connection.execute(sa.text(statement))
            connection.execute(sa.text("RESET search_path"))

    async def accept() -> None:
        new = [delivery(make.user_created(id="u").body)]
        await host.accept(lambda store: store.add(new), 10)
        await host.close()

    run(TRIGGER, f"ALTER ROLE CURRENT_USER SET synchronous_commit = {of_role}")
    try:
        asyncio.run(accept())
    finally:
        run(
            "ALTER ROLE CURRENT_USER RESET synchronous_commit",
            f"DROP TRIGGER note_commit ON {table}",
        )
    with postgres.sync_engine().connect() as looking:
        assert looking.scalars(sa.text(f"SELECT last_error FROM {table}")).all() == [used]


def test_files_beside_a_database_come_and_go_with_its_connections(tmp_path: Path) -> None:
    """Nobody replaced a `-wal` that SQLite itself made anew, with the first connection."""
    database = open_database(f"sqlite:///{tmp_path / 'app.db'}")

    async def accept(user: str) -> None:
        new = [delivery(make.user_created(id=user).body)]
        await database.host.accept(lambda store: store.add(new), 10)

    async def run() -> None:
        await database.open()
        wal = tmp_path / "app.db-wal"
        for number in range(3):
            await accept(f"user{number}")
            (tmp_path / f"old{number}").hardlink_to(wal)  # so that the next one has another inode
            await database.host.close()
            assert not wal.exists()
        assert (await database.host.read(lambda store: store.status())).deliveries["pending"] == 3
        await database.host.close()

    asyncio.run(run())


def test_a_changed_working_directory_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler may change it; the paths of the settings can be relative."""
    monkeypatch.chdir(tmp_path)
    database = open_database("sqlite:///relative.db")
    spool = SpoolDirectory(Path("spool"))

    async def live() -> None:
        await database.open()
        spool.make()
        assert database.may_work()
        for number in range(2):
            new = delivery(make.user_created(id=f"u{number}").body)
            await database.host.run(lambda store, new=new: store.add([new]))  # type: ignore[misc]
            spool.write([new])
            monkeypatch.chdir("/")
        await database.check()
        status = await database.host.read(lambda store: store.status())
        assert status.deliveries["pending"] == 2
        await database.host.close()

    asyncio.run(live())
    assert (spool.count(), len(list((tmp_path / "spool").iterdir()))) == (2, 2)
