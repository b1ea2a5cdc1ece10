"""Sends signed deliveries over HTTP, as Logto does: several at once, each once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import httpx2

from logto_webhooks.errors import Unreachable
from logto_webhooks.samples.signed import Signed

TIMEOUT_S = 10.0  # Logto's


async def send(
    url: str,
    deliveries: Iterable[Signed],
    answered: Callable[[Signed, httpx2.Response], None],
    concurrency: int = 10,
) -> None:
    """Post each delivery once, in order, at most `concurrency` at a time.

    `answered` is called with each answer, whatever its status. Raises Unreachable.
    """
    waiting = iter(deliveries)

    async def sender(client: httpx2.AsyncClient) -> None:
        for each in waiting:
            answered(each, await client.post(url, content=each.body, headers=each.headers))

    try:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(sender(client))
    except* (httpx2.HTTPError, httpx2.InvalidURL, OverflowError) as errors:
        first = errors.exceptions[0]
        problem = str(first) or type(first).__name__
        raise Unreachable(url=url, problem=problem) from None
