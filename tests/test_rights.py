"""A database that this user may not write to: said at the start, and found."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from logto_webhooks.testing import SIGNING_KEY
from tests.support.rights import bound, mode
from tests.support.service import command

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
    assert "may not write to" in served.stderr
