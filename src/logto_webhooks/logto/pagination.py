"""Page through a listing that changes while it is read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

from logto_webhooks import canonical_json
from logto_webhooks.events.base import get_from
from logto_webhooks.logto.api_responses import PAGE, ApiResponse

BACK_AT_MOST: Final = 1_000
ENDED: Final = 2**31  # the page after the last
_NEAR: Final = 4  # the last pages, in which items that moved are recognized

_REPEATED: Final = 3  # so many pages in a row with nothing new are no coincidence
_SPARE: Final = 1_000  # pages by which a listing can be longer than twice its first total

Ask = Callable[[int], AsyncIterator[ApiResponse]]  # starting at a page


class ProgressCheck:
    """Notices a listing that would never end: Logto, or a proxy in front of it, repeats pages, or
    tells a total that always stays ahead.

    While records are created, those of a page move to the next one, so a page may have nothing
    new. But then the total grows.
    """

    def __init__(self, page: int) -> None:
        """`page` is the first page that is read."""
        self._page = page
        self._total: int | None = None  # of the page before
        self._last_page = 0
        self._near: deque[set[str | bytes]] = deque(maxlen=_NEAR)
        self._repeated = 0

    def find_problem(self, content: list[Any], total: int) -> str:
        """Say what is wrong with the next page; "" if nothing is."""
        if self._total is None:
            self._total = total
            self._last_page = self._page + 2 * -(-total // PAGE) + _SPARE
        grown, self._total = total - self._total, total
        items = {name for item in content if (name := _identify(item)) is not None}
        is_new = not items or bool(items.difference(*self._near)) or grown > 0
        self._near.append(items)
        self._repeated = 0 if is_new else self._repeated + 1
        page, self._page = self._page, self._page + 1
        if self._repeated >= _REPEATED:
            return f"page {page} has the same items as the pages before it"
        if page >= self._last_page:
            return f"page {page} isn't the last one, although the first one told of far fewer"
        return ""


def _identify(item: Any) -> str | bytes | None:
    """Return what tells an item from others: its ID, or else its content. None for an item that
    couldn't be read."""
    if item is None:
        return None
    id_ = get_from(item, "id")
    return id_ if isinstance(id_, str) else canonical_json.digest(item)


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
        self._near: deque[set[str]] = deque(maxlen=_NEAR)

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
        ids = {id_ for item in answered.content if isinstance(id_ := get_from(item, "id"), str)}
        without = sum(not isinstance(get_from(item, "id"), str) for item in answered.content)
        self.seen += len(ids.difference(*self._near)) + without
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
