"""`python -m tests.soak`: run it, and print what was found. Exit code 1 if anything is wrong."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from logto_webhooks.deliveries import identify
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import SIGNING_KEY
from tests.crash.databases import PostgresVictim
from tests.crash.harness import free_port, migrate_database
from tests.soak.load import Answer, Load
from tests.soak.route import Route
from tests.soak.troubles import Troubles
from tests.support.service import clean_environment

ANSWER_S = 9.0
WITHOUT_DATABASE_S = 8.0  # a request is tried again for as long as this
FLAT_MIB = 60
WARM_UP = 0.2  # of the run; memory is compared from then on


async def soak(minutes: float, rate: int, seed: int, folder: Path) -> bool:
    """Run for so long; True if all is well."""
    server = PostgresVictim()
    try:
        return await _soak(server, minutes, rate, seed, folder)
    finally:
        server.close()


async def _soak(server: PostgresVictim, minutes: float, rate: int, seed: int, folder: Path) -> bool:
    await migrate_database(server.url)
    url = sa.make_url(server.url)
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (user_id text)"))
    route = Route(url)
    through = f"postgresql://{url.username}@127.0.0.1:{await route.open()}/{url.database}"
    port = free_port()
    log = (folder / "serve.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "logto_webhooks", "serve", "--port", str(port)),
        *("--app", "tests.soak.app:logto", "--database-url", through),
        env=clean_environment({"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}),
        stdout=log,
        stderr=log,
    )
    await _until_listening(port)
    load, troubles = Load(port, rate), Troubles(server, engine, route, seed)
    making = asyncio.create_task(troubles.make())
    sending = [
        asyncio.create_task(send)
        for send in (load.send_genuine(), load.send_junk(), load.send_slowly())
    ]
    began = time.monotonic()
    memory: list[tuple[float, float]] = []
    while (elapsed := time.monotonic() - began) < minutes * 60:
        await asyncio.sleep(15)
        memory.append((elapsed / 60, _resident_mib(process.pid)))
        print(
            f"{elapsed / 60:5.1f} min, {len(load.answers):7} answers, {memory[-1][1]:4.0f} MiB,"
            f" {dict(troubles.counts)}",
            flush=True,
        )
    troubles.stopping = True
    await making
    load.stopping = True
    await asyncio.gather(*sending)
    await _until_idle(engine)
    verdicts = [
        *_judge_answers(load.answers, troubles.outages),
        *_judge_database(engine, load),
        *_judge_memory(memory),
    ]
    tracebacks = _TRACEBACK.findall((folder / "serve.log").read_text())
    first = "".join(tracebacks[:1])[-800:]
    verdicts.append(("no traceback in the log", not tracebacks, f"{len(tracebacks)} {first}"))
    process.terminate()
    verdicts.append(("the service ends with 0", await process.wait() == 0, process.returncode))
    for name, good, seen in verdicts:
        print(f"{'good' if good else 'BAD '} {name}: {seen}")
    return all(good for _, good, _ in verdicts)


def _judge_answers(
    answers: list[Answer], outages: list[tuple[float, float]]
) -> list[tuple[str, bool, Any]]:
    def excused(answer: Answer) -> bool:
        """Whether the database was away for longer than a request is tried again."""
        return any(
            began < answer.began + answer.took_s and answer.began < ended
            for began, ended in outages
            if ended - began > WITHOUT_DATABASE_S
        )

    bad = [answer for answer in answers if answer.status != 200 or answer.took_s > ANSWER_S]
    unexcused = [answer for answer in bad if not excused(answer)]
    examples = [(answer.status, round(answer.took_s, 1)) for answer in unexcused[:10]]
    took = sorted(answer.took_s for answer in answers)
    return [
        (
            "answered 200 within 9 s, but for long outages",
            not unexcused,
            f"{len(answers)} sent, {len(bad) - len(unexcused)} in long outages,"
            f" {len(unexcused)} others {examples}",
        ),
        (
            "times of answers",
            True,
            f"p50 {took[len(took) // 2] * 1000:.1f} ms,"
            f" p99 {took[int(len(took) * 0.99)]:.2f} s, at most {took[-1]:.2f} s",
        ),
    ]


def _judge_database(engine: sa.Engine, load: Load) -> list[tuple[str, bool, Any]]:
    with engine.connect() as connection:
        stored = set(connection.scalars(sa.text("SELECT digest FROM logto_deliveries")))
        states = connection.execute(
            sa.text("SELECT state, count(*) FROM logto_deliveries GROUP BY state")
        ).all()
        effects = connection.scalars(sa.text("SELECT user_id FROM effects")).all()
        users = connection.execute(sa.text("SELECT logto_user_id, name FROM logto_users")).all()
        missing = load.created - set(effects)
        subjects = [f"user:{user_id}" for user_id in sorted(missing)[:5]]
        jobs = connection.execute(_JOBS, {"subjects": subjects}).all()
    names: dict[str, str] = {row.logto_user_id: row.name for row in users}
    now_ms = int(time.time() * 1000)
    lost = [body for body in load.accepted if identify(trust(body), now_ms).digest not in stored]
    known = load.names.keys() - load.unanswered
    wrong = [user_id for user_id in known if names.get(user_id) != load.names[user_id]]
    return [
        ("nothing lost of what was answered 200", not lost, f"{len(lost)} of {len(load.accepted)}"),
        ("everything applied", {state for state, _ in states} <= {"done"}, [*map(tuple, states)]),
        ("rows as sent last", not wrong, f"{len(wrong)} of {len(known)} {wrong[:5]}"),
        (
            "one effect a user",
            not missing and len(effects) == len(set(effects)),
            f"{len(missing)} missing, {len(effects) - len(set(effects))} twice of {len(effects)}"
            f" {[*map(tuple, jobs)]}",
        ),
    ]


def _judge_memory(memory: list[tuple[float, float]]) -> list[tuple[str, bool, Any]]:
    warm = [mib for _, mib in memory[int(len(memory) * WARM_UP) :]]
    third = max(1, len(warm) // 3)
    first, last = sum(warm[:third]) / third, sum(warm[-third:]) / third
    return [("memory is flat", last - first < FLAT_MIB, f"{first:.0f} MiB, then {last:.0f} MiB")]


async def _until_listening(port: int) -> None:
    for _ in range(300):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise TimeoutError("The service didn't start.")


_JOBS = sa.text(
    "SELECT delivery.id, delivery.event, job.handler, job.state, job.attempts, job.failures,"
    " job.error FROM logto_deliveries AS delivery"
    " LEFT JOIN logto_jobs AS job ON job.delivery_id = delivery.id"
    " WHERE delivery.subject = ANY(:subjects)"
)
# Up to the next line with a date.
_TRACEBACK = re.compile(r"^Traceback .*?(?=^\d{4}-|\Z)", re.DOTALL | re.MULTILINE)


async def _until_idle(engine: sa.Engine) -> None:
    """Wait until nothing waits; give up when nothing has moved for a minute."""
    waiting = sa.text(
        "SELECT (SELECT count(*) FROM logto_deliveries WHERE state = 'pending')"
        " + (SELECT count(*) FROM logto_jobs WHERE state IN ('waiting', 'running'))"
    )
    began = moved = time.monotonic()
    least = None
    while time.monotonic() - moved < 60:
        with engine.connect() as connection:
            left = int(connection.scalar(waiting) or 0)
        if least is None:
            print(f"{left} deliveries and jobs are left", flush=True)
        if not left:
            print(f"nothing is left after {time.monotonic() - began:.0f} s", flush=True)
            return
        if least is None or left < least:
            least, moved = left, time.monotonic()
        await asyncio.sleep(0.5)


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0


def main() -> None:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=int, default=200, help="deliveries a second")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="logto-webhooks-soak-") as folder:
        good = False
        try:
            good = asyncio.run(soak(options.minutes, options.rate, options.seed, Path(folder)))
        finally:
            if not good:
                print("\n".join((Path(folder) / "serve.log").read_text().splitlines()[-40:]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
