"""What waits to be set aside while the database, or Logto, is away; and when a key ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from logto_webhooks.database import Database, open_database
from logto_webhooks.deliveries import StoreResult
from logto_webhooks.errors import LogtoUnreachable, StoreUnavailable
from logto_webhooks.ingest import Receiver, quarantine
from logto_webhooks.ingest.quarantine import Ask, Quarantine
from logto_webhooks.instrumentation import TelemetryEvent
from logto_webhooks.signing_keys import Keyring, WebhookKey, sign
from logto_webhooks.testing import FrozenClock, make
from tests.integration.test_stores import T0

OLD, NEW = "old-key-0123456789", "new-key-0123456789"


def of(
    database: Database, told: list[TelemetryEvent], ask: Ask | None = None, key: str = "configured"
) -> Quarantine:
    ring = Keyring([key])
    return Quarantine(database.host, ring, FrozenClock(T0), told.append, lambda: None, ask)


def offer(to: Quarantine, number: int, size: int = 0) -> None:
    body = make.user_created(id=f"u{number}", name="x" * size).body
    to.offer(body, b"0" * 64, time.time_ns() // 1_000_000)


def test_it_stays_within_its_bounds_while_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried; and what fits is written once the database is back."""
    monkeypatch.setitem(quarantine._QUEUE, False, (4, 20_000))

    async def main() -> None:
        database, told = open_database(f"sqlite:///{tmp_path / 'a.db'}"), list[TelemetryEvent]()
        waiting = of(database, told)
        for number in range(10):
            offer(waiting, number, 9_000)
            with pytest.raises(StoreUnavailable):
                await waiting.write_down()
        await database.migrate()
        await waiting.write_down()
        assert await database.host.read(lambda store: store.webhook_keys.count_rejected()) == 2
        await database.host.close()

    asyncio.run(main())


def test_junk_that_names_many_webhooks_holds_back_nobody(tmp_path: Path) -> None:
    """Anybody can send it: neither the answer nor what comes later may take long."""
    names = b",".join(b'"hookId":"%d"' % number for number in range(200_000))
    nested = b'{"hookId":[%b{}]}' % (b"{}," * 300_000)

    async def main() -> None:
        database = open_database(f"sqlite:///{tmp_path / 'a.db'}")
        await database.migrate()
        waiting = of(database, [])
        waiting._ring.webhook_ids.add("ours")
        for body in (b"{%b}" % names, b'{"a":["ours"],%b' % nested[1:]):
            started = time.process_time()
            waiting.offer(body, b"0" * 64, T0)
            await waiting.write_down()
            assert time.process_time() - started < 0.15
        await database.host.close()

    asyncio.run(main())


def test_what_was_written_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a delivery that came with it can't be stored yet."""

    async def main() -> None:
        database = open_database(f"sqlite:///{tmp_path / 'a.db'}")
        await database.migrate()
        waiting = of(database, [])
        offer(waiting, 1)
        body = make.user_created(id="proved").body
        waiting.offer(body, sign(body, "configured").encode(), T0)

        async def fail(*_: object) -> None:
            raise StoreUnavailable(problem="away")

        with monkeypatch.context() as away:
            away.setattr(waiting, "_add", fail)
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await waiting.write_down()
        await waiting.write_down()
        assert await database.host.read(lambda store: store.webhook_keys.count_rejected()) == 1
        status = await database.host.read(lambda store: store.status())
        assert status.deliveries["pending"] == 1
        await database.host.close()

    asyncio.run(main())


class LookedUp(set[str]):
    """IDs that are only looked up."""

    def __iter__(self) -> Iterator[str]:
        """Refuse to go through all."""
        raise AssertionError("the cost of a request depends on how many webhooks are known")


def test_how_many_webhooks_are_known_costs_a_rejected_request_nothing(tmp_path: Path) -> None:
    """Its webhook is looked up. An ID anywhere else in the body makes it known only until its top
    level is read."""
    waiting = of(open_database(f"sqlite:///{tmp_path / 'a.db'}"), [])
    waiting._ring.webhook_ids = LookedUp({"ours", "other"})
    for body, is_known in (
        (b'{"hookId":"ours"}', True),
        (b'{"hookId":"nobodys","data":["ours"]}', False),
        (b'{"data":{"hookId":"ours"},"hookId":"nobodys"}', True),
    ):
        waiting.offer(body, b"0" * 64, T0)
        assert waiting._queue[is_known][-1].body == body
    rejected = waiting._name_webhook(waiting._queue[True][-1])
    assert rejected is not None
    assert (rejected.webhook_id, rejected.known) == ("nobodys", False)


def test_logto_is_asked_again_when_it_could_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another delivery that is rejected: perhaps none comes for long."""
    monkeypatch.setattr(quarantine, "ASK_S", 0.0)
    asked: list[Sequence[str]] = []

    async def ask(keys: Sequence[str]) -> list[WebhookKey]:
        asked.append(keys)
        if len(asked) == 1:
            raise LogtoUnreachable(endpoint="e", problem="p")
        return []

    async def main() -> None:
        database = open_database(f"sqlite:///{tmp_path / 'a.db'}")
        await database.migrate()
        waiting = of(database, [], ask)
        offer(waiting, 1)
        with pytest.raises(LogtoUnreachable):
            await waiting.turn()
        for _ in range(3):
            await waiting.turn()
        assert len(asked) == 2
        await database.host.close()

    asyncio.run(main())


def test_what_a_process_with_an_old_key_sets_aside_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the key is new to none of them."""
    monkeypatch.setattr(quarantine, "QUIET_S", 0.0)

    async def main() -> None:
        database, told = open_database(f"sqlite:///{tmp_path / 'a.db'}"), list[TelemetryEvent]()
        await database.migrate()
        stale, current = of(database, told, key="old"), of(database, told)
        await current.turn()
        for number in range(3):
            body = make.user_created(id=f"u{number}").body
            stale.offer(body, sign(body, "configured").encode(), time.time_ns() // 1_000_000)
            await stale.turn()
            assert await database.host.read(lambda store: store.webhook_keys.count_rejected()) == 1
            await current.turn()
            assert await database.host.read(lambda store: store.webhook_keys.count_rejected()) == 0
        status = await database.host.read(lambda store: store.status())
        assert status.deliveries["pending"] == 3
        await database.host.close()

    asyncio.run(main())


def test_a_key_ends_when_it_ends() -> None:
    """Nobody has to look into the database again for that, be the key configured."""

    async def main() -> None:
        clock, ring = FrozenClock(T0), Keyring([OLD])

        async def store(*_: object) -> StoreResult:
            raise StoreUnavailable(problem="that it is signed is enough here")

        receiver = Receiver(ring, store, clock, lambda report: None)
        body = make.user_created().body
        learnt = [
            WebhookKey(webhook_id="h", key=OLD, learnt_at=T0, until=T0 + 5_000),
            WebhookKey(webhook_id="h", key=NEW, learnt_at=T0),
        ]
        assert ring.learn(learnt, T0)
        for seconds, status in ((4, 503), (1, 401)):
            clock.tick(seconds)
            answer = await receiver.receive([sign(body, OLD).encode()], body)
            assert answer.status == status
        assert ring.at(T0 + 5_000) == (NEW,)
        assert not ring.learn(learnt, T0 + 5_000)

    asyncio.run(main())
