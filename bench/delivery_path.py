"""Which modules and functions one delivery with one transactional handler goes through.

    python -m bench.delivery_path [--functions]

On SQLite, from the request to the job that is done. The first delivery only warms up.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

import logto_webhooks
from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.instrumentation import HandlerRan
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make

SRC = str(Path(logto_webhooks.__file__).parent)
MOST_MODULES = 20
MOST_FUNCTIONS = 120


class Recorder:
    """Notes each function of the package that is called, in any thread, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.functions: dict[str, set[str]] = defaultdict(set)

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if not self.is_on or event != "call" or not code.co_filename.startswith(SRC):
            return
        if not code.co_name.endswith(("comp>", "genexpr>", "module>")):  # these are no functions
            module = str(Path(code.co_filename).relative_to(SRC))
            self.functions[module].add(code.co_qualname)


async def run(recorder: Recorder, folder: Path) -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def observe(report: Any) -> None:
        if isinstance(report, HandlerRan):
            recorder.is_on = False
            loop.call_soon_threadsafe(done.set)

    engine = sa.create_engine(f"sqlite:///{folder / 'path.db'}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, observe=observe)

    @logto.on("User.Created")
    def greet(event: events.UserCreated, session: Session) -> None:
        session.execute(sa.text("SELECT 1"))

    await logto.migrate()
    async with logto.lifespan():
        await asyncio.sleep(1.5)  # until what begins has begun
        for name in ("warm", "measured"):
            delivery = make.user_created(id=name)
            recorder.is_on = name == "measured"
            await send(logto, delivery)
            await done.wait()
            done.clear()
            await asyncio.sleep(0.5)
    engine.dispose()


async def send(logto: LogtoWebhooks, delivery: SignedRequest) -> None:
    headers = [(key.lower().encode(), value.encode()) for key, value in delivery.headers]
    scope = {"type": "http", "method": "POST", "path": logto.path, "headers": headers}
    answered: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": delivery.body, "more_body": False}

    async def answer(message: Any) -> None:
        answered.append(message)

    await logto(scope, receive, answer)
    assert answered[0]["status"] == 200, answered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", action="store_true", help="list them, too")
    show_functions = parser.parse_args().functions
    recorder = Recorder()
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(recorder, Path(folder)))
    sys.setprofile(None)
    for module, functions in sorted(recorder.functions.items()):
        print(f"{len(functions):4}  {module}")
        if show_functions:
            print("".join(f"      {name}\n" for name in sorted(functions)), end="")
    total = sum(map(len, recorder.functions.values()))
    print(f"{len(recorder.functions)} modules (at most {MOST_MODULES})")
    print(f"{total} functions (at most {MOST_FUNCTIONS})")
    return int(len(recorder.functions) > MOST_MODULES or total > MOST_FUNCTIONS)


if __name__ == "__main__":
    sys.exit(main())
