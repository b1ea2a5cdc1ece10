"""The application in the README, as its reader saves and runs it, with the log that the page about
FastAPI sets up."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.servers import Application, Server, soon
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]


def first_python_block(page: str) -> str:
    block = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert block
    return block[1]


def test_the_application_runs_and_shows_its_log(tmp_path: Path) -> None:
    """The handler runs for what is new; the log says why it doesn't run for what is old."""
    app = Application(tmp_path, "sqlite")
    source = first_python_block("README.md") + first_python_block("docs/api/fastapi.md")
    (tmp_path / "app.py").write_text(source)
    app.environment = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    with Server(app, "uvicorn", "app:app", "--port", "PORT", workers=0) as server:
        until(lambda: "Uvicorn running on" in server.log, lambda: server.log)
        new = make.user_created(id="ana", at=soon())
        old = make.user_created(id="bo", at=1_700_000_000_000)
        assert len(server.send(new, old)) == 2
        until(lambda: app.jobs() == Counter({("app:welcome", "done"): 1}), lambda: server.log)
        until(lambda: "older_than_installation=True" in server.log, lambda: server.log)
        [line] = [line for line in server.log.splitlines() if "older_than" in line]
        assert " INFO delivery " in line
        assert " subject=user:bo " in line
