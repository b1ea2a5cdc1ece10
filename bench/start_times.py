"""How long commands take to start: `python -m bench.start_times`, in multiples of `python -c pass`.

They are started in turn, again and again; the fastest start of each counts, by the clock and by the
time of the processor, which other work of the machine influences less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROUNDS: Final = 15
_COMMAND: Final = (sys.executable, "-m", "logto_webhooks")
STARTS: Final[dict[str, tuple[Sequence[str], float]]] = {
    "python -c pass": ((sys.executable, "-c", "pass"), 1),
    "import logto_webhooks": ((sys.executable, "-c", "import logto_webhooks"), 4),
    "logto-webhooks --help": ((*_COMMAND, "--help"), 12),
    "logto-webhooks status": ((*_COMMAND, "status"), 30),
}


def run(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return the seconds that it took by the clock, and of the processor."""
    began = time.perf_counter()
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def main() -> None:
    """Print a line for each start: its time, the ratios, and the bar that it must clear."""
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run((*_COMMAND, "migrate"), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for _ in range(ROUNDS):
            for title, (command, _) in STARTS.items():
                clock, processor = run(command, folder)
                fastest = best.get(title, (clock, processor))
                best[title] = (min(clock, fastest[0]), min(processor, fastest[1]))
    [base_clock, base_processor] = best["python -c pass"]
    print(f"{'':24}{'ms':>8}{'clock':>9}{'processor':>11}{'bar':>6}")
    for title, (clock, processor) in best.items():
        by_clock, by_processor = clock / base_clock, processor / base_processor
        bar = STARTS[title][1]
        print(f"{title:24}{clock * 1000:8.0f}{by_clock:9.1f}{by_processor:11.1f}{bar:6g}")


if __name__ == "__main__":
    main()
