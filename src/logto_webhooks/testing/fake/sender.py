"""Sends the webhooks: each once, up to ten at a time, unordered, from memory, with faults."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from random import Random
from typing import Final

import httpx2
import msgspec
from msgspec import Struct

from logto_webhooks.samples.payloads import new_id
from logto_webhooks.samples.request import SignedRequest, sign_request
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake import log
from logto_webhooks.testing.fake.state import FakeState
from logto_webhooks.validation import is_url

REORDERED_BY: Final = 10
TIMEOUT_S: Final = 10.0
_REFUSED: Final = (
    'TypeError: {"message":"fetch failed","cause":{"message":"connect ECONNREFUSED",'
    '"errno":-111,"code":"ECONNREFUSED","syscall":"connect"}}'
)


class Faults(Struct, frozen=True, kw_only=True):
    """Probabilities from 0 to 1, drawn for each delivery when it is queued, and for each API
    answer.

    For deliveries: `lost` ones fail, and the log shows the failure; `silent` ones are neither sent
    nor logged; `doubled` ones are sent twice; `reordered` ones are sent after up to ten other
    waiting ones; `delay_ms` is the shortest and the longest delay. For the API: `status_429`, with
    `retry_after_s` as `Retry-After`, `status_500`, and `slow_ms`, the delay of each answer.
    """

    lost: float = 0.0
    silent: float = 0.0
    doubled: float = 0.0
    reordered: float = 0.0
    delay_ms: tuple[int, int] = (0, 0)
    status_429: float = 0.0
    status_500: float = 0.0
    retry_after_s: int | None = None
    slow_ms: int = 0


class Fate(Struct, frozen=True):
    """The random faults of a webhook."""

    lost: bool
    silent: bool
    doubled: bool
    behind: float
    delay_ms: int


def draw(faults: Faults, rng: Random) -> Fate:
    """Draw a webhook's fate. Each draws the same number of random values, whatever the faults."""
    lost, silent, doubled, reordered, behind, delay = (rng.random() for _ in range(6))
    shortest, longest = faults.delay_ms
    return Fate(
        lost=lost < faults.lost,
        silent=silent < faults.silent,
        doubled=doubled < faults.doubled,
        behind=behind * REORDERED_BY if reordered < faults.reordered else 0.0,
        delay_ms=round(shortest + delay * (longest - shortest)),
    )


class QueuedWebhook(Struct, frozen=True):
    """A queued delivery, signed with the key that its webhook had at that time."""

    url: str
    payload: Json
    signed: SignedRequest
    fate: Fate
    life: int


class SendResult(Struct, frozen=True):
    """The answer as it is logged, if there was one. `error` is Logto's text for a failure."""

    response: Json | None
    error: str | None


class Sender:
    """A queue of deliveries, which are sent while `run` runs."""

    def __init__(
        self, state: FakeState, now: Callable[[], int], seed: int, timeout_s: float
    ) -> None:
        self.faults: Faults = Faults()
        self._state = state
        self._now = now
        self._fates = Random(seed + 1)
        self._ids = Random(seed + 2)
        self._timeout_s = timeout_s
        self._waiting: list[tuple[float, int, QueuedWebhook]] = []
        self._queued = 0
        self._unfinished = 0
        self._life = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def queue(self, payload: Json) -> None:
        """Queue a delivery for each webhook that subscribes to the event."""
        for hook in self._state.hooks.values():
            if hook["enabled"] and payload["event"] in hook["events"]:
                self._add(hook, payload | {"hookId": hook["id"]})

    def kill(self) -> None:
        """Drop the deliveries that weren't sent yet."""
        self._life += 1
        self._unfinished -= len(self._waiting)
        self._waiting.clear()
        self._work.clear()
        self._finish(0)

    async def settle(self) -> None:
        """Wait until nothing is queued or being sent."""
        await self._idle.wait()

    async def run(self, at_once: int) -> None:
        """Send queued deliveries until cancelled."""
        async with (
            httpx2.AsyncClient(timeout=self._timeout_s, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(at_once):
                group.create_task(self._send(client))

    async def test(self, url: str, payload: Json, key: str) -> SendResult:
        """Send a test payload, which isn't logged."""
        async with httpx2.AsyncClient(timeout=self._timeout_s, trust_env=False) as client:
            return await _post(client, url, sign_request(payload, key))

    def _add(self, hook: Json, payload: Json) -> None:
        fate = draw(self.faults, self._fates)
        if fate.silent:
            return
        delivery = sign_request(payload, hook["signingKey"])
        webhook = QueuedWebhook(hook["config"]["url"], payload, delivery, fate, self._life)
        self._queued += 1
        self._unfinished += 1
        heapq.heappush(self._waiting, (self._queued + fate.behind, self._queued, webhook))
        self._idle.clear()
        self._work.set()

    async def _send(self, client: httpx2.AsyncClient) -> None:
        while True:
            await self._work.wait()
            if not self._waiting:
                self._work.clear()
                continue
            _, _, webhook = heapq.heappop(self._waiting)
            try:
                await self._attempt(client, webhook)
            finally:
                self._finish(1)

    async def _attempt(self, client: httpx2.AsyncClient, webhook: QueuedWebhook) -> None:
        if webhook.fate.delay_ms:
            await asyncio.sleep(webhook.fate.delay_ms / 1000)
            if webhook.life != self._life:
                return
        if webhook.fate.lost:
            outcome = SendResult(None, _REFUSED)
        else:
            outcome = await _post(client, webhook.url, webhook.signed)
        self._log(webhook.payload, outcome)
        if webhook.fate.doubled:
            await _post(client, webhook.url, webhook.signed)

    def _log(self, payload: Json, outcome: SendResult) -> None:
        entry_id = new_id(self._ids, 21)
        entry = log.entry(entry_id, payload, self._now(), outcome.response, outcome.error)
        self._state.log(payload["hookId"]).add(entry)

    def _finish(self, count: int) -> None:
        self._unfinished -= count
        if not self._unfinished:
            self._idle.set()


async def _post(client: httpx2.AsyncClient, url: str, delivery: SignedRequest) -> SendResult:
    if not is_url(url):
        return SendResult(None, _REFUSED)
    try:
        answer = await client.post(url, content=delivery.body, headers=delivery.headers)
    except httpx2.TimeoutException:
        error = {"message": f"Request timed out: POST {url}", "request": {}, "name": "TimeoutError"}
        return SendResult(None, f"TimeoutError: {msgspec.json.encode(error).decode()}")
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return SendResult(None, _REFUSED)
    response = log.log_response(answer.status_code, answer.content)
    if answer.is_success:
        return SendResult(response, None)
    return SendResult(response, _describe_refusal(answer, delivery.body))


def _describe_refusal(answer: httpx2.Response, body: bytes) -> str:
    """Return Logto's text for a refusal: an error that contains everything that was sent."""
    options = {"headers": {}, "json": msgspec.Raw(body), "timeout": 10000, "method": "POST"}
    error = {
        "message": f"Request failed with status code {answer.status_code} {answer.reason_phrase}",
        "response": {},
        "request": {},
        "options": options | {"throwHttpErrors": True, "body": body.decode()},
        "name": "HTTPError",
    }
    return f"HTTPError: {msgspec.json.encode(error).decode()}"
