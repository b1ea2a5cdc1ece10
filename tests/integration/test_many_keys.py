"""A request is verified with any number of keys, without blocking the event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from logto_webhooks.deliveries import LARGE, NewDelivery, StoreResult
from logto_webhooks.ingest import Receiver, WebhookResponse
from logto_webhooks.ingest.body import RequestBody
from logto_webhooks.signing_keys import FEW, Keyring, WebhookKey
from logto_webhooks.testing import FrozenClock, make
from tests.integration.test_stores import T0

MANY = 1_000
FORGED = "nobody-has-this-key-0123"
SIZES = (1, LARGE)


def key(number: int) -> str:
    return f"key-of-a-webhook-{number}"


class Door:
    """A receiver that knows the keys of many webhooks."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []
        self.rejected: list[bytes] = []
        ring = Keyring(["configured-key-0123456789"])
        ring.learn(
            [WebhookKey(webhook_id=f"h{n}", key=key(n), learnt_at=T0) for n in range(MANY)], T0
        )
        self.receiver = Receiver(
            ring, self.store, FrozenClock(T0), lambda report: None, reject=self.reject
        )

    async def store(
        self, delivery: NewDelivery, deadline: float | None, room: RequestBody | None
    ) -> StoreResult:
        self.stored.append(delivery.body)
        return StoreResult(len(self.stored), False)

    def reject(self, body: bytes, signature: bytes, at: int) -> None:
        self.rejected.append(body)

    async def post(
        self, key: str, hook: str, size: int, deadline: float | None = None
    ) -> WebhookResponse:
        sent = make.user_created(key=key, hookId=hook, name="a" * size)
        signature = dict(sent.headers)["logto-signature-sha-256"].encode()
        return await self.receiver.receive([signature], sent.body, deadline)


@contextmanager
def counting_signatures() -> Iterator[dict[int, int]]:
    """How many signatures each thread makes."""
    made: dict[int, int] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "sign":
            made[threading.get_ident()] = made.get(threading.get_ident(), 0) + 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield made
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("size", SIZES)
def test_each_key_is_accepted_whatever_webhook_a_body_names(size: int) -> None:
    """A guess decides only which keys are tried first."""

    async def main() -> None:
        door = Door()
        for number in (0, FEW - 1, FEW, 500, MANY - 1):
            for hook in (f"h{number}", "h7", "unknown"):
                assert (await door.post(key(number), hook, size)).status == 200
        assert (await door.post(FORGED, "h7", size)).status == 401
        assert len(door.stored) == 15
        assert len(door.rejected) == 1

    asyncio.run(main())


@pytest.mark.parametrize("size", SIZES)
def test_few_keys_are_tried_for_a_body_that_names_its_webhook(size: int) -> None:
    """Those of that webhook, and the configured one."""

    async def main() -> None:
        door = Door()
        with counting_signatures() as made:
            assert (await door.post(key(500), "h500", size)).status == 200
        assert sum(made.values()) <= 1 + 2  # the test itself signs once
        assert sum(made.values()) > 1

    asyncio.run(main())


def test_the_event_loop_tries_few_keys_between_two_turns() -> None:
    """On a small body that nobody signed, although all are tried."""

    async def main() -> None:
        door, made_in_turns = Door(), list[int]()
        here = threading.get_ident()
        with counting_signatures() as made:
            posting = asyncio.create_task(door.post(FORGED, "h7", 1))
            while not posting.done():
                await asyncio.sleep(0)
                made_in_turns.append(made.pop(here, 0))
            assert (await posting).status == 401
        assert not made  # a thread would hold Python's lock
        assert sum(made_in_turns) >= MANY
        assert max(made_in_turns) <= FEW + 2

    asyncio.run(main())


@pytest.mark.parametrize(("signer", "status"), [(key(500), 200), (FORGED, 401)])
def test_the_event_loop_hashes_no_large_body(signer: str, status: int) -> None:
    """Whoever signed it."""

    async def main() -> None:
        door = Door()
        with counting_signatures() as made:
            assert (await door.post(signer, "h7", LARGE)).status == status
        assert made.pop(threading.get_ident()) == 1  # the test itself
        assert sum(made.values()) > FEW

    asyncio.run(main())


def test_requests_that_nobody_signed_hold_up_no_delivery() -> None:
    """They wait for each other; what names its webhook doesn't wait for them."""

    async def main() -> None:
        door = Door()
        forged = [asyncio.create_task(door.post(FORGED, "h7", 2**20)) for _ in range(3)]
        await asyncio.sleep(0)
        for size in SIZES:
            assert (await door.post(key(500), "h500", size)).status == 200
        assert not all(request.done() for request in forged)
        assert {(await request).status for request in forged} == {401}

    asyncio.run(main())


@pytest.mark.parametrize("size", SIZES)
def test_the_work_on_a_request_ends_at_its_deadline(size: int) -> None:
    """The rest of the keys are left to the quarantine, which tries all."""

    async def main() -> None:
        door = Door()
        now = asyncio.get_running_loop().time()
        with counting_signatures() as made:
            assert (await door.post(FORGED, "h7", size, deadline=now)).status == 503
            await door.receiver.finish()
        assert sum(made.values()) < 5 * FEW
        assert len(door.rejected) == 1

    asyncio.run(main())
