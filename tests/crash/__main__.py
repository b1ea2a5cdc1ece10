"""`python -m tests.crash`: kill, and print what was found. Exit code 1 if anything was lost."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.crash.databases import PostgresVictim, SqliteVictim, Victim
from tests.crash.harness import Harness


def main() -> None:
    """Run on each database that is asked for."""
    parser = argparse.ArgumentParser(prog="make crash")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=0, help="of load after the last kill")
    parser.add_argument("--workers", type=int, help="work instead of the receivers")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--database", choices=["sqlite", "postgres"], action="append")
    options = parser.parse_args()
    good = True
    for name in options.database or ["sqlite", "postgres"]:
        with tempfile.TemporaryDirectory(prefix="logto-webhooks-crash-") as folder:
            victim: Victim = SqliteVictim(Path(folder)) if name == "sqlite" else PostgresVictim()
            try:
                harness = Harness(
                    victim,
                    Path(folder),
                    options.kills,
                    options.seed,
                    options.minutes * 60,
                    options.workers,
                )
                result = asyncio.run(harness.run())
            finally:
                victim.close()
        print(f"{name}, seed {options.seed}: {'good' if result.good else 'BAD'}")
        for field, value in msgspec.structs.asdict(result).items():
            print(f"  {field.replace('_', ' '):20} {value}")
        good = good and result.good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
