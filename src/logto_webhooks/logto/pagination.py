"""Page through a listing that changes while it is read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

from logto_webhooks.events.base import get_from
from logto_webhooks.logto.api_responses import PAGE, ApiResponse

BACK_AT_MOST: Final = 1_000
ENDED: Final = 2**31  # the page after the last
_NEAR: Final = 4  # the last pages, in which items that moved are recognized

Ask = Callable[[int], AsyncIterator[ApiResponse]]  # starting at a page


class OffsetPager:
    """Reads a listing, starting at a page. `total` is the total of the page before that.

    `page` is the next page, and `seen` is the number of items so far, without duplicates.
    """

    def __init__(self, ask: Ask, page: int = 1, total: int | None = None) -> None:
        self._ask = ask
        self.page = page
        self.total = total
        self.seen = 0
        self._skipped = (page - 1) * PAGE
        self._least: int | None = total  # at least so many existed from beginning to end
        self._backs = 0
        self._near: deque[set[Any]] = deque(maxlen=_NEAR)

    @property
    def missed(self) -> int:
        """How many items must have been on no page, although all pages were read."""
        return max(0, (self._least or 0) - self._skipped - self.seen)

    async def pages(self) -> AsyncIterator[ApiResponse]:
        """Yield pages, and prefetch the next one meanwhile. Raises what the API raises."""
        going = self.page != ENDED
        while going:
            going = False
            async with aclosing(_prefetch(self._ask(self.page))) as answers:
                async for answered in answers:
                    if going := self._must_go_back(answered):
                        break
                    self._count(answered)
                    yield answered

    def _must_go_back(self, answered: ApiResponse) -> bool:
        """Note the total. If it fell, go back. This comes before the page is used, so that a
        process that is killed notices the fall again after its restart."""
        total = answered.total or 0
        before = total if self.total is None else self.total
        fell = max(0, before - total)
        self._least = (before if self._least is None else self._least) - fell
        self.total = total
        if not fell or self.page == 1 or self._backs == BACK_AT_MOST:
            return False
        self._backs += 1
        self.page = max(1, self.page - -(-fell // PAGE))
        return True

    def _count(self, answered: ApiResponse) -> None:
        ids = {get_from(item, "id") for item in answered.content}
        self.seen += len(ids.difference(*self._near))
        self._near.append(ids)
        self.page += 1


async def _prefetch(pages: AsyncIterator[ApiResponse]) -> AsyncGenerator[ApiResponse, None]:
    """Yield pages, and request each next one while the caller works on the one before."""
    asked = asyncio.ensure_future(_get_next(pages))
    try:
        while (page := await asked) is not None:
            asked = asyncio.ensure_future(_get_next(pages))
            yield page
    finally:
        asked.cancel()


async def _get_next(pages: AsyncIterator[ApiResponse]) -> ApiResponse | None:
    return await anext(pages, None)
