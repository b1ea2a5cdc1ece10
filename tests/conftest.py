"""Every store behind its port: a test that takes `host` runs on each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from logto_webhooks.interfaces import Store, TransactionRunner
from logto_webhooks.testing.clock import MOMENTS
from tests.support.copy import STORES, open_host

T = TypeVar("T")

# Hundreds of processes start in these tests: what one compiles, the next need not.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The gate tries the same examples each time; `make search` tries many new ones.
settings.register_profile(
    "gate", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "search", settings.get_profile("gate"), derandomize=False, max_examples=3000
)
settings.load_profile(os.environ.get("LOGTO_WEBHOOKS_TEST_PROFILE", "gate"))


@pytest.fixture(autouse=True)
def _dates_near_now() -> None:
    """Events of `make` are 120 ms apart, so a test that makes thousands leaves their dates minutes
    ahead. The next test would find its own clamped, as of a wrong clock."""
    if MOMENTS.ahead_ms() > 120_000:
        MOMENTS.restart()


class Run(Protocol):
    """Runs work on the store under test, in one transaction."""

    def __call__(self, work: Callable[[Store], T]) -> T: ...


@pytest.fixture(params=STORES)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TransactionRunner]:
    """An empty store of each kind."""
    opened = open_host(request.param, tmp_path)
    yield opened
    asyncio.run(opened.close())


@pytest.fixture
def run(host: TransactionRunner) -> Run:
    """Run work in one transaction, and commit."""

    def run_now(work: Callable[[Store], T]) -> T:
        return asyncio.run(host.run(work))

    return run_now
