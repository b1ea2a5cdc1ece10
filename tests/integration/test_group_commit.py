"""A database that fails for a while costs no delivery: it is tried again, or spooled."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import sqlalchemy as sa
import uvloop

from logto_webhooks.clock import SystemClock
from logto_webhooks.database import Database, open_database
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter, NewDelivery, StoreResult, identify
from logto_webhooks.errors import SettingInvalid, StoreUnavailable, TimedOut
from logto_webhooks.ingest import spool as spool_module
from logto_webhooks.ingest.group_commit import TRY_S, GroupCommit
from logto_webhooks.ingest.spool import IN_USE_S, MAX_ROWS, SpoolDirectory, Unspooler
from logto_webhooks.instrumentation import (
    NotStored,
    NotUnspooled,
    Retrying,
    Spooled,
    StoredLate,
    TelemetryEvent,
    Unspooled,
)
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.service import Service, command, one_line, wait_until_done
from tests.support.stores import delivery
from tests.support.waiting import eventually, until


class Relay:
    """A way to a server that can fall silent: nothing is passed on, and nothing is closed."""

    def __init__(self, target: Callable[[], socket.socket]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._passing: list[threading.Event] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Let what is connected fall silent; new connections work."""
        for passing in self._passing:
            passing.clear()

    def close(self) -> None:
        self._listener.close()
        for passing in self._passing:
            passing.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                passing = threading.Event()
                passing.set()
                self._passing.append(passing)
                threading.Thread(target=self._carry, args=(near, passing), daemon=True).start()

    def _carry(self, near: socket.socket, passing: threading.Event) -> None:
        """Pass on both ways until either ends, and close both."""
        with near, self._target() as far:
            back = threading.Thread(target=_pass_on, args=(far, near, passing), daemon=True)
            back.start()
            _pass_on(near, far, passing)
            back.join()


def _pass_on(source: socket.socket, to: socket.socket, passing: threading.Event) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            passing.wait()
            to.sendall(data)
    passing.wait()
    for each in (source, to):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def relayed() -> Iterator[tuple[Relay, sa.URL]]:
    """A migrated database behind a relay."""
    with postgres.own_database() as url:
        host, port = url.host or url.query.get("host"), url.port or 5432
        assert isinstance(host, str)

        def target() -> socket.socket:
            if host.startswith("/"):
                far = socket.socket(socket.AF_UNIX)
                far.connect(f"{host}/.s.PGSQL.{port}")
                return far
            return socket.create_connection((host, port))

        postgres.migrate_database(url)
        relay = Relay(target)
        try:
            there = url.set(host="127.0.0.1", port=relay.port)
            yield relay, there.difference_update_query(["host", "port"])
        finally:
            relay.close()


@pytest.mark.parametrize("kind", postgres.ENGINES)
def test_connections_that_fall_silent_are_replaced(kind: str) -> None:
    """Those of accepting, of the worker, and of checks, whoever made the engine. The worker's may
    be others than those of accepting: its first call fails then."""

    async def main() -> None:
        with relayed() as (relay, url):
            database, engine = postgres.open_as(kind, url)
            group = GroupCommit(database.host, lambda report: None, lambda: None)

            async def add() -> StoreResult | None:
                return await group.add(delivery(make.user_created().body))

            assert all(await asyncio.gather(*(add() for _ in range(10))))
            await asyncio.gather(*(database.host.run(lambda store: store.status()) for _ in "123"))
            relay.silence()
            started = time.monotonic()
            accepted = await add()
            assert accepted is not None
            assert not accepted.duplicate
            await database.check()
            with suppress(StoreUnavailable):
                await database.host.run(lambda store: store.status())
            await asyncio.gather(*(database.host.run(lambda store: store.status()) for _ in "123"))
            relay.silence()
            with suppress(StoreUnavailable):
                await database.host.run(lambda store: store.status())
            await database.host.run(lambda store: store.status())
            assert time.monotonic() - started < 30
            relay.silence()
            ending = time.monotonic()
            await database.host.close()
            assert time.monotonic() - ending < 10
            if isinstance(engine, sa.Engine):
                engine.dispose()
            elif engine is not None:
                relay.close()
                with suppress(Exception):
                    await asyncio.wait_for(engine.dispose(), 5)

    asyncio.run(main())


