"""`make bench`: all ratios in one run, interleaved, as a table and as JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import sqlalchemy as sa
from tests.crash.databases import PostgresVictim

from bench import backlog, load, many_workers
from bench.baselines import KEY
from logto_webhooks.cli import collect_seldom, session
from logto_webhooks.database import open_database

SECONDS = 3
BACKLOG = 20_000
PORTS = {"verify": 8791, "tutorial": 8792, "ours": 8793}
UVICORN = ["--http", "httptools", "--loop", "uvloop", "--no-access-log", "--log-level", "error"]

Rows = list[dict[str, object]]


class Bench:
    """One run on one database; `rows` are what it found."""

    def __init__(self, name: str, url: str, folder: Path, rounds: int, finished: int) -> None:
        self.rows: Rows = []
        self._name = name
        self._url = url
        self._folder = folder
        self._rounds = rounds
        self._finished = finished
        self._requests = folder / "requests.txt"
        driver = {"sqlite": "sqlite", "postgres": "postgresql+psycopg"}[name]
        self._engine = sa.create_engine(sa.make_url(url).set(drivername=driver))
        asyncio.run(_migrate(url))

    def run(self) -> None:
        """Measure everything."""
        load.write_requests(self._requests, 100_000)
        self._accepts()
        self._steady()
        self._backlog()
        if self._name == "postgres":
            self._workers()
        self._with_finished_rows()

    def _accepts(self) -> None:
        sides = {"verify": self._verify_only, "tutorial": self._tutorial, "ours": self._ours}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(self._rounds):
            for side, command in sides.items():
                environment = {"BENCH_DATABASE_URL": str(self._engine.url)}
                if self._name == "postgres":
                    plain = self._engine.url.render_as_string(hide_password=False)
                    environment["BENCH_DATABASE_URL"] = plain
                log = self._folder / f"{side}.log"
                self._empty()
                with load.running(command(), PORTS[side], log, **environment):
                    rates[side].append(load.wrk(PORTS[side], self._requests, SECONDS))
        ours, verify = _median(rates["ours"]), _median(rates["verify"])
        tutorial = _median(rates["tutorial"])
        bar = 0.35 if self._name == "sqlite" else 0.40
        self._row("accepts/s ÷ verify-only", ours, verify, bar)
        self._row("accepts/s ÷ tutorial", ours, tutorial, 25)

    def _steady(self) -> None:
        self._empty()
        sent = list(load.deliveries(500 * 10, seed=3))
        log = self._folder / "steady.log"
        command = self._ours("--worker", "--log-format", "json")
        with load.running(command, PORTS["ours"], log):
            took = asyncio.run(load.steady(PORTS["ours"], sent, rate=500))
            time.sleep(1)
        lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
        rows = [line["took_ms"] for line in lines if line["message"] == "delivery"]
        self._row("answer p99 at 500/s, ms", _percentile(took, 99), None, 10, at_most=True)
        self._row("delivery to row p99, ms", _percentile(rows, 99), None, 150, at_most=True)

    def _backlog(self) -> None:
        ours, bare = [], []
        for number in range(self._rounds):
            self._empty()
            ours.append(session.run_async(backlog.synced(self._url, BACKLOG, seed=number))[1])
            bare.append(backlog.bare(self._engine, BACKLOG, seed=number))
        self._row("sync/s ÷ bare SQL", _median(ours), _median(bare), 0.15)

    def _workers(self) -> None:
        rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
        for number in range(3):
            for workers, found in rates.items():
                self._empty()
                session.run_async(backlog.filled(self._url, 2 * BACKLOG, 300 + number))
                found.append(many_workers.synced_by(workers, self._engine, self._url))
        alone = _median(rates[1])
        for workers in (2, 4):
            self._row(f"sync/s of {workers} workers ÷ of 1", _median(rates[workers]), alone, None)

    def _with_finished_rows(self) -> None:
        self._empty()
        empty = [session.run_async(backlog.synced(self._url, BACKLOG, 100 + n)) for n in range(3)]
        self._empty()
        backlog.finished_rows(self._engine, self._finished)
        full = [session.run_async(backlog.synced(self._url, BACKLOG, 200 + n)) for n in range(3)]
        for index, what in enumerate(("accepts", "sync")):
            rates = [_median([each[index] for each in side]) for side in (full, empty)]
            self._row(f"{what}/s with {self._finished:,} rows ÷ with none", rates[0], rates[1], 0.8)

    def _verify_only(self) -> list[str]:
        return _uvicorn("bench.baselines:verify_only", PORTS["verify"])

    def _tutorial(self) -> list[str]:
        return [*_uvicorn("bench.baselines:tutorial", PORTS["tutorial"]), "--factory"]

    def _ours(self, *options: str) -> list[str]:
        port = ["--port", str(PORTS["ours"])]
        command = [sys.executable, "-m", "logto_webhooks", "serve", *port, "--signing-key", KEY]
        return [*command, "--database-url", self._url, *(options or ("--no-worker",))]

    def _empty(self) -> None:
        with self._engine.begin() as connection:
            for table in ("deliveries", "records", "users"):
                delete = "TRUNCATE" if self._name == "postgres" else "DELETE FROM"
                connection.exec_driver_sql(f"{delete} logto_{table}")
        if self._name == "sqlite":  # no free pages: to use them is cheaper than to let a file grow
            with self._engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("VACUUM")

    def _row(
        self, what: str, ours: float, other: float | None, bar: float | None, at_most: bool = False
    ) -> None:
        value = ours / other if other else ours
        met = bar is None or (value <= bar if at_most else value >= bar)
        self.rows.append(
            {
                "database": self._name,
                "what": what,
                "value": round(value, 3),
                "bar": "none" if bar is None else f"{'≤' if at_most else '≥'} {bar}",
                "met": met,
                "ours": round(ours, 1),
                "other": other and round(other, 1),
            }
        )
        print(msgspec.json.encode(self.rows[-1]).decode(), flush=True)


def fsync_ms(folder: Path) -> float:
    """How long a commit of one row takes until it is on disk: what no service can beat."""
    engine = sa.create_engine(f"sqlite:///{folder / 'fsync.db'}")
    with engine.connect() as connection:
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            connection.exec_driver_sql(f"PRAGMA {pragma}")
        connection.exec_driver_sql("CREATE TABLE t (x)")
        connection.commit()
        started = time.perf_counter()
        for _ in range(200):
            connection.exec_driver_sql("INSERT INTO t VALUES (1)")
            connection.commit()
        return (time.perf_counter() - started) / 200 * 1000


def import_ms() -> float:
    """How long `import logto_webhooks` takes."""
    now = "time.perf_counter()"
    code = f"import time; t = {now}; import logto_webhooks; print({now} - t)"
    command = [sys.executable, "-c", code]
    printed = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(7)]
    return _median([float(seconds) * 1000 for seconds in printed])


def main() -> None:
    """Measure, print, write `bench.json`."""
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--rows", type=int, default=5_000_000, help="finished rows in the inbox")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--database", choices=["sqlite", "postgres"], action="append")
    options = parser.parse_args()
    collect_seldom()
    rows: Rows = []
    with tempfile.TemporaryDirectory(prefix="logto-webhooks-bench-") as name:
        folder = Path(name)
        machine: dict[str, object] = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "sqlalchemy": sa.__version__,
            "load": "wrk, 1 thread, 64 connections",
            "fsync'd commit, ms": round(fsync_ms(folder), 2),
            "import, ms (bar ≤ 80)": round(import_ms(), 1),
        }
        for database in options.database or ["sqlite", "postgres"]:
            victim = PostgresVictim() if database == "postgres" else None
            url = victim.url if victim else f"sqlite:///{folder / 'bench.db'}"
            try:
                bench = Bench(database, url, folder, options.rounds, options.rows)
                bench.run()
                rows += bench.rows
            finally:
                if victim:
                    victim.close()
    _print(machine, rows)
    Path("bench.json").write_bytes(msgspec.json.encode({"machine": machine, "rows": rows}))


def _print(machine: dict[str, object], rows: Rows) -> None:
    print()
    for name, value in machine.items():
        print(f"- {name}: {value}")
    columns = ("database", "what", "value", "bar", "ours", "other", "met")
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        cells = {name: "" if row[name] is None else row[name] for name in columns}
        cells["met"] = "yes" if row["met"] else "**no**"
        print("| " + " | ".join(str(cell) for cell in cells.values()) + " |")


async def _migrate(url: str) -> None:
    database = open_database(url)
    await database.migrate()
    await database.host.close()


def _uvicorn(app: str, port: int) -> list[str]:
    return [sys.executable, "-m", "uvicorn", app, "--port", str(port), *UVICORN]


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


if __name__ == "__main__":
    main()
