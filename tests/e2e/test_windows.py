"""Windows, played: no `fcntl`, `resource` and uvloop, and a loop that takes no signal handlers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.service import PATH, clean_environment
from tests.support.waiting import until

PLAY = """\
import sys
for name in ("fcntl", "resource", "uvloop"):
    sys.modules[name] = None
import asyncio
def refuse(*_):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = refuse
asyncio.SelectorEventLoop.remove_signal_handler = refuse
"""
COMMAND = f"{PLAY}from logto_webhooks.__main__ import main\nmain()\n"


def played(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=clean_environment({"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "line",
    [
        "import logto_webhooks, logto_webhooks.testing, logto_webhooks.fastapi",
        "from logto_webhooks import LogtoWebhooks, tables",
        "import logto_webhooks.listen",
    ],
)
def test_it_imports(line: str, tmp_path: Path) -> None:
    done = played(f"{PLAY}{line}\n", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_serves_and_works_on_sqlite(tmp_path: Path) -> None:
    """Over real HTTP: one process applies and others are spare; a signal ends it well."""
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", "--port", "0"],
            cwd=tmp_path,
            env=clean_environment({"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}),
            stdout=file,
            stderr=file,
        )
    try:
        until(lambda: "listening on" in log.read_text() or process.poll() is not None)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert found, log.read_text()
        delivery = make.user_created(id="ana")
        answer = httpx2.post(f"{found[0]}{PATH}", content=delivery.body, headers=delivery.headers)
        assert answer.status_code == 200
        until(lambda: status(tmp_path)["deliveries"]["done"] == 1, log.read_text)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 0, log.read_text()


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(played(COMMAND, "status", "--json", folder=folder).stdout)
    return found


def test_the_lock_is_one_processs_and_goes_with_it(tmp_path: Path) -> None:
    """As with `fcntl`: two objects of a process have it together, another process doesn't."""
    use = "from pathlib import Path\nfrom logto_webhooks.private_files import LockFile\n"
    take = f"{PLAY}{use}one, two = LockFile(Path('lock')), LockFile(Path('lock'))\n"
    hold = f"{take}print(one.acquire(), two.acquire(), flush=True)\none.release()\ninput()\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True True\n"
    another = f"{take}print(one.acquire())\n"
    assert played(another, folder=tmp_path).stdout == "False\n"
    holder.kill()
    holder.communicate()
    assert played(another, folder=tmp_path).stdout == "True\n"
    assert os.stat(tmp_path / "lock").st_mode & 0o777 == 0o600
