"""Kill everything at random under load, then compare with the truth."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database import open_database
from logto_webhooks.database.sqlite import make_sqlite_engine
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery
from logto_webhooks.samples.history import FieldDifference, differences
from tests.crash import application
from tests.crash.client import Sender
from tests.crash.databases import Victim
from tests.support.forked import Forked
from tests.support.generated_history import Life
from tests.support.service import PATH, clean_environment, command
from tests.support.stores import ALL, delivery

T = TypeVar("T")

KEY = "a-key-for-crashes"
CONNECTIONS = 64
DUPLICATES = 0.1
DISORDER = 500  # deliveries that are shuffled together
NOT_APPLIED = ("duplicate", "failed", "dead")  # outcomes in the log; "failed" is tried again
SLOW_LIFE_MS = (300, 400)  # changes keep their distance, so that the truth is exact


class Result(Struct, kw_only=True):
    """What the harness found; the first eight must be as a crash-safe service has them."""

    lost: int
    applied_twice: int
    wrong: int
    deadlocks: int
    pending: int
    doubtful: int
    own_rows_wrong: int
    own_rows_unsettled: int
    deliveries: int
    attempts: int
    answered: int
    kills: int
    database_crashes: int
    recovered_after_s: float

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled or wrong."""
        flaws = (self.lost, self.applied_twice, self.wrong, self.deadlocks, self.pending)
        return not (any(flaws) or self.doubtful or self.own_rows_wrong or self.own_rows_unsettled)


class Process:
    """A receiver or a worker, which can be killed and started again; logs to a file."""

    def __init__(self, folder: Path, number: int, url: str, port: int | None, works: bool) -> None:
        self._log = folder / f"{number}.log"
        command = ["worker"] if port is None else ["serve", "--port", str(port)]
        command += [] if works else ["--no-worker"]
        self._command = [*command, "--log-format", "json"]
        self._url = url
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Start."""
        environment = clean_environment(_variables(self._url))
        self._process = Forked(self._command, self._folder, environment, errors=self._log)
        self._process.stderr.close()

    def stop(self, how: signal.Signals) -> None:
        """End it, and wait for that."""
        self._process.send_signal(how)
        self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it runs: a worker ends when the database isn't there at its start."""
        return self._process.poll() is None

    def synced(self) -> list[int]:
        """The ids of the deliveries that it said it applied."""
        lines = [line for line in self._log.read_bytes().splitlines() if b'"delivery"' in line]
        entries = [msgspec.json.decode(line) for line in lines if line.endswith(b"}")]
        return [entry["id"] for entry in entries if entry["outcome"] not in NOT_APPLIED]


