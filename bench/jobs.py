"""`python -m bench.jobs`: jobs per second of an ordered handler that does nothing, one process.

Beside it, what a line that fails for ever costs the others, with few and with many jobs waiting in
it; and procrastinate on the same PostgreSQL. All take turns in one run: a ratio is the median of
the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from argparse import Namespace
from contextlib import AsyncExitStack
from pathlib import Path

from bench.procrastinate_queue import CONCURRENCIES, rival
from bench.queue_databases import Lines, lines
from logto_webhooks.cli import collect_seldom, session

FEW = 10
SMALL = 2_000
TRIAL_S = 4.0
TURNS = 8

Rates = dict[str, list[float]]


async def stuck(kind: str, given: Namespace, folder: Path) -> None:
    """Print what a stuck line costs the others."""
    sides: dict[str, int] = {"quiet": 0, "failing": FEW, "stuck": given.stuck}
    rates: Rates = {name: [] for name in sides}
    async with AsyncExitStack() as stack:
        turns = [await _filled(stack, kind, name, sides[name], folder) for name in sides]
        for _ in range(given.rounds):
            for side in turns:
                await side.fill(given.jobs)
            for name, rate in (await _by_turns(turns, given.seconds)).items():
                rates[name].append(rate)
        for side in turns:
            await side.check()
    _row(kind, "jobs/s", statistics.median(rates["quiet"]), None, 1000)
    _ratio(kind, f"with a failing queue of {FEW} jobs", rates, ("failing", "quiet"), 0.9)
    _ratio(kind, f"with a queue of {given.stuck:,} jobs", rates, ("stuck", "quiet"), 0.8)


async def _by_turns(sides: list[Lines], seconds: float) -> dict[str, float]:
    """The rate of each over so many seconds, in short turns: all feel what else runs."""
    rates: Rates = {side.name: [] for side in sides}
    for _ in range(TURNS):
        for side in sides:
            rates[side.name].append(await side.rate(seconds / TURNS))
        sides.append(sides.pop(0))  # none is always the first
    return {name: statistics.fmean(some) for name, some in rates.items()}


async def beside_procrastinate(given: Namespace, folder: Path) -> None:
    """Print how many times as many jobs a second as procrastinate, with few and more waiting."""
    async with AsyncExitStack() as stack:
        ours = await _filled(stack, "postgres", "beside", 0, folder)
        other = await stack.enter_async_context(rival())
        for waiting in (SMALL, given.beside):
            tried = dict.fromkeys(CONCURRENCIES, 0.0)
            for concurrency in 2 * CONCURRENCIES:
                await other.fill(waiting)
                found = await other.rate(TRIAL_S, concurrency)
                tried[concurrency] = max(tried[concurrency], found)
            best = max(tried, key=lambda each: tried[each])
            shown = ", ".join(f"{each} at once {rate:.0f}/s" for each, rate in tried.items())
            print(f"procrastinate, {waiting:,} jobs: {shown}", flush=True)
            rates: Rates = {"ours": [], "other": []}
            for _ in range(given.rounds):
                await ours.fill(waiting)
                rates["ours"].append(await ours.rate(given.seconds))
                await other.fill(waiting)
                rates["other"].append(await other.rate(given.seconds, best))
            what = f"÷ procrastinate, {waiting:,} jobs, {best} at once"
            _ratio("postgres", what, rates, ("ours", "other"), 5)
        await ours.check()


async def _filled(stack: AsyncExitStack, kind: str, name: str, stuck: int, folder: Path) -> Lines:
    side = await stack.enter_async_context(lines(kind, name, folder))
    started = time.perf_counter()
    await side.prepare(stuck)
    print(f"{kind}: {stuck:,} jobs of one line made in {time.perf_counter() - started:.1f} s")
    return side


def _ratio(kind: str, what: str, rates: Rates, names: tuple[str, str], bar: float) -> None:
    one, other = (rates[name] for name in names)
    ratio = statistics.median(a / b for a, b in zip(one, other, strict=True))
    _row(kind, what, ratio, (statistics.median(one), statistics.median(other)), bar)
    for name in names:
        print(f"  {name}: {', '.join(f'{rate:.0f}' for rate in rates[name])}", flush=True)


def _row(kind: str, what: str, value: float, rates: tuple[float, float] | None, bar: float) -> None:
    ours, other = (f"{rate:.1f}" for rate in rates) if rates else ("", "")
    met = "yes" if value >= bar else "**no**"
    shown = f"{value:.3g}" if rates else f"{value:.0f}"
    print(f"| {kind} | {what} | {shown} | ≥ {bar:,} | {ours} | {other} | {met} |", flush=True)


async def measure(given: Namespace) -> None:
    """Print all figures."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.database or ("sqlite", "postgres"):
            await stuck(kind, given, Path(folder))
            if kind == "postgres":
                await beside_procrastinate(given, Path(folder))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", action="append", choices=("sqlite", "postgres"))
    parser.add_argument("--jobs", type=int, default=150_000, help="waiting before each round")
    parser.add_argument("--stuck", type=int, default=100_000, help="waiting in the stuck line")
    parser.add_argument("--beside", type=int, default=20_000, help="waiting, for procrastinate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="a round, at most")
    collect_seldom()
    session.run_async(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
