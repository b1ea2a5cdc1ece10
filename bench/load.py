"""Load: signed requests in a file, sent by wrk from 64 connections, or at a steady rate."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.baselines import KEY
from logto_webhooks.samples.payloads import payload
from logto_webhooks.samples.request import SignedRequest, sign_request

PATH = "/api/webhooks/logto"
EVENTS = ("User.Created", "User.Data.Updated", "PostSignIn")
_LUA = """
local file = io.open(os.getenv("BENCH_REQUESTS"), "r")
function request()
  local line = file:read("*l")
  if not line then file:seek("set"); line = file:read("*l") end
  return wrk.format("POST", "/api/webhooks/logto",
    {["logto-signature-sha-256"] = line:sub(1, 64)}, line:sub(66))
end
"""


def deliveries(count: int, seed: int, users: int = 20_000) -> Iterator[SignedRequest]:
    """Realistic deliveries about so many users."""
    rng = random.Random(seed)
    for number in range(count):
        about = f"u{rng.randrange(users)}"
        at = 1_795_485_335_000 + number
        yield sign_request(payload(rng.choice(EVENTS), {}, at=at, rng=rng, id=about), KEY)


def write_requests(file: Path, count: int) -> None:
    """Write them for wrk: signature and body, a line each; wrk begins anew at the end."""
    with file.open("wb") as out:
        for each in deliveries(count, seed=1):
            out.write(each.headers[0][1].encode() + b" " + each.body + b"\n")


def wrk(port: int, requests: Path, seconds: int) -> float:
    """Answers a second from 64 connections. Raises when any of them isn't 200."""
    tool = shutil.which("wrk")
    if tool is None:
        sys.exit("The bench sends its load with wrk; install it, or put it on the PATH.")
    script = requests.with_suffix(".lua")
    script.write_text(_LUA)
    shown = subprocess.run(
        [tool, "-t1", "-c64", f"-d{seconds}", "-s", str(script), f"http://127.0.0.1:{port}{PATH}"],
        env=os.environ | {"BENCH_REQUESTS": str(requests)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Non-2xx" not in shown, shown
    found = re.search(r"Requests/sec:\s+([\d.]+)", shown)
    assert found, shown
    return float(found[1])


async def steady(port: int, sent: Sequence[SignedRequest], rate: int) -> list[float]:
    """Send so many a second, whatever the answers do; return how long each took, in ms."""
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(32):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", port))
    took: list[float] = []

    async def one(each: SignedRequest, due: float) -> None:
        reader, writer = await free.get()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(each.body)}\r\n"
        writer.write(
            f"{head}{each.headers[0][0]}: {each.headers[0][1]}\r\n\r\n".encode() + each.body
        )
        answer = await reader.readuntil(b"}")
        took.append((time.perf_counter() - due) * 1000)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        free.put_nowait((reader, writer))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, each in enumerate(sent):
            due = start + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(each, due))
    return took


@contextmanager
def running(command: Sequence[str], port: int, log: Path, **environment: str) -> Iterator[None]:
    """Run a server on `port` for as long as the block runs."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=os.environ | environment, stderr=out)
    try:
        _wait_for(port)
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1)
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.05)
        else:
            return