class Harness:
    """Sends a generated life from 64 connections while things are killed."""

    def __init__(
        self,
        victim: Victim,
        folder: Path,
        kills: int,
        seed: int,
        seconds: float = 0,
        workers: int | None = None,
    ) -> None:
        """`seconds` of load follow the last kill; `workers` work instead of the receivers."""
        self._seconds = seconds
        self._workers = workers
        self._victim = victim
        self._random = random.Random(seed)
        self._life = Life(random.Random(seed), SLOW_LIFE_MS)
        self._kills = kills
        self._ports = [free_port() for _ in range(victim.receivers)]
        self._folder = folder
        self._processes: list[Process] = []
        self._done = False
        self._bodies: list[bytes] = []
        self._queue: list[bytes] = []
        self._answered: set[bytes] = set()
        self._counts = Counter[str]()

    async def run(self) -> Result:
        """Live, kill, recover, compare."""
        await migrate_database(self._victim.url)
        await _read(self._victim.url, application.metadata.create_all)
        alone = self._workers is not None
        workers = self._workers if self._workers is not None else self._victim.workers
        kinds: list[int | None] = [*self._ports, *[None] * workers]
        self._processes = [
            Process(self._folder, number, self._victim.url, port, port is None or not alone)
            for number, port in enumerate(kinds)
        ]
        sending = [asyncio.create_task(self._send()) for _ in range(CONNECTIONS)]
        await self._kill()
        await asyncio.sleep(self._seconds)
        self._done = True
        await asyncio.gather(*sending)
        started = time.monotonic()
        pending = await self._drained()
        took = time.monotonic() - started
        await self._allow_deletions()
        unsettled = await self._settled()
        for process in self._processes:
            process.stop(signal.SIGTERM)
        found, doubtful = await self._compare()
        twice = Counter(each for process in self._processes for each in process.synced())
        return Result(
            lost=await self._lost(),
            applied_twice=sum(count > 1 for count in twice.values()),
            wrong=len(found),
            deadlocks=self._victim.deadlocks(),
            pending=pending,
            doubtful=doubtful,
            own_rows_wrong=await _read(self._victim.url, application.count_wrong_rows),
            own_rows_unsettled=unsettled,
            deliveries=len(set(self._bodies)),
            attempts=self._counts["attempts"],
            answered=len(self._answered),
            kills=self._counts["kills"],
            database_crashes=self._counts["crashes"],
            recovered_after_s=round(took, 1),
        )

    async def _send(self) -> None:
        ports = itertools.cycle(self._random.sample(self._ports, len(self._ports)))
        sender = Sender(ports, PATH, KEY)
        while (body := self._next()) is not None:
            answered = False
            while not answered:
                self._counts["attempts"] += 1
                answered = await sender.attempt(body)
            self._answered.add(body)
        sender.close()

    def _next(self) -> bytes | None:
        if not self._queue and not self._done:
            self._more()
        return self._queue.pop() if self._queue else None

    def _more(self) -> None:
        """Live on a little; what happened is sent in disorder, some of it twice."""
        for _ in range(DISORDER):
            self._life.step()
        new = self._life.take()
        self._bodies += new
        self._queue = new + self._random.sample(new, int(len(new) * DUPLICATES))
        self._random.shuffle(self._queue)

    async def _kill(self) -> None:
        await asyncio.sleep(2)
        for number in range(self._kills):
            await asyncio.sleep(self._random.uniform(0.05, 0.8))
            if number % 10 == 9 and await asyncio.to_thread(self._victim.crash):
                self._counts["crashes"] += 1
                await asyncio.to_thread(self._victim.start)
            else:
                victim = self._random.choice(self._processes)
                if victim.alive:
                    victim.stop(signal.SIGKILL)
                    self._counts["kills"] += 1
            for process in self._processes:
                if not process.alive:
                    process.start()

    async def _drained(self) -> int:
        return await self._wait_for_none(_pending, 120 + self._seconds)

    async def _allow_deletions(self) -> None:
        """So many users and organizations are deleted that their own rows are held."""
        apply = partial(command, "mapping", "apply", "--allow-deletes", folder=self._folder)
        applied = await asyncio.to_thread(partial(apply, **_variables(self._victim.url)))
        if applied.returncode:
            print(applied.stdout, applied.stderr)

    async def _settled(self) -> int:
        """What a crash left unwritten is tried again once a minute."""
        return await self._wait_for_none(application.count_unsettled, 150)

    async def _wait_for_none(self, count: Callable[[sa.Connection], int], seconds: float) -> int:
        left = -1
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            for process in self._processes:
                if not process.alive:
                    process.start()
            await asyncio.sleep(0.2)
            left = await _read(self._victim.url, count)
        return left

    async def _compare(self) -> tuple[list[FieldDifference], int]:
        def look(connection: sa.Connection) -> tuple[list[FieldDifference], int]:
            store = Store(connection)
            users, organizations = store.find("user", "", ALL), store.find("organization", "", ALL)
            waiting = store.waiting(ALL)
            found = differences(self._life.final(), users, organizations, waiting)
            return found, sum(each.doubtful for each in waiting)

        return await _read(self._victim.url, look)

    async def _lost(self) -> int:
        """Ask again for all that was answered: what isn't there yet would be new now."""
        deliveries = [delivery(body) for body in self._answered]
        database = open_database(self._victim.url)
        new = 0
        for start in range(0, len(deliveries), 500):
            some = deliveries[start : start + 500]
            new += await database.host.run(partial(_add, some))
        await database.host.close()
        return new


def _variables(url: str) -> dict[str, str]:
    return {
        "LOGTO_WEBHOOK_SIGNING_KEY": KEY,
        "LOGTO_WEBHOOKS_APP": "tests.crash.application:logto",
        "LOGTO_WEBHOOKS_DATABASE_URL": url,
    }


def _add(deliveries: list[NewDelivery], store: Store) -> int:
    return sum(not each.duplicate for each in store.add(deliveries))


def _pending(connection: sa.Connection) -> int:
    return Store(connection).status().deliveries["pending"]


async def migrate_database(url: str) -> None:
    """Make the tables."""
    database = open_database(url)
    await database.migrate()
    await database.host.close()


async def _read(url: str, work: Callable[[sa.Connection], T]) -> T:
    """Read with an engine of our own: the product reads less at once, and within a limit."""

    def read() -> T:
        place = sa.make_url(url)
        if place.get_backend_name() == "postgresql":
            engine = sa.create_engine(place.set(drivername="postgresql+psycopg"))
        else:
            engine = make_sqlite_engine(Path(place.database or ""))
        try:
            with engine.begin() as connection:
                return work(connection)
        finally:
            engine.dispose()

    return await asyncio.to_thread(read)


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
