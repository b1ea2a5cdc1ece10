"""A database that this user has no write permission for: said at the start, and found."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from logto_webhooks.database import open_database
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.ingest.spool import SpoolDirectory, Unspooler
from logto_webhooks.instrumentation import NotUnspooled, TelemetryEvent
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.file_permissions import bound, mode
from tests.support.service import clean_environment, command, one_line
from tests.support.stores import delivery

PLACES = {"the file": ("logto-webhooks.db", 0o444), "its folder": (".", 0o555)}


@pytest.mark.parametrize(("place", "bits"), PLACES.values(), ids=PLACES)
def test_what_may_not_be_written_is_told(place: str, bits: int, tmp_path: Path) -> None:
    assert command("migrate", folder=tmp_path).returncode == 0
    another = sqlite3.connect(tmp_path / "logto-webhooks.db")
    another.execute("SELECT count(*) FROM logto_users").fetchone()  # so the -wal is there
    with mode(tmp_path / place, bits), closing(another):
        found = bound("doctor", "--only", "durability", "--json", folder=tmp_path)
        served = bound(
            "serve", "--port", "0", folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=SIGNING_KEY
        )
    codes = [each["code"] for each in msgspec.json.decode(found.stdout)]
    assert ("database_unwritable" in codes, found.returncode) == (True, 2)
    assert served.returncode == 2
    assert "has no write permission for" in served.stderr


@pytest.mark.parametrize("bits", [0o444, 0])
def test_who_may_not_use_the_file_is_told_what_to_do(bits: int, tmp_path: Path) -> None:
    """Any command: run it as the service's user."""
    assert command("migrate", folder=tmp_path).returncode == 0
    key = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    with mode(tmp_path / "logto-webhooks.db", bits), mode(tmp_path, 0o555):
        for name in ("status", "serve", "migrate", "users x"):
            refused = bound(*name.split(), folder=tmp_path, **key)
            assert refused.returncode == 2
            assert "run the command as the service's user" in one_line(refused.stderr), name


@pytest.mark.parametrize("umask", ["0000", "0022", "0777"])
def test_files_are_for_their_owner_alone(umask: str, tmp_path: Path) -> None:
    """Whatever the umask: what `init` and `serve` write, and what a worker locks."""
    run = f"umask {umask}; exec {sys.executable} -m logto_webhooks"
    environment = clean_environment({"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY})
    for arguments in ("init", "migrate", "worker --drain"):
        done = subprocess.run(
            ["/bin/sh", "-c", f"{run} {arguments}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert {".env", "logto-webhooks.db", "logto-webhooks.db-worker"} <= modes.keys()
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702])
def test_a_spool_directory_for_others_is_refused(bits: int, tmp_path: Path) -> None:
    """They could add deliveries that nobody signed. `serve` and `worker` say what to run."""
    spool = tmp_path / "our spool"
    spool.mkdir()
    spool.chmod(bits)
    assert command("migrate", folder=tmp_path).returncode == 0
    key = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    for name in ("serve --port 0", "worker --drain"):
        options = [*name.split(), "--spool-dir", str(spool)]
        refused = command(*options, folder=tmp_path, **key)
        assert refused.returncode == 2
        *_, line = refused.stderr.splitlines()  # the first may tell of the database
        assert f"chmod 700 '{spool}'" in line
        assert "Traceback" not in refused.stderr
    spool.chmod(0o700)
    drained = command("worker", "--drain", "--spool-dir", str(spool), folder=tmp_path, **key)
    assert drained.returncode == 0, drained.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give")
def test_what_another_user_put_into_the_spool_is_refused(tmp_path: Path) -> None:
    """A directory of somebody else's, and a file that is left of a time when others could write."""

    async def unspool(spool: SpoolDirectory) -> None:
        database = open_database(f"sqlite:///{tmp_path / 'spooled.db'}")
        await database.migrate()
        unspooler = Unspooler(spool, database.host, reports.append, lambda: None)
        assert await unspooler.turn() == 1
        await database.host.close()

    folder, reports = tmp_path / "spool", list[TelemetryEvent]()
    spool = SpoolDirectory(folder)
    spool.make()
    spool.write([delivery(make.user_created().body)])
    [forged] = folder.iterdir()
    os.chown(forged, 65534, 65534)
    spool.write([delivery(make.user_created().body)])
    asyncio.run(unspool(spool))
    assert "another user" in str([report for report in reports if isinstance(report, NotUnspooled)])
    assert [file.name for file in folder.iterdir()] == [f"{forged.name}.refused"]
    os.chown(folder, 65534, 65534)
    with pytest.raises(SettingInvalid, match="another user"):
        spool.make()
