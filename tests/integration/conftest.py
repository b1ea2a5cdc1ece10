"""Every store behind its port: a test that takes `host` runs on each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from tests.support.stores import STORES, open_host

T = TypeVar("T")


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
