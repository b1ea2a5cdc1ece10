"""What starts fast imports little: which modules are not imported, whatever the time they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import logto_webhooks

HEAVY: Final = (
    "alembic",
    "asyncio",
    "asyncpg",
    "fastapi",
    "httpx",
    "httpx2",
    "msgspec",
    "prometheus_client",
    "psycopg",
    "rich",
    "sqlalchemy",
    "sqlite3",
    "starlette",
    "uvicorn",
)
STATUS: Final = ("alembic", "httpx2", "prometheus_client", "starlette", "uvicorn")


def imported(code: str) -> set[str]:
    """Run code in a new interpreter, and return the packages that it imports."""
    printing = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", printing], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import logto_webhooks", (*HEAVY, "typer")),
        ("import logto_webhooks.cli as c\nc.app(['--help'], standalone_mode=False)", HEAVY),
        ("import logto_webhooks.cli.records", STATUS),
        ("import logto_webhooks.admin", STATUS),
    ],
    ids=["package", "help", "status", "admin"],
)
def test_what_is_not_imported(code: str, absent: tuple[str, ...]) -> None:
    """Only what is used is imported, apart from what `make coverage` adds to each process."""
    assert (imported(code) - imported("pass")).isdisjoint(absent)


def test_status_on_sqlite_imports_only_what_it_needs(tmp_path: Path) -> None:
    """Not the ORM, nor the drivers and dialects of another database."""
    environment = os.environ | {"LOGTO_WEBHOOKS_DATABASE_URL": f"sqlite:///{tmp_path / 'app.db'}"}

    def run(command: str) -> str:
        code = (
            "import sys, logto_webhooks.cli as c\n"
            f"c.app([{command!r}], standalone_mode=False)\n"
            "print(*sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout.splitlines()[-1]

    run("migrate")
    absent = {
        "sqlalchemy.orm",
        "sqlalchemy.ext.asyncio",
        "sqlalchemy.dialects.postgresql",
        "rich",
        "logto_webhooks.doctor",
        "logto_webhooks.explain",
    }
    assert set(run("status").split()).isdisjoint({*absent, *STATUS})


@pytest.mark.parametrize("name", logto_webhooks.__all__)
def test_public_names_are_there(name: str) -> None:
    """Each is imported on first use."""
    assert getattr(logto_webhooks, name) is not None
    assert name in dir(logto_webhooks)
