"""What all tests have in common. No database driver is imported here."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings

from logto_webhooks.testing.clock import MOMENTS
from tests.support import marks

HERE = Path(__file__).parent
ON_POSTGRES = ("asyncpg", "psycopg", "postgres")  # what parameters are called

# Hundreds of processes start in these tests: what one compiles, the next need not.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The gate tries the same few examples each time; `make search` tries many new ones.
settings.register_profile(
    "gate",
    derandomize=True,
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", settings.get_profile("gate"), derandomize=False, max_examples=3000
)
settings.load_profile(os.environ.get("LOGTO_WEBHOOKS_TEST_PROFILE", "gate"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on PostgreSQL by its parameters, and all that starts processes."""
    for item in items:
        if HERE / "e2e" in item.path.parents:
            item.add_marker(pytest.mark.process)
            if hasattr(getattr(item, "module", None), "postgres"):  # of tests.support
                item.add_marker(pytest.mark.postgres)
        callspec = getattr(item, "callspec", None)
        parameters = callspec.params.values() if callspec else ()
        names = [value for value in parameters if isinstance(value, str)]
        if any(kind in name for kind in ON_POSTGRES for name in names):
            item.add_marker(pytest.mark.postgres)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests without the mark can't start a process or a PostgreSQL server."""
    marks.marks = {mark.name for mark in item.iter_markers()}
    return (yield)


_sqlite_engines = weakref.WeakSet[sa.Engine]()


@sa.event.listens_for(sa.Engine, "engine_connect")
def _note_engine(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite" and connection.engine.url.database:  # not in memory
        _sqlite_engines.add(connection.engine)


@pytest.fixture(autouse=True)
def _dispose_engines() -> Iterator[None]:
    """Close what a test's engines left in their pools: Python 3.13 warns of it, in later tests."""
    yield
    for engine in list(_sqlite_engines):
        engine.dispose()
    _sqlite_engines.clear()


@pytest.fixture(autouse=True)
def _dates_near_now() -> None:
    """Events of `make` are 120 ms apart, so a test that makes thousands leaves their dates minutes
    ahead. The next test would find its own clamped, as of a wrong clock."""
    if MOMENTS.last > time.time_ns() // 1_000_000 + 120_000:
        MOMENTS.last = 0
