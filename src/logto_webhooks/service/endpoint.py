"""The webhooks of a Logto, from this side: made, listed, tested."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core import canonical
from logto_webhooks.core.hooks import Hook, hook_of
from logto_webhooks.core.inbox import DeliveryFilter, Kept
from logto_webhooks.core.keys import problem_of_key
from logto_webhooks.core.log import RESETS
from logto_webhooks.core.ports import Host, Logto
from logto_webhooks.errors import EndpointExists, EndpointGone, KeyNotTold, LogtoUnreachable
from logto_webhooks.service.follow import follow, newest_id

POLL_S: Final = 0.2
PROVED_S: Final = 4.0  # within that, what was set aside is proved by a key that is in the database
NAME: Final = "logto-webhooks"


class Tested(Struct, frozen=True, kw_only=True):
    """What became of a test: the delivery that it is here, or the problem. By a webhook that isn't
    `enabled` Logto sends nothing else."""

    hook: str
    url: str
    enabled: bool
    event: str
    delivery: int | None = None
    took_ms: int | None = None
    problem: str | None = None


async def hooks_of(logto: Logto) -> tuple[list[Hook], int]:
    """All webhooks, and what time it is at Logto (ms). Raises LogtoUnreachable, LogtoRefused."""
    found: list[Hook] = []
    now = 0
    async for page in logto.hooks():
        now = page.date or page.asked_at
        found += [hook for each in page.content if (hook := hook_of(each))]
    return found, now


async def create(logto: Logto, url: str, name: str, events: Sequence[str]) -> Hook:
    """Make a webhook. Raises EndpointExists, KeyNotTold, LogtoUnreachable, LogtoRefused."""
    found, _ = await hooks_of(logto)
    for each in found:
        if each.leads_to(url):
            raise EndpointExists(id=each.id, url=url)
    with perhaps_done("it may be there all the same: see `logto-webhooks endpoint list`"):
        return made_of((await logto.create_hook(name, url, events)).content, name)


@contextmanager
def perhaps_done(note: str) -> Iterator[None]:
    """Who got no answer is told that Logto may have done it. Raises LogtoUnreachable."""
    try:
        yield
    except LogtoUnreachable as error:
        problem = f"{error.problem}; {note}"
        raise LogtoUnreachable(endpoint=error.endpoint, problem=problem) from None


def made_of(content: Any, name: str) -> Hook:
    """The webhook that was made, or changed. Raises EndpointGone, and KeyNotTold if Logto doesn't
    answer its key."""
    made = hook_of(content)
    if made is None:
        raise EndpointGone(name=name, what="deleted")
    if (problem := problem_of_key(made.signing_key)) is not None:
        raise KeyNotTold(id=made.id, name=made.name or name, problem=problem)
    return made


async def send_test(logto: Logto, host: Host, hook: Hook, event: str, timeout_s: float) -> Tested:
    """Have Logto send a test, and wait until the inbox has it.

    One that is answered 401 may come all the same, once the receiver finds a key that was just
    changed. Raises LogtoUnreachable, LogtoRefused, StoreUnavailable.
    """
    newest, began = await newest_id(host), time.monotonic()
    tested = Tested(hook=hook.id, url=hook.url, enabled=hook.enabled, event=event)
    answered = (await logto.test_hook(hook.id, hook.url, event)).content
    problem = None if answered == {} else _problem(answered)
    if problem not in (None, _REFUSED):
        return replace(tested, problem=problem)
    wait_s = timeout_s if problem is None else min(timeout_s, PROVED_S)
    sought = DeliveryFilter(event=event, after=newest)
    try:
        async with asyncio.timeout(wait_s):
            kept = await _from(hook, host, sought)
    except TimeoutError:
        return replace(tested, problem=problem or _ELSEWHERE.format(timeout_s))
    took = round((time.monotonic() - began) * 1000)
    return replace(tested, delivery=kept.id, took_ms=took)


async def _from(hook: Hook, host: Host, sought: DeliveryFilter) -> Kept:
    async with aclosing(follow(host, sought, POLL_S)) as coming:
        async for kept in coming:
            if canonical.decode(kept.body).get("hookId") == hook.id:
                return kept
    raise AssertionError("following has no end")


def _problem(answered: Any) -> str:
    """What Logto says of a test that came to nothing."""
    if answered is None:
        return "Logto has no such webhook any more"
    data = answered.get("data")
    status = data.get("responseStatus") if isinstance(data, dict) else None
    if status == 401:
        return _REFUSED
    if isinstance(status, int):
        return f"it answered {status}"
    text = str(answered.get("message", ""))
    return next((word for sign, word in _CAUSES if sign in text), "Logto got no answer from it")


_CAUSES: Final = (
    ("timed out", "Logto got no answer in time"),
    ("ECONNREFUSED", "nothing listens there, seen from Logto"),
    *((sign, "it closed the connection without an answer, seen from Logto") for sign in RESETS),
    ("ENOTFOUND", "Logto can't find its host"),
    ("certificate", "Logto doesn't trust its TLS certificate"),
)
_REFUSED: Final = "it answered 401: the signing key that is set there isn't this webhook's"
_ELSEWHERE: Final = (
    "Logto got an answer of success, but nothing came here within {:g} s: the URL leads elsewhere, "
    "something redirects, or this is another database"
)
