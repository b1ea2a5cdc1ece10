"""Going through jobs of which there may be any number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from logto_webhooks.core.jobs import JobFilter, JobRow
from logto_webhooks.core.ports import Store

AT_ONCE: Final = 1_000


def all_jobs(store: Store, wanted: JobFilter) -> Iterator[JobRow]:
    """All that are wanted, whatever the limit, the newest first."""
    wanted = replace(wanted, limit=AT_ONCE)
    while page := store.jobs.find(wanted):
        yield from page
        wanted = replace(wanted, after=page[-1].id)
