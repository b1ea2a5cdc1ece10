"""Sends signed deliveries over HTTP, as Logto does: several at once, each once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final, TypeVar

import httpx2

from logto_webhooks.errors import ServiceUnreachable
from logto_webhooks.samples.request import SignedRequest

Delivery = TypeVar("Delivery", bound=SignedRequest)

TIMEOUT_S: Final = 10.0  # Logto's
PAUSE_S: Final = 0.05  # between the pieces of a body


async def send_request(
    url: str,
    deliveries: Iterable[Delivery],
    answered: Callable[[Delivery, httpx2.Response], None],
    concurrency: int = 10,
) -> None:
    """Post each delivery once, in order, at most `concurrency` at a time.

    `answered` is called with each answer, whatever its status. Raises ServiceUnreachable.
    """
    waiting = iter(deliveries)

    async def sender(client: httpx2.AsyncClient) -> None:
        for each in waiting:
            answered(each, await _post(client, url, each))

    try:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(sender(client))
    except* (httpx2.HTTPError, httpx2.InvalidURL, OverflowError) as errors:
        first = errors.exceptions[0]
        problem = str(first) or type(first).__name__
        raise ServiceUnreachable(url=url, problem=problem) from None


async def _post(client: httpx2.AsyncClient, url: str, each: SignedRequest) -> httpx2.Response:
    if each.pieces == 1:
        return await client.post(url, content=each.body, headers=each.headers)
    size = ("content-length", str(len(each.body)))  # else it would be chunked; Logto's never is
    return await client.post(url, content=_dribbled(each), headers=[*each.headers, size])


async def _dribbled(each: SignedRequest) -> AsyncIterator[bytes]:
    size = -(-len(each.body) // each.pieces)
    for start in range(0, len(each.body), size):
        yield each.body[start : start + size]
        await asyncio.sleep(PAUSE_S)
