"""A database that this user has no write permission for: said at the start, and found."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from logto_webhooks.testing import SIGNING_KEY
from tests.support.file_permissions import bound, mode
from tests.support.service import clean_environment, command

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
