"""Several workers, each a process of its own, on one backlog."""

from __future__ import annotations

import subprocess
import sys
import time

import sqlalchemy as sa

_PENDING = "SELECT count(*) FROM logto_deliveries WHERE state = 'pending'"


def synced_by(workers: int, engine: sa.Engine, url: str) -> float:
    """Apply what is pending; return how many a second, from the first that is applied on."""
    total = _pending(engine)
    command = [sys.executable, "-m", "logto_webhooks", "worker", "--drain"]
    command += ["--database-url", url, "--log-level", "error"]
    processes = [subprocess.Popen(command) for _ in range(workers)]
    try:
        while (first := _pending(engine)) == total:
            time.sleep(0.01)
        started = time.perf_counter()
        while _pending(engine):
            time.sleep(0.01)
        return first / (time.perf_counter() - started)
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _pending(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(_PENDING).scalar_one())