class Losing:
    """A host before a real one: commits are done, but their answers are lost, for a while."""

    def __init__(self, host: TransactionRunner, failures: int) -> None:
        self._host = host
        self.failures = failures
        self.error: Exception = StoreUnavailable(problem="the answer was lost")
        self.before = False

    async def accept(self, work: Callable[[Store], Any], limit_s: float) -> Any:
        self.failures -= 1
        if self.failures >= 0 and self.before:
            raise self.error
        done = await self._host.accept(work, limit_s)
        if self.failures >= 0:
            raise self.error
        return done

    async def run(self, work: Callable[[Store], Any]) -> Any:
        return await self._host.run(work)

    async def run_large(self, work: Callable[[Store], Any]) -> Any:
        return await self.run(work)

    async def run_slow(self, work: Callable[[Store], Any], statement_s: float) -> Any:
        return await self._host.run_slow(work, statement_s)

    async def read(self, work: Callable[[Store], Any]) -> Any:
        return await self._host.read(work)

    async def read_long(self, work: Callable[[Store], Any]) -> Any:
        return await self._host.read_long(work)

    async def close(self) -> None:
        await self._host.close()


def _on(tmp_path: Path) -> Database:
    return open_database(f"sqlite:///{tmp_path / 'a.db'}")


def test_what_was_committed_unheard_is_no_duplicate(tmp_path: Path) -> None:
    """The worker is woken for it; a copy that comes later is one."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        woken: list[bool] = []
        reports: list[TelemetryEvent] = []
        host = Losing(database.host, 2)
        group = GroupCommit(host, reports.append, lambda: woken.append(True))
        body = make.user_created().body
        first = await group.add(delivery(body, 1_000))
        again = await group.add(delivery(body, 2_000))
        assert first == StoreResult(1, duplicate=False)
        assert again == StoreResult(1, duplicate=True)
        assert woken == [True]
        assert [type(each) for each in reports] == [Retrying]
        await database.host.close()

    asyncio.run(main())


def test_a_request_is_answered_by_its_own_deadline(tmp_path: Path) -> None:
    """Those that came later are tried for longer; nobody is stored once it was refused."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        reports: list[TelemetryEvent] = []
        host = Losing(database.host, 10**6)
        host.before = True
        group = GroupCommit(host, reports.append, lambda: None)
        now = asyncio.get_running_loop().time()
        late = asyncio.create_task(group.add(delivery(make.user_created().body), now + 0.2))
        early = asyncio.create_task(group.add(delivery(make.user_created().body), now + 5))
        with pytest.raises(StoreUnavailable, match="the answer was lost"):
            await late
        assert not early.done()
        host.failures = 0
        assert await early == StoreResult(1, duplicate=False)
        assert [each.count for each in reports if isinstance(each, NotStored)] == [1]
        await database.host.close()

    asyncio.run(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_deadline_that_passed_while_the_loop_was_busy(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    """Those who come next are stored, or refused by their own deadline; uvloop, too."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        host = Losing(database.host, 10**6)
        group = GroupCommit(host, lambda report: None, lambda: None)
        passed = asyncio.get_running_loop().time() - 1
        requests = [group.add(delivery(make.user_created().body), passed) for _ in range(3)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
        host.failures = 0
        assert await group.add(delivery(make.user_created().body)) is not None
        await database.host.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.postgres
def test_a_digest_that_another_holds_waits_alone() -> None:
    """Others of its batch are stored meanwhile; and it is, once the other lets go."""

    async def main() -> None:
        with relayed() as (_, url):
            database, _ = postgres.open_as("own asyncpg", url)
            held, free = (delivery(make.user_created().body) for _ in range(2))
            engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
            with engine.connect() as other:
                Store(other).add([held])
                group = GroupCommit(database.host, lambda report: None, lambda: None)
                waits = asyncio.create_task(group.add(held))
                assert await group.add(free) is not None
                assert not waits.done()
                with pytest.raises(TimedOut):
                    await database.host.accept(lambda store: store.add([held]), 3)
                other.rollback()
            assert await waits is not None
            engine.dispose()
            await database.host.close()

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_the_second_host_is_tried_while_the_first_is_silent(driver: str) -> None:
    """In the time of one try: the first may be without power for long."""

    async def main() -> None:
        with relayed() as (relay, url), socket.create_server(("127.0.0.1", 0)) as silent:
            hosts = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{relay.port}"
            user = f"{url.username}:{url.password or ''}"
            database = open_database(f"postgresql+{driver}://{user}@{hosts}/{url.database}")
            new = delivery(make.user_created().body)
            assert await database.host.accept(lambda store: store.add([new]), TRY_S)
            await database.host.close()

    asyncio.run(main())


def test_what_cannot_be_stored_is_spooled_and_stored_later(tmp_path: Path) -> None:
    """On disk for this user alone; stored once, also by two processes."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        reports: list[TelemetryEvent] = []
        host = Losing(database.host, 10**6)
        host.before = True
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        group = GroupCommit(host, reports.append, lambda: None, spool)
        now = asyncio.get_running_loop().time()
        made = [delivery(make.user_created().body) for _ in range(5)]
        answers = await asyncio.gather(*(group.add(each, now + 1) for each in made))
        assert answers == [None] * 5
        assert spool.count() == 5
        if os.name != "nt":
            assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
            modes = {each.stat().st_mode & 0o777 for each in (tmp_path / "spool").iterdir()}
            assert modes == {0o600}
        name = f"{made[0].received_at:013d}-{'0' * 48}.json"
        (tmp_path / "spool" / name).write_text("[]")
        unspoolers = [
            Unspooler(spool, database.host, reports.append, lambda: None) for _ in range(2)
        ]
        await asyncio.gather(*(each.turn() for each in unspoolers))
        assert spool.count() == 0
        assert (tmp_path / "spool" / f"{name}.refused").exists()
        status = await database.host.read(lambda store: store.status())
        assert status.deliveries["pending"] == 5
        assert any(isinstance(each, Spooled) for each in reports)
        assert any(isinstance(each, Unspooled) for each in reports)
        await database.host.close()

    asyncio.run(main())


@pytest.mark.parametrize(("at_once", "listings"), [(100, 2), (4, 4)])
def test_a_spool_of_many_files_is_not_listed_for_each_batch(
    at_once: int, listings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are stored, the oldest first; the last time finds none. A huge one is listed in parts."""
    monkeypatch.setattr(spool_module, "MAX_ROWS", 2)
    monkeypatch.setattr(spool_module, "MAX_NAMES", at_once)
    calls: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name in {"oldest", "take"}:
            calls.append(frame.f_code.co_name)

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        made = [delivery(make.user_created().body, received_at=10**12 + n) for n in range(10)]
        spool.write(made[::-1])
        unspooler = Unspooler(spool, database.host, lambda report: None, lambda: None)
        threading.setprofile(note)
        try:
            assert await unspooler.turn() == 10
        finally:
            threading.setprofile(None)
        assert calls.count("oldest") == listings
        assert calls.count("take") <= 6
        assert spool.count() == 0
        stored = await database.host.read(
            lambda store: store.inbox.search(DeliveryFilter(limit=20, oldest_first=True))
        )
        assert [each.body for each in stored] == [each.body for each in made]
        await database.host.close()

    asyncio.run(main())


def test_a_spooled_delivery_is_dated_as_one_that_is_stored(tmp_path: Path) -> None:
    """Also where Logto's clock is ahead of ours."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        now, ahead = SystemClock().now(), 600_000
        bodies = [make.user_created(at=now + ahead).body for _ in range(4)]
        made = [identify(trust(body), now, ahead=ahead) for body in bodies]
        await database.host.run(lambda store: store.add(made[1:]))
        spool.write(made[:1])
        unspooler = Unspooler(spool, database.host, lambda report: None, lambda: None)
        assert await unspooler.turn() == 1
        stored = await database.host.read(lambda store: store.clocks(9))
        assert {each.occurred_at for each in stored.recent} == {each.occurred_at for each in made}
        await database.host.close()

    asyncio.run(main())


@pytest.mark.process
def test_what_a_killed_process_left_is_finished(tmp_path: Path) -> None:
    """A complete delivery is stored, a part of one is removed. A file of this minute is left."""
    folder = tmp_path / "spool"
    SpoolDirectory(folder).make()
    left, in_writing = [make.user_created(id=name).body for name in ("ana", "bo")]
    files = [(left, 4000), (left[:-1], 4000), (b"", 4000), (in_writing, 60)]
    for number, (body, age_s) in enumerate(files):
        part = folder / f"{1_700_000_000_000 + number}-{'0' * 48}.json.7-{number}.part"
        part.write_bytes(body)
        os.utime(part, times=(time.time() - age_s,) * 2)
    with Service(tmp_path, "--spool-dir", str(folder)) as service:
        until(lambda: service.stored() == 1, lambda: service.log)
        left_there = {part.name, "database"}
        until(lambda: {each.name for each in folder.iterdir()} == left_there, lambda: service.log)
        assert service.rows("SELECT body FROM logto_deliveries") == [(left,)]


def test_a_spool_directory_belongs_to_one_database(tmp_path: Path) -> None:
    """Another service would take the deliveries in it as its own."""
    ours, other = (SpoolDirectory(tmp_path, "LOGTO_WEBHOOKS_SPOOL_DIR") for _ in range(2))
    ours.claim("one.db")
    ours.claim("one.db")
    with pytest.raises(SettingInvalid, match=r"another database \(one.db\); use another"):
        other.claim("two.db")
    owner = tmp_path / "database"
    assert owner.stat().st_mode & 0o777 == 0o600
    long_ago = (time.time() - 2 * IN_USE_S,) * 2
    os.utime(owner, long_ago)
    ours.write([delivery(make.user_created().body)])
    with pytest.raises(SettingInvalid):
        other.claim("two.db")
    ours.claim("one.db")
    os.utime(owner, long_ago)
    ours.remove(list(ours.oldest(9)))
    other.claim("two.db")
    assert owner.read_text() == "two.db"


@pytest.mark.process
def test_two_services_cannot_share_a_spool_directory(tmp_path: Path) -> None:
    spool = ("--spool-dir", str(tmp_path / "spool"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with Service(tmp_path / "a", *spool):
        with Service(tmp_path / "a", *spool, "--no-worker"):
            """Another process of the same service may."""
        refused = command(
            "serve", *spool, folder=tmp_path / "b", LOGTO_WEBHOOK_SIGNING_KEY=SIGNING_KEY
        )
    assert refused.returncode == 2
    assert "is the spool directory of a service with another database" in one_line(refused.stderr)


@pytest.mark.parametrize("count", [1, MAX_ROWS])
def test_spooled_files_that_cannot_be_read_hold_back_no_other(tmp_path: Path, count: int) -> None:
    """As those that another user wrote, as many as a batch has; they are told of once, and stay."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        reports: list[TelemetryEvent] = []
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        for number in range(count):
            (tmp_path / "spool" / f"{number:013d}-{'0' * 48}.json").mkdir()
        spool.write([delivery(make.user_created().body)])
        unspooler = Unspooler(spool, database.host, reports.append, lambda: None)
        assert [await unspooler.turn() for _ in range(3)] == [1, 0, 0]
        told = [type(each) for each in reports]
        assert (told.count(NotUnspooled), told.count(Unspooled)) == (count, 1)
        assert spool.count() == count
        await database.host.close()

    asyncio.run(main())


DROP = "DROP TRIGGER audit"
REFUSE = (
    "CREATE TRIGGER audit BEFORE INSERT ON logto_deliveries WHEN NEW.subject = 'user:bo' "
    "BEGIN SELECT RAISE(ABORT, 'no partition'); END"
)


def test_a_delivery_that_the_database_refuses_is_kept_and_stored_later(tmp_path: Path) -> None:
    """Logto doesn't send it again. Others are stored meanwhile."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        await database.host.run(lambda store: store.connection.exec_driver_sql(REFUSE))
        reports: list[TelemetryEvent] = []
        group = GroupCommit(database.host, reports.append, lambda: None)
        made = [delivery(make.user_created(id=name).body) for name in ("ana", "bo", "cy")]
        answers = await asyncio.gather(*map(group.add, made), return_exceptions=True)
        assert [isinstance(answer, StoreUnavailable) for answer in answers] == [False, True, False]
        with pytest.raises(StoreUnavailable, match="rejected a row"):
            await group.add(delivery(make.user_created(id="bo", username="bo").body))
        assert "rejected a row" in str(group.error)
        await database.host.run(lambda store: store.connection.exec_driver_sql(DROP))

        async def are_stored() -> bool:
            status = await database.host.read(lambda store: store.status())
            return status.deliveries["pending"] == 4

        await eventually(are_stored)
        assert sum(each.count for each in reports if isinstance(each, StoredLate)) == 2
        assert group.error is None
        await database.host.close()

    asyncio.run(main())


def test_a_delivery_that_the_database_refuses_is_spooled(tmp_path: Path) -> None:
    """It may take it later. Others are stored."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        await database.host.run(lambda store: store.connection.exec_driver_sql(REFUSE))
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        group = GroupCommit(database.host, lambda event: None, lambda: None, spool)
        deadline = asyncio.get_running_loop().time() + 8
        made = [delivery(make.user_created(id=name).body) for name in ("ana", "bo", "cy")]
        answers = await asyncio.gather(*(group.add(each, deadline) for each in made))
        assert [answer is None for answer in answers] == [False, True, False]
        assert spool.count() == 1
        await database.host.close()

    asyncio.run(main())


def test_a_spooled_delivery_that_the_database_refuses_is_stored_when_it_takes_it(
    tmp_path: Path,
) -> None:
    """A trigger fails for a while. The file waits, is counted, and holds back no other."""

    async def main() -> None:
        database = _on(tmp_path)
        await database.open()
        reports: list[TelemetryEvent] = []
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        spool.write([delivery(make.user_created(id=name).body) for name in ("ana", "bo", "cy")])
        await database.host.run(lambda store: store.connection.exec_driver_sql(REFUSE))
        unspooler = Unspooler(spool, database.host, reports.append, lambda: None)
        assert [await unspooler.turn() for _ in range(3)] == [2, 0, 0]
        assert spool.count() == 1
        problems = [each.problem for each in reports if isinstance(each, NotUnspooled)]
        assert len(problems) == 1
        await database.host.run(lambda store: store.connection.exec_driver_sql(DROP))

        async def is_stored() -> bool:
            return await unspooler.turn() == 1

        await eventually(is_stored)
        assert spool.count() == 0
        await database.host.close()

    asyncio.run(main())


@pytest.mark.postgres
def test_a_spooled_delivery_whose_digest_another_holds_holds_back_no_other(tmp_path: Path) -> None:
    """It stays until the other lets go."""

    async def main() -> None:
        with relayed() as (_, url):
            database, _ = postgres.open_as("own asyncpg", url)
            spool = SpoolDirectory(tmp_path / "spool")
            spool.make()
            held, free = (delivery(make.user_created().body) for _ in range(2))
            spool.write([held, free])
            unspooler = Unspooler(spool, database.host, lambda report: None, lambda: None)
            engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
            with engine.connect() as other:
                Store(other).add([held])
                assert await unspooler.turn() == 1
                assert spool.count() == 1
                other.rollback()
            assert await unspooler.turn() == 1
            assert spool.count() == 0
            engine.dispose()
            await database.host.close()

    asyncio.run(main())


def test_what_goes_wrong_in_unforeseen_ways_is_answered_all_the_same(tmp_path: Path) -> None:
    """Also if no thread can be started that would spool it."""

    class Exhausted(SpoolDirectory):
        def write(self, deliveries: Sequence[NewDelivery]) -> None:
            raise RuntimeError("can't start new thread")

    async def main() -> None:
        host = Losing(_on(tmp_path).host, 10**6)
        group = GroupCommit(host, lambda report: None, lambda: None, Exhausted(tmp_path))
        now = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailable, match="RuntimeError"):
            await asyncio.wait_for(group.add(delivery(make.user_created().body), now + 0.6), 5)

    asyncio.run(main())


def test_who_is_cancelled_in_the_first_try_is_spooled(tmp_path: Path) -> None:
    """As when the service ends while a database is silent, and has not failed yet."""

    class Silent(Losing):
        async def accept(self, work: Callable[[Store], Any], limit_s: float) -> Any:
            await asyncio.sleep(limit_s)

    async def main() -> None:
        spool = SpoolDirectory(tmp_path)
        host = Silent(_on(tmp_path).host, 0)
        group = GroupCommit(host, lambda report: None, lambda: None, spool)
        added = asyncio.create_task(group.add(delivery(make.user_created().body)))
        await asyncio.sleep(0.05)
        added.cancel()
        with pytest.raises(asyncio.CancelledError):
            await added
        assert spool.count() == 1

    asyncio.run(main())


def test_a_batch_is_halved_no_longer_than_somebody_waits(tmp_path: Path) -> None:
    """In a table that is locked, each half takes the time of a lock again."""

    class Locked(Losing):
        async def accept(self, work: Callable[[Store], Any], limit_s: float) -> Any:
            await asyncio.sleep(0.05)
            raise TimedOut(problem="locked")

    async def main() -> None:
        group = GroupCommit(Locked(_on(tmp_path).host, 0), lambda report: None, lambda: None)
        now = asyncio.get_running_loop().time()
        added = [group.add(delivery(make.user_created().body), now + 0.2) for _ in range(64)]
        answers = await asyncio.gather(*added, return_exceptions=True)
        assert {type(each) for each in answers} == {StoreUnavailable}
        await asyncio.sleep(0.2)
        assert group._committing is None

    asyncio.run(main())


@pytest.mark.process
def test_serve_spools_while_its_database_is_away(tmp_path: Path) -> None:
    """It answers 200; after a restart with its database it has all of it."""
    spool = ["--spool-dir", str(tmp_path / "spool")]
    with Service(tmp_path, *spool) as service:
        assert service.post(make.user_created()).status_code == 200
        wait_until_done(service)
        moved = service.file.rename(tmp_path / "moved.db")
        answer = service.post(make.user_created())
        assert (answer.status_code, answer.json()) == (200, {"spooled": True, "duplicate": False})
        ready = service.http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (200, True)
        assert "can't be used" in ready.json()["spooling"]
        assert "logto_webhooks_deliveries_in_spool 1.0" in service.http.get("/metrics").text
        folder, elsewhere = tmp_path / "spool", tmp_path / "elsewhere"
        folder.rename(elsewhere)
        until(lambda: service.http.get("/readyz").status_code == 503, lambda: service.log)
        assert "nor can anything be spooled" in service.http.get("/readyz").json()["problem"]
        elsewhere.rename(folder)
        until(lambda: service.http.get("/readyz").status_code == 200, lambda: service.log)
        service.process.terminate()
        assert service.process.wait(timeout=30) == 0
    moved.rename(tmp_path / "logto-webhooks.db")
    with Service(tmp_path, *spool) as service:
        until(lambda: service.stored() == 2, lambda: service.log)
        wait_until_done(service)
        assert service.rows("SELECT count(*) FROM logto_users") == [(2,)]
