"""Send signed deliveries over HTTP as Logto does: several at a time, each once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final, TypeVar

import httpx2

from logto_webhooks.errors import ServiceUnreachable
from logto_webhooks.samples.request import SignedRequest

Request = TypeVar("Request", bound=SignedRequest)

TIMEOUT_S: Final = 10.0  # Logto's
PAUSE_S: Final = 0.05  # between the pieces of a body


async def send_request(
    url: str,
    requests: Iterable[Request],
    answered: Callable[[Request, httpx2.Response], None],
    concurrency: int = 10,
) -> None:
    """Post each request once, in order, at most `concurrency` at a time.

    `answered` is called with each response, whatever its status. Raises ServiceUnreachable.
    """
    waiting = iter(requests)

    async def sender(client: httpx2.AsyncClient) -> None:
        for request in waiting:
            answered(request, await _post(client, url, request))

    try:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(sender(client))
    except* (httpx2.HTTPError, httpx2.InvalidURL, OverflowError) as errors:
        first = errors.exceptions[0]
        problem = str(first) or type(first).__name__
        raise ServiceUnreachable(url=url, problem=problem) from None


async def _post(client: httpx2.AsyncClient, url: str, request: SignedRequest) -> httpx2.Response:
    if request.pieces == 1:
        return await client.post(url, content=request.body, headers=request.headers)
    # With a length, or it would be sent chunked, which Logto never does.
    headers = [*request.headers, ("content-length", str(len(request.body)))]
    return await client.post(url, content=_send_slowly(request), headers=headers)


async def _send_slowly(request: SignedRequest) -> AsyncIterator[bytes]:
    size = -(-len(request.body) // request.pieces)
    for start in range(0, len(request.body), size):
        yield request.body[start : start + size]
        await asyncio.sleep(PAUSE_S)
