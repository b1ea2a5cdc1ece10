"""`python -m bench.mapped_tables`: what mapped tables cost.

First, the sync of a backlog with three mapped tables, as a ratio to the same without them. Then
`mapping apply` for all users, as a ratio to the bare SQL of the same inserts, and its peak memory
as a ratio to that of a hundredth of the users.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import sqlalchemy as sa
from tests.crash import application
from tests.crash.databases import PostgresVictim
from tests.support.stores import delivery

from bench.backlog import fill
from logto_webhooks.cli import collect_seldom
from logto_webhooks.cli.session import run_async
from logto_webhooks.database import open_database
from logto_webhooks.database.schema import metadata
from logto_webhooks.deliveries import NewDelivery
from logto_webhooks.runtime import make_worker
from logto_webhooks.settings import Settings
from logto_webhooks.testing import make

DRIVERS = {
    "sqlite": "sqlite",
    "postgresql+psycopg": "postgresql+psycopg",
    "postgresql+asyncpg": "postgresql+psycopg",
}
TEAMS = 200
AT = 1_795_485_335_000
BATCH = 500
# Users of the mirror and their records, made by the server.
SERIES = {
    "sqlite": "WITH RECURSIVE s(n) AS "
    "(SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {0}) SELECT n FROM s",
    "postgresql": "SELECT n FROM generate_series(1, {0}) AS s(n)",
}
UUID = {
    "sqlite": "printf('00000000-0000-4000-8000-%012d', n)",
    "postgresql": "('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid",
}
NAME = {"sqlite": "printf('u%011d', n)", "postgresql": "'u' || lpad(n::text, 11, '0')"}
FILL = (
    "INSERT INTO logto_records (kind, logto_id, local_id, data, groups, facts, needs, doubtful) "
    "SELECT 'user', {name}, {uuid}, '{{}}', '{{}}', '{{}}', '[]', false FROM ({series}) AS numbers",
    "INSERT INTO logto_users (id, logto_user_id, email, name, profile, identities, custom_data, "
    "is_suspended) SELECT {uuid}, {name}, {name} || '@example.com', 'Somebody', '{{}}', '{{}}', "
    "'{{}}', false FROM ({series}) AS numbers",
)


class MappedTables:
    """A database whose tables can be emptied, and what is measured on it."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        place = sa.make_url(url)
        self._engine = sa.create_engine(place.set(drivername=DRIVERS[place.drivername]))
        application.metadata.create_all(self._engine)
        run_async(_migrate(url))

    def measure_sync(self, count: int, rounds: int) -> None:
        """Print the ratio of the sync's rates, with mapped tables and without, in turn."""
        rates: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * rounds):
            self._empty()
            mapped = number % 2 == 0
            backlog = list(make_backlog(count, seed=number // 2))
            rates[mapped].append(run_async(_sync(self._url, backlog, mapped)))
        with_tables, without = (statistics.median(rates[mapped]) for mapped in (True, False))
        print(
            f"sync with three mapped tables ÷ without: {with_tables / without:.2f} "
            f"({with_tables:.0f}/s, {without:.0f}/s)",
            flush=True,
        )

    def measure_apply(self, users: int) -> None:
        """Print the ratio of rates, and that of the peaks of memory."""
        few, _ = self._apply(users // 100)
        peak, rate = self._apply(users)
        bare = self._insert_bare(users)
        print(f"mapping apply of {users:,} users ÷ bare SQL: {rate / bare:.2f} ", end="")
        print(f"({rate:.0f}/s, {bare:.0f}/s)", flush=True)
        print(f"its peak memory ÷ that of {users // 100:,} users: {peak / few:.2f} ", end="")
        print(f"({peak:.0f} MiB, {few:.0f} MiB)", flush=True)

    def close(self) -> None:
        """Close the engine."""
        self._engine.dispose()

    def _apply(self, users: int) -> tuple[float, float]:
        """Run the command; return its peak of memory in MiB, and rows a second."""
        self._empty()
        with self._engine.begin() as connection:
            kind = connection.dialect.name
            values = {"name": NAME[kind], "uuid": UUID[kind], "series": SERIES[kind].format(users)}
            for statement in FILL:
                connection.exec_driver_sql(statement.format(**values))
            if kind == "postgresql":
                connection.exec_driver_sql("ANALYZE")
        environment = {
            "LOGTO_WEBHOOKS_DATABASE_URL": self._url,
            "LOGTO_WEBHOOKS_APP": "tests.crash.application:logto",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "logto_webhooks", "mapping", "apply", "--json"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=self._folder, env=os.environ | environment, stdout=subprocess.PIPE
        )
        assert process.stdout
        applied = msgspec.json.decode(process.stdout.read())
        _, status, used = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        assert status == 0, status
        assert sum(mapping["created"] for mapping in applied) == users, applied
        return used.ru_maxrss / 1024, users / took

    def _insert_bare(self, users: int) -> float:
        """Read the users in pages, and insert the same rows and states, with nothing else; return
        the rate."""
        self._empty_own()
        raw = self._engine.raw_connection()
        cursor = raw.cursor()
        mark = "?" if self._engine.dialect.name == "sqlite" else "%s"
        select = (
            "SELECT logto_user_id, email, name, NOT is_suspended FROM logto_users "
            f"WHERE logto_user_id > {mark} ORDER BY logto_user_id LIMIT {BATCH}"
        )
        marks = ", ".join([mark] * 4)
        insert = f"INSERT INTO crash_users (logto_id, email, name, active) VALUES ({marks})"
        insert_state = (
            "INSERT INTO logto_mapped_rows (logto_id, row_id, mapping, kind, state, changed_at) "
            f"VALUES ({mark}, {mark}, 'bare', 'user', 'ok', 0)"
        )
        started = time.perf_counter()
        after = ""
        while True:
            cursor.execute(select, (after,))
            rows = cursor.fetchall()
            if not rows:
                break
            cursor.executemany(insert, rows)
            cursor.executemany(insert_state, [(row[0], f"[{row[0]}]") for row in rows])
            raw.commit()
            after = rows[-1][0]
        took = time.perf_counter() - started
        raw.close()
        return users / took

    def _empty(self) -> None:
        self._empty_own()
        with self._engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(sa.delete(table))

    def _empty_own(self) -> None:
        with self._engine.begin() as connection:
            for table in reversed(application.metadata.sorted_tables):
                connection.execute(sa.delete(table))
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("VACUUM")


def make_backlog(count: int, seed: int) -> Iterator[NewDelivery]:
    """Teams; then people who sign up, join a team, and change their profile."""
    rng = random.Random(seed)
    for number in range(TEAMS):
        team = f"team{number}"
        yield delivery(make.event("Organization.Created", id=team, name=team, at=AT + number).body)
    for number in range((count - TEAMS) // 3):
        user, at = f"u{number}", AT + 1_000 + 10 * number
        yield delivery(make.user_created(id=user, email=f"{user}@example.com", at=at).body)
        joined = make.organization_membership_updated(
            id=f"team{rng.randrange(TEAMS)}", addedUserIds=[user], at=at + 1
        )
        yield delivery(joined.body)
        changed = make.user_data_updated(
            id=user, email=f"{user}@example.com", name=f"N{number}", at=at + 2
        )
        yield delivery(changed.body)


async def _migrate(url: str) -> None:
    database = open_database(url)
    await database.migrate()
    await database.host.close()


async def _sync(url: str, backlog: list[NewDelivery], mapped: bool) -> float:
    """Apply a backlog; return how many deliveries a second."""
    database = open_database(url)
    await fill(database, backlog)
    if mapped:
        mappings = application.logto.mappings
        database.host.project = mappings.write
        await database.host.run(lambda store: store.mappings.register(mappings.registered))
    worker = make_worker(Settings(), database, lambda report: None)
    started = time.perf_counter()
    while await worker.step():
        pass
    rate = len(backlog) / (time.perf_counter() - started)
    await database.host.close()
    return rate


def main() -> None:
    """Measure on each database and driver."""
    parser = argparse.ArgumentParser(prog="python -m bench.mapped_tables")
    parser.add_argument("--deliveries", type=int, default=9_200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=1_000_000, help="of `mapping apply`")
    parser.add_argument("--driver", choices=DRIVERS, action="append")
    options = parser.parse_args()
    collect_seldom()
    victim = PostgresVictim()
    try:
        with tempfile.TemporaryDirectory(prefix="logto-webhooks-bench-") as name:
            for driver in options.driver or DRIVERS:
                url = f"sqlite:///{name}/bench.db"
                if driver != "sqlite":
                    place = sa.make_url(victim.url).set(drivername=driver)
                    url = place.render_as_string(hide_password=False)
                print(f"{driver}:", flush=True)
                bench = MappedTables(url, Path(name))
                if options.deliveries:
                    bench.measure_sync(options.deliveries, options.rounds)
                if options.users:
                    bench.measure_apply(options.users)
                bench.close()
    finally:
        victim.close()


if __name__ == "__main__":
    main()
