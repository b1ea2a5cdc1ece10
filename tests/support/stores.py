"""A copy of Logto on any store: bodies go in, and all that is known can be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, get_args

import msgspec
import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy.pool import NullPool

from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.database import migrate, open_database, sqlite
from logto_webhooks.database.postgres import Postgres, make_postgres_engine
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.database.runner import HandlerRunner, TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, identify, sent_at_of
from logto_webhooks.events import parse
from logto_webhooks.instrumentation import Observer, TelemetryEvent
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.records.merge import merge
from logto_webhooks.records.projection import child_rows, project
from logto_webhooks.records.record import (
    NEVER,
    Change,
    Key,
    Kind,
    Named,
    Record,
    Tombstone,
)
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.backend import MemoryBackend
from tests.support import postgres

T = TypeVar("T")

StoreKind = Literal["sqlite", "asyncpg", "psycopg", "postgres-thread"]
STORES: tuple[StoreKind, ...] = get_args(StoreKind)
ALL = 1_000_000
RECEIVED_AT = 1_795_485_335_924


def memory_host() -> TransactionRunner:
    """An empty store on SQLite in memory, for what is the same on every store."""
    return MemoryBackend().host


def open_host(kind: StoreKind, folder: Path) -> HandlerRunner:
    """An empty store, in the host that runs it."""
    if kind == "sqlite":
        return _sqlite_host(folder)
    schema = postgres.emptied_schema()
    if kind == "postgres-thread":
        url = postgres.server_url().set(drivername="postgresql+psycopg")
        return Postgres(sa.create_engine(url), schema).host
    # Tests run on an event loop each, and a connection belongs to one loop.
    url = postgres.server_url().set(drivername=f"postgresql+{kind}")
    return Postgres(make_postgres_engine(url, poolclass=NullPool), schema).host


def _sqlite_host(folder: Path) -> HandlerRunner:
    for old in folder.glob("copy.db*"):
        old.unlink()
    (folder / "copy.db").write_bytes(_make_migrated())
    return open_database(f"sqlite:///{folder / 'copy.db'}").host


@functools.cache
def _make_migrated() -> bytes:
    """Make the file once: migrating takes longer than most tests."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "template.db"
        sqlite.create_file(file)
        engine = sqlite.make_sqlite_engine(file)
        with engine.begin() as connection:
            migrate.upgrade(connection)
        engine.dispose()
        return file.read_bytes()


def delivery(body: bytes, received_at: int = RECEIVED_AT) -> NewDelivery:
    """A delivery of a body that needs no signature, received at that time, and dated as it says."""
    sent_at = sent_at_of(identify(trust(body), received_at).digest)
    return identify(trust(body), received_at, ahead=max(0, sent_at - received_at))


def keys_of(bodies: Iterable[bytes]) -> set[Key]:
    """All records that the bodies are about."""
    touched = {
        change.key for body in set(bodies) for change in changes_from_event(parse(trust(body)))
    }
    ends = {end for key in touched if key.kind == "membership" for end in key.organization_and_user}
    return touched | ends


class Known(Struct, frozen=True):
    """All that a store knows, without what is its own (local ids, when it heard of it)."""

    records: dict[Key, Record]
    users: list[FoundRow]
    organizations: list[FoundRow]
    waiting: list[RefetchNeed]


class Copy:
    """Receives bodies and applies them, in any number of batches."""

    def __init__(self, host: TransactionRunner, observe: Observer | None = None) -> None:
        self.host = host
        self.reports: list[TelemetryEvent] = []
        observe = observe or self.reports.append
        self.worker = DeliveryWorker(host, FrozenClock(), observe, jitter=lambda: 0.0)

    async def take(self, bodies: Iterable[bytes]) -> None:
        """Add to the inbox, and apply."""
        deliveries = [delivery(body) for body in bodies]
        await self.host.run(lambda store: store.add(deliveries))
        while await self.worker.step():
            pass

    async def known(self, keys: set[Key]) -> Known:
        """Return all that is known; `keys` are the records."""
        records = await self.host.run(lambda store: _locked(store, keys))
        return await self.host.read(lambda store: _known(store, records))


def fold(bodies: Iterable[bytes]) -> Known:
    """What a store must know once it has these bodies: the rule alone, without a database."""
    records: dict[Key, Record] = {}

    def apply(change: Change) -> None:
        records[change.key] = merge(records.get(change.key, Record(change.key)), change)

    for body in bodies:
        for change in changes_from_event(parse(trust(body))):
            apply(change)
    for key in [key for key in records if key.kind == "membership"]:
        for end in key.organization_and_user:
            ended_at = records.setdefault(end, Record(end)).ended_at
            if ended_at != NEVER:  # it ends the membership, which may be evidence that it exists
                apply(Tombstone(key, ended_at))
                apply(Named(end, records[key].told_stamp))
    return Known(
        records,
        _projected(records, "user"),
        _projected(records, "organization"),
        [
            RefetchNeed(key=key, reason=record.waiting_for, doubtful=bool(record.doubts))
            for key, record in sorted(records.items())
            if record.waiting_for is not None
        ],
    )


def _projected(records: dict[Key, Record], kind: Kind) -> list[FoundRow]:
    return [
        FoundRow(
            row=row,
            waiting_for=record.waiting_for,
            memberships=[id for id, pair in _pairs(records, key) if project(pair)],
            memberships_in_doubt=[id for id, pair in _pairs(records, key) if pair.doubts],
            roles=sorted(role["name"] for role in child_rows(record).get("roles", ())),
        )
        for key, record in records.items()
        if key.kind == kind and (row := project(record))
    ]


def _pairs(records: dict[Key, Record], end: Key) -> list[tuple[str, Record]]:
    """The memberships of a user or an organization, by the id of the other end."""
    return sorted(
        (other.id, record)
        for key, record in records.items()
        if key.kind == "membership" and end in key.organization_and_user
        for other in key.organization_and_user
        if other != end
    )


def _locked(store: Store, keys: set[Key]) -> dict[Key, Record]:
    found = store.lock(sorted(keys))
    return {
        key: msgspec.structs.replace(record, announced=False, local_id="")
        for key, record in found.items()
    }


def _known(store: Store, records: dict[Key, Record]) -> Known:
    return Known(
        records,
        [_without_id(each) for each in store.find("user", "", ALL)],
        [_without_id(each) for each in store.find("organization", "", ALL)],
        sorted(store.waiting(ALL), key=lambda each: each.key),
    )


def _without_id(found: FoundRow) -> FoundRow:
    row: dict[str, Any] = {name: value for name, value in found.row.items() if name != "id"}
    return msgspec.structs.replace(found, row=row)


class WrappedRunner:
    """Runs work on another runner. A test overrides `run` to make it fail."""

    def __init__(self, host: TransactionRunner) -> None:
        self._host = host

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run."""
        return await self._host.run(work)

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """Run."""
        return await self.run(work)

    async def run_slow(self, work: Callable[[Store], T], statement_s: float) -> T:
        """Run."""
        return await self._host.run_slow(work, statement_s)

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run."""
        return await self.run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Read."""
        return await self._host.read(work)

    async def read_long(self, work: Callable[[Store], T]) -> T:
        """Read."""
        return await self._host.read_long(work)

    async def close(self) -> None:
        """Close nothing: the other runner is the fixture's."""
