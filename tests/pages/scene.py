"""What the examples are run on: the demo's history, and the Logto that it came from."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

import pytest

from logto_webhooks.clock import SystemClock
from logto_webhooks.database import open_database
from logto_webhooks.deliveries import NewDelivery, identify, sent_at_of
from logto_webhooks.samples import history
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import SIGNING_KEY, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.doc_runner import WIDTH
from tests.support.fake import credentials
from tests.support.service import Service, clean_environment, command

NAME: Final = "calm"
FILE: Final = "logto-webhooks.db"
SERVED: Final = ("listen", "local-development", "trigger")
LOST: Final = 9  # of the newest deliveries, which Logto's log has
TRAVEL_MS: Final = 24
APP: Final = """\
from logto_webhooks import LogtoWebhooks, events

logto = LogtoWebhooks(signing_key="a-key-to-try-it-with", database_url="sqlite:///logto-webhooks.db")


@logto.on(events.LocalUserCreated, max_attempts=1)
def greet(event: events.LocalUserCreated) -> None:
    if event.user.email is None:
        raise ValueError("no address to greet")
"""
MAPPED: Final = ("mapping",)  # pages on which the application also has a table of its own
MAPPING: Final = """\
import sqlalchemy as sa

people = sa.Table(
    "people",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("logto_user_id", sa.Text, unique=True),
    sa.Column("email", sa.Text),
    sa.Column("name", sa.Text),
)
logto.map_users(
    people,
    key="logto_user_id",
    link="email",
    columns={"email": "email", "name": "name"},
    when_deleted="unlink",
)
"""
PEOPLE: Final = """\
CREATE TABLE people (id INTEGER PRIMARY KEY, logto_user_id TEXT UNIQUE, email TEXT, name TEXT);
INSERT INTO people (email, name) VALUES ('Ana@example.com', 'Ana'), ('ana@example.com', 'Ana A.');
"""
# As if one transaction had applied everything: on a slow machine there are several, so another
# record would have waited the longest.
AT_ONCE: Final = """\
UPDATE logto_records SET refetch_since = (SELECT min(refetch_since) FROM logto_records)
WHERE refetch_since IS NOT NULL;
"""
# What the application does with its rows: one is deleted, one has another name.
EDITS: Final = """\
DELETE FROM people WHERE logto_user_id = (SELECT min(logto_user_id) FROM people);
UPDATE people SET name = 'Bobby' WHERE logto_user_id = 'bo';
"""


def fill(folder: Path) -> None:
    """Put what was received into a folder, and an application whose handler ran, and failed."""
    (folder / "app.py").write_text(APP)
    (folder / "body.json").write_bytes(make.user_created(id="ana", at=0).body)
    asyncio.run(_fill(folder))
    drained = command("worker", "--drain", "--app", "app:logto", folder=folder)
    assert drained.returncode == 0, drained.stderr
    _run(folder, AT_ONCE)


@contextmanager
def stage(folder: Path, page: str) -> Iterator[None]:
    """Be in the folder, with settings of a Logto that answers; some have a service, too."""
    serving: AbstractContextManager[Service | None] = (
        Service(folder) if page in SERVED else nullcontext()
    )
    with pytest.MonkeyPatch.context() as patch, _answering() as settings, serving as service:
        for name in set(os.environ) - set(clean_environment({})):
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        if service is not None:
            patch.setenv("LOGTO_WEBHOOKS_PORT", str(service.port))
            patch.setenv("LOGTO_WEBHOOK_SIGNING_KEY", SIGNING_KEY)
        patch.setenv("COLUMNS", str(WIDTH))
        patch.chdir(folder)
        if page in MAPPED:
            _map(folder)
        yield


def _map(folder: Path) -> None:
    """Give the application a mapped table, with rows from before, and edits of its own."""
    _run(folder, PEOPLE)
    with (folder / "app.py").open("a") as file:
        file.write(MAPPING)
    drained = command("worker", "--drain", "--app", "app:logto", folder=folder)
    assert drained.returncode == 0, drained.stderr
    _run(folder, EDITS)


def _run(folder: Path, script: str) -> None:
    connection = sqlite3.connect(folder / FILE)
    connection.executescript(script)
    connection.close()


async def _fill(folder: Path) -> None:
    recorded = [each.body for each in history.load(NAME).deliveries[:-LOST]]
    database = open_database(f"sqlite:///{folder / FILE}")
    await database.open()
    now = time.time_ns() // 1_000_000 + 1_000  # after the installation: for handlers
    people = [
        make.user_created(id="ana", username="ana", name="Ana", email="ana@example.com", at=now),
        make.user_created(id="bo", username="bo", name="Bo", primaryEmail=None, at=now + 100),
    ]
    new = [_received(each) for each in [*recorded, *(each.body for each in people)]]
    await database.host.run(lambda store: store.add(new))
    await database.host.close()
    await asyncio.sleep(3.5)  # until they are of the past: a comparison asks about them then


def _received(body: bytes) -> NewDelivery:
    sent_by_now = time.time_ns() // 1_000_000 + 60_000  # later than any of them was sent
    at = sent_at_of(identify(trust(body), sent_by_now).digest)
    return identify(trust(body), at + TRAVEL_MS)


@contextmanager
def _answering() -> Iterator[dict[str, str]]:
    """A Logto on an event loop of its own: commands have the main thread's."""
    ready, ended = threading.Event(), threading.Event()
    settings: dict[str, str] = {}

    async def answer() -> None:
        async with FakeLogto.from_history(NAME, now=SystemClock().now) as logto:
            settings.update(credentials(logto))
            ready.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(answer()))
    thread.start()
    ready.wait()
    try:
        yield settings
    finally:
        ended.set()
        thread.join()
