"""A database that a newer release has migrated, and this one after it: a release rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import connect
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks
from logto_webhooks.database import migrate
from logto_webhooks.database.migrate import Migrated
from logto_webhooks.database.sqlite import SqliteFile
from logto_webhooks.errors import SchemaUnknown, SettingInvalid
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import live, on_postgres, on_sqlite, send
from tests.support.service import Service, command, one_line, wait_until_done

NEWER = ("0002", "9999")
UNKNOWN = ("abc", "", "1", "00002", "-001")
KINDS = ("sqlite", "postgres")


def mark(file: Path, version: str) -> None:
    """Let the tables of a SQLite file be of that version."""
    with closing(connect(file)) as connection, connection:
        connection.execute("UPDATE logto_schema_version SET version_num = ?", (version,))


def version_of(file: Path) -> str:
    with closing(connect(file)) as connection:
        [(version,)] = connection.execute("SELECT version_num FROM logto_schema_version")
        return str(version)


@contextmanager
def at_version(kind: str, folder: Path, version: str) -> Iterator[LogtoWebhooks]:
    """An application whose tables are of that version, and stay so."""
    if kind == "sqlite":
        logto = on_sqlite(folder)
        asyncio.run(logto.migrate())
        mark(folder / "app.db", version)
        yield logto
        assert version_of(folder / "app.db") == version
        return
    logto = on_postgres()
    table = sa.table("logto_schema_version", sa.column("version_num"), schema=postgres.schema())
    set_version = sa.update(table).values(version_num=sa.bindparam("to"))
    with postgres.sync_engine().begin() as connection:
        connection.execute(set_version, {"to": version})
    try:
        yield logto
    finally:
        with postgres.sync_engine().begin() as connection:
            left = connection.scalars(sa.select(table.c.version_num)).all()
            connection.execute(set_version, {"to": migrate.head()})
    assert left == [version]


@pytest.mark.parametrize("version", NEWER)
@pytest.mark.parametrize("kind", KINDS)
def test_an_application_runs_on_it(kind: str, version: str, tmp_path: Path) -> None:
    """It migrates, starts, and applies what comes."""

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        assert await logto.database.migrate() == Migrated(version, new_schema=False)
        await send(client, make.user_created(id="ana"))
        assert (await logto.wait_for_user("ana", 20)).logto_user_id == "ana"

    with at_version(kind, tmp_path, version) as logto:
        live(logto, body)


@pytest.mark.parametrize("version", UNKNOWN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_version_of_no_release_is_told(kind: str, version: str, tmp_path: Path) -> None:
    """Nobody knows what such tables are."""

    async def run(logto: LogtoWebhooks) -> None:
        for work in (logto.migrate, logto.database.open, logto.database.check):
            with pytest.raises(SchemaUnknown, match=f"No release has version {version}: restore"):
                await work()
        info = await logto.database.inspect()
        assert (info.schema, info.unsettled_s) == (version, None)
        await logto.close()

    with at_version(kind, tmp_path, version) as logto:
        asyncio.run(run(logto))


@pytest.mark.process
@pytest.mark.parametrize("version", NEWER)
@pytest.mark.parametrize("spools", [True, False])
def test_serve_runs_on_it(version: str, spools: bool, tmp_path: Path) -> None:
    """Whether `migrate` is run first or not."""
    file = tmp_path / "logto-webhooks.db"
    assert command("migrate", folder=tmp_path).returncode == 0
    mark(file, version)
    options = ["--spool-dir", str(tmp_path / "spool")] if spools else []
    with Service(tmp_path, *options) as service:
        answer = service.post(make.user_created())
        assert (answer.status_code, answer.json()["duplicate"]) == (200, False)
        assert "id" in answer.json(), "not spooled"
        wait_until_done(service)
    migrated = command("migrate", folder=tmp_path)
    assert (migrated.returncode, migrated.stdout.splitlines()) == (
        0,
        [
            f"{file.name} is at version {version}.",
            f"A newer release has migrated it. This release, at version {migrate.head()}, "
            "runs on it.",
        ],
    )
    assert version_of(file) == version


@pytest.mark.process
def test_each_command_tells_of_a_version_of_no_release(tmp_path: Path) -> None:
    """In one line. Only `doctor` says it as a finding; with a spool directory, `serve` receives."""
    file = tmp_path / "logto-webhooks.db"
    assert command("migrate", folder=tmp_path).returncode == 0
    mark(file, "abc")
    key = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    for name in ("migrate", "serve", "worker", "status"):
        failed = command(name, folder=tmp_path, **key)
        assert failed.returncode == 2
        assert "No release has version abc: restore" in one_line(failed.stderr)
    found = command("doctor", "--only", "database", folder=tmp_path, **key)
    assert "version abc, which no release has" in found.stdout
    with Service(tmp_path, "--spool-dir", str(tmp_path / "spool")) as service:
        assert service.post(make.user_created()).status_code == 200
        mark(file, migrate.head())
        service.wait_for_log("outcome=applied")


def test_with_a_spool_directory_an_unexpected_error_holds_up_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again. A wrong setting isn't waited for: the user must correct it."""
    really_open = SqliteFile.open
    raised: list[Exception] = [RuntimeError("nobody knows"), SettingInvalid(name="x", problem="y")]

    async def fail_first(database: SqliteFile) -> None:
        if raised:
            raise raised.pop()
        await really_open(database)

    monkeypatch.setattr(SqliteFile, "open", fail_first)
    settings: dict[str, Any] = {"spool_dir": str(tmp_path / "spool")}

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana"))
        assert (await logto.wait_for_user("ana", 20)).logto_user_id == "ana"

    with pytest.raises(SettingInvalid):
        live(on_sqlite(tmp_path, **settings), body)
    live(on_sqlite(tmp_path, **settings), body)
