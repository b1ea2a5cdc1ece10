"""Sends the webhooks: each once, up to ten at a time, unordered, from memory."""

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
from logto_webhooks.testing.fake.faults import Fate, Faults, draw
from logto_webhooks.testing.fake.state import FakeState

TIMEOUT_S: Final = 10.0
_REFUSED: Final = (
    'TypeError: {"message":"fetch failed","cause":{"message":"connect ECONNREFUSED",'
    '"errno":-111,"code":"ECONNREFUSED","syscall":"connect"}}'
)


class QueuedWebhook(Struct, frozen=True):
    """A webhook on its way; signed with the key that its hook had when it was queued."""

    url: str
    payload: Json
    signed: SignedRequest
    fate: Fate
    life: int


class SendResult(Struct, frozen=True):
    """The answer as it is logged, or none; `error` is what Logto writes of a failure."""

    response: Json | None
    error: str | None


class Sender:
    """A queue of webhooks, and those who send them while `run` runs."""

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

    def queue(self, payloads: list[Json]) -> None:
        """Queue webhooks for each hook that wants them."""
        for payload in payloads:
            for hook in self._state.hooks.values():
                if hook["enabled"] and payload["event"] in hook["events"]:
                    self._add(hook, payload | {"hookId": hook["id"]})

    def kill(self) -> None:
        """Forget what wasn't sent yet."""
        self._life += 1
        self._unfinished -= len(self._waiting)
        self._waiting.clear()
        self._work.clear()
        self._finish(0)

    async def settle(self) -> None:
        """Wait until nothing is queued or on its way."""
        await self._idle.wait()

    async def run(self, at_once: int) -> None:
        """Send what is queued, until cancelled."""
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
        made = log.entry(
            new_id(self._ids, 21), payload, self._now(), outcome.response, outcome.error
        )
        self._state.log(payload["hookId"]).add(made)

    def _finish(self, count: int) -> None:
        self._unfinished -= count
        if not self._unfinished:
            self._idle.set()


async def _post(client: httpx2.AsyncClient, url: str, delivery: SignedRequest) -> SendResult:
    try:
        answer = await client.post(url, content=delivery.body, headers=delivery.headers)
    except httpx2.TimeoutException:
        error = {"message": f"Request timed out: POST {url}", "request": {}, "name": "TimeoutError"}
        return SendResult(None, f"TimeoutError: {msgspec.json.encode(error).decode()}")
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return SendResult(None, _REFUSED)
    response = log.response(answer.status_code, answer.content)
    return SendResult(response, None if answer.is_success else _http_error(answer, delivery.body))


def _http_error(answer: httpx2.Response, body: bytes) -> str:
    """What Logto makes of a refusal: an error with all that was sent in it."""
    options = {"headers": {}, "json": msgspec.Raw(body), "timeout": 10000, "method": "POST"}
    error = {
        "message": f"Request failed with status code {answer.status_code} {answer.reason_phrase}",
        "response": {},
        "request": {},
        "options": options | {"throwHttpErrors": True, "body": body.decode()},
        "name": "HTTPError",
    }
    return f"HTTPError: {msgspec.json.encode(error).decode()}"
