"""Keys that change: what no key signs is set aside, within bounds, until a key proves it."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from msgspec.structs import replace

from logto_webhooks.database.store import Store
from logto_webhooks.samples.request import SignedRequest, sign_request
from logto_webhooks.signing_keys import (
    BOUNDS,
    OVERLAP_MS,
    RejectedRequest,
    WebhookKey,
    fingerprint,
    read_webhook_id,
)
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.conftest import Run
from tests.support.fake import credentials, serving
from tests.support.plans import explain, noting
from tests.support.service import Service, command
from tests.support.stores import RECEIVED_AT
from tests.support.waiting import eventually

JUNK = int(os.environ.get("LOGTO_WEBHOOKS_TEST_JUNK", "1000"))


def now() -> int:
    return time.time_ns() // 1_000_000


def stranger(
    number: int = 0, *, known: bool = True, size: int = 10, at: int = 0
) -> RejectedRequest:
    return RejectedRequest(
        body=b"x" * size,
        signature=f"{number:064x}",
        received_at=at or now(),
        webhook_id="h",
        known=known,
    )


class TestStore:
    """What every store does with them."""

    def test_what_is_set_aside_is_listed_and_released(self, run: Run) -> None:
        """The oldest first, page by page."""
        run(lambda store: store.webhook_keys.add_rejected([stranger(each) for each in range(5)]))
        first = run(lambda store: store.webhook_keys.list_rejected(0, 3))
        rest = run(lambda store: store.webhook_keys.list_rejected(first[-1].id, 3))
        assert [int(each.signature, 16) for each in (*first, *rest)] == [0, 1, 2, 3, 4]
        assert replace(first[1], id=0, received_at=1) == replace(stranger(1), received_at=1)
        run(lambda store: store.webhook_keys.delete_rejected([each.id for each in first]))
        assert run(lambda store: store.webhook_keys.count_rejected()) == 2

    @pytest.mark.parametrize("known", [True, False])
    def test_the_newest_within_the_bounds_are_kept(
        self, run: Run, known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows, bytes and age; junk that names no webhook of ours pushes out only junk."""
        bounds = replace(BOUNDS[known], rows=4, bytes=100)
        monkeypatch.setitem(BOUNDS, known, bounds)
        other = stranger(77, known=not known)
        run(lambda store: store.webhook_keys.add_rejected([other]))
        some = [stranger(each, known=known) for each in range(6)]
        run(lambda store: store.webhook_keys.add_rejected(some))
        assert self.kept(run) == [77, 2, 3, 4, 5]
        run(lambda store: store.webhook_keys.add_rejected([stranger(6, known=known, size=80)]))
        assert self.kept(run) == [77, 4, 5, 6]
        old = stranger(7, known=known, at=RECEIVED_AT - bounds.age_ms * 2)
        run(lambda store: store.webhook_keys.add_rejected([old]))
        assert 7 not in self.kept(run)

    def test_the_bodies_are_not_read_to_find_what_to_delete(self, run: Run) -> None:
        """Nor to count: there may be 64 MiB of them, and more come every second."""
        works: list[Callable[[Store], object]] = [
            lambda store: store.webhook_keys.add_rejected([]),
            lambda store: store.webhook_keys.count_rejected(5, known=True),
            lambda store: store.webhook_keys.count_rejected(5),
        ]
        reads = re.compile(r"(COVERING INDEX|Index Only Scan \w+ ?\w*) logto_rejected_kept")
        for work in works:
            for plan in run(partial(explain, work=work)):
                assert reads.search(plan), plan

    def test_a_key_that_is_replaced_ends_after_the_overlap(self, run: Run) -> None:
        """Another webhook's doesn't; one that ends sooner keeps its end."""
        told = [
            WebhookKey(webhook_id="a", key="first-key-0123456789", learnt_at=1),
            WebhookKey(webhook_id="b", key="other-key-0123456789", learnt_at=2),
            WebhookKey(webhook_id="a", key="second-key-0123456789", learnt_at=3),
            WebhookKey(webhook_id="a", key="third-key-0123456789", learnt_at=4),
        ]
        for each in told:
            run(lambda store, each=each: store.webhook_keys.learn([each]))  # type: ignore[misc]
        learnt = run(lambda store: store.webhook_keys.learnt())
        assert [(each.key, each.until) for each in learnt] == [
            ("first-key-0123456789", 3 + OVERLAP_MS),
            ("other-key-0123456789", None),
            ("second-key-0123456789", 4 + OVERLAP_MS),
            ("third-key-0123456789", None),
        ]

    def test_a_late_answer_does_not_bring_back_a_key(self, run: Run) -> None:
        """Logto was asked before the key was rotated, and answered after that."""

        def learn(
            key: str, at: int, until: int | None = None, overlap_ms: int | None = None
        ) -> None:
            learnt = WebhookKey(webhook_id="a", key=key, learnt_at=at, until=until)
            run(lambda store: store.webhook_keys.learn([learnt], overlap_ms))

        learn("first-key-0123456789", 1)
        learn("second-key-0123456789", 5, overlap_ms=0)
        learn("first-key-0123456789", 4)
        learnt = run(lambda store: store.webhook_keys.learnt())
        assert {each.key: each.until for each in learnt} == {
            "first-key-0123456789": 5,
            "second-key-0123456789": None,
        }
        learn("third-key-0123456789", 7)
        learn("fourth-key-0123456789", 9, overlap_ms=0)  # the leaked key may be any before it
        learnt = run(lambda store: store.webhook_keys.learnt())
        assert {each.key: each.until for each in learnt} == {
            "first-key-0123456789": 5,
            "second-key-0123456789": 9,
            "third-key-0123456789": 9,
            "fourth-key-0123456789": None,
        }

    def test_keys_that_are_stored_are_not_written_again(self, run: Run) -> None:
        """Of thousands, only those that changed; and none is searched for in the whole table."""

        def ask(at: int, rotated: int) -> list[WebhookKey]:
            return [
                WebhookKey(
                    webhook_id=f"h{n}", key=f"key-{n}-{n < rotated}-0123456789", learnt_at=at
                )
                for n in range(2_000)
            ]

        def learn(store: Store, told: list[WebhookKey]) -> list[Any]:
            """Learn keys, and return the statements and the parameters."""
            with noting(store.connection) as ran:
                store.webhook_keys.learn(told)
            return ran

        run(lambda store: learn(store, ask(1, 0)))
        assert len(run(lambda store: learn(store, ask(2, 0)))) == 1  # it reads
        ran = run(lambda store: learn(store, ask(3, 2)))
        assert len(ran) == 2
        changed = [key for key in run(lambda store: store.webhook_keys.learnt()) if key.until]
        assert {key.webhook_id: key.until for key in changed} == dict.fromkeys(
            ("h0", "h1"), 3 + OVERLAP_MS
        )
        assert len(run(lambda store: learn(store, ask(4, 2)))) == 1
        [plan] = run(lambda store: explain(store, lambda s: s.webhook_keys.forget(["h7"])))
        assert "logto_keys_webhook" in plan

    def test_two_webhooks_may_have_the_same_key(self, run: Run) -> None:
        """It is stored with one of them, and ends when that has another one."""
        told = [
            WebhookKey(webhook_id=webhook_id, key="the-same-key-0123456789", learnt_at=1)
            for webhook_id in ("a", "b")
        ]
        for _ in range(2):
            run(lambda store: store.webhook_keys.learn(told))
            assert run(lambda store: store.webhook_keys.learnt()) == told[1:]
        new = [
            WebhookKey(webhook_id=webhook_id, key=f"key-of-{webhook_id}-0123456789", learnt_at=2)
            for webhook_id in ("a", "b")
        ]
        run(lambda store: store.webhook_keys.learn(new))
        ends = {key.key: key.until for key in run(lambda store: store.webhook_keys.learnt())}
        assert ends == {told[0].key: 2 + OVERLAP_MS} | {key.key: None for key in new}

    def test_when_a_key_was_used_is_kept_by_its_fingerprint(self, run: Run) -> None:
        """Of configured ones, too, of which nothing else is kept."""
        marks = {fingerprint("configured"): 5, fingerprint("learnt-key-0123456789"): 6}
        assert run(lambda store: store.webhook_keys.used(marks)) == marks
        run(
            lambda store: store.webhook_keys.learn(
                [WebhookKey(webhook_id="a", key="learnt-key-0123456789", learnt_at=1)]
            )
        )
        more = {fingerprint("learnt-key-0123456789"): 9}
        assert run(lambda store: store.webhook_keys.used(more)) == marks | more
        assert [each.key for each in run(lambda store: store.webhook_keys.learnt())] == [
            "learnt-key-0123456789"
        ]

    def test_what_is_no_key_is_neither_kept_nor_returned(self, run: Run) -> None:
        """Also if a row that another release wrote has it: anybody can sign with an empty key."""
        for key in ("", "short", '"quoted-0123456789"', "KEY=0123456789abcdef"):
            told = WebhookKey(webhook_id="a", key=key, learnt_at=1)
            run(lambda store, told=told: store.webhook_keys.learn([told]))  # type: ignore[misc]
        assert run(lambda store: store.webhook_keys.learnt()) == []

    def kept(self, run: Run) -> list[int]:
        strangers = run(lambda store: store.webhook_keys.list_rejected(0, 100))
        return [int(each.signature, 16) for each in strangers]


def test_the_webhook_of_a_body_is_named_at_its_top_level() -> None:
    """Not in customData, wherever that stands, and only as a text."""
    assert read_webhook_id(make.user_created().body) is not None
    inner = b'"data":{"customData":{"hookId":"inner"}}'
    for body in (b'{%b,"hookId":"real-1"}' % inner, b'{"hookId" : "real-1",%b}' % inner):
        assert read_webhook_id(body) == "real-1"
    assert read_webhook_id(b"{%b}" % inner) is None
    for junk in (b"", b"{}", b'"hookId"', b'{"hookId": 7}', b'"hookId":"' + b"x" * 65 + b'"'):
        assert read_webhook_id(junk) is None
    assert read_webhook_id(b'{"x":' * 100_000) is None


@pytest.mark.process
def test_a_rotation_with_credentials_loses_nothing(tmp_path: Path) -> None:
    """500 deliveries around it, junk in between: answered 401, proved once Logto told the key."""

    async def live() -> None:
        async with FakeLogto() as logto, serving(tmp_path, logto) as service:
            webhook = logto.add_hook(f"{service.url}/api/webhooks/logto")
            await create(logto, 150)
            rotated = logto.rotate_signing_key(webhook["id"])
            known, unknown = webhook["id"], "nobodys"
            await asyncio.gather(
                create(logto, 250),
                junk(service, JUNK // 2, webhook=unknown),
                junk(service, JUNK // 2, webhook=known),
            )
            await create(logto, 100)
            assert rotated["signingKey"] != webhook["signingKey"]
            await eventually(
                lambda: count(service, "logto_users"), lambda rows: rows == 500, seconds=60
            )
            assert await count(service, "logto_deliveries") == 500
            kept = await count(service, "logto_rejected")
            assert 0 < kept <= sum(each.rows for each in BOUNDS.values())

    asyncio.run(live())


@pytest.mark.process
def test_without_credentials_the_key_is_added_later(tmp_path: Path) -> None:
    """What came meanwhile is proved when the service starts with it; junk isn't, ever."""

    async def live() -> None:
        async with FakeLogto() as logto:
            async with plain(tmp_path, logto.signing_key) as service:
                webhook = logto.add_hook(f"{service.url}/api/webhooks/logto")
                await create(logto, 200)
                rotated = logto.rotate_signing_key(webhook["id"])
                await create(logto, 300)
                await junk(service, 300, webhook=webhook["id"])
                await eventually(lambda: count(service, "logto_rejected"), lambda rows: rows == 600)
                assert await count(service, "logto_users") == 200
            keys = f"{rotated['signingKey']},{webhook['signingKey']}"
            async with plain(tmp_path, keys) as service:
                await eventually(lambda: count(service, "logto_users"), lambda rows: rows == 500)
                assert await count(service, "logto_rejected") == 300

    asyncio.run(live())


@pytest.mark.process
def test_a_key_is_rotated_while_deliveries_come(tmp_path: Path) -> None:
    """What was signed before and after arrives, without credentials where it is received; the old
    key ends after the overlap, be it configured."""

    async def main() -> None:
        async with FakeLogto() as logto, plain(tmp_path, logto.signing_key) as service:
            webhook = logto.add_hook(f"{service.url}/api/webhooks/logto")
            await create(logto, 100)

            async def rotate(*words: str) -> dict[str, Any]:
                settings = credentials(logto) | {"LOGTO_WEBHOOK_SIGNING_KEY": logto.signing_key}
                words = ("endpoint", "rotate", *words, "--json")
                done = await asyncio.to_thread(command, *words, folder=tmp_path, **settings)
                assert done.returncode == 0, done.stderr
                return dict(msgspec.json.decode(done.stdout))

            told, _ = await asyncio.gather(rotate(), create(logto, 300))
            new, old = told["signing_key"], webhook["signingKey"]
            assert told["webhook"] == webhook["id"]
            assert logto.hooks[0]["signingKey"] == new
            await create(logto, 100)
            await eventually_count(service, 500)
            late = make.user_created(key=old)
            assert service.post(late).status_code == 200
            again = await rotate(webhook["id"], "--overlap", "0s")
            assert again["signing_key"] == logto.hooks[0]["signingKey"]
            await create(logto, 1)  # which makes the service look for keys
            await eventually_count(service, 502)
            assert service.post(make.user_created(key=new)).status_code == 401

    asyncio.run(main())


async def eventually_count(service: Service, users: int) -> None:
    """Wait until there are so many users, or fail with what the service has."""
    try:
        await eventually(lambda: count(service, "logto_users"), lambda rows: rows == users)
    except AssertionError as error:
        states = "SELECT state, result, count(*) FROM logto_deliveries GROUP BY 1, 2"
        for query in (states, "SELECT count(*) FROM logto_rejected"):
            error.add_note(str(await asyncio.to_thread(service.rows, query)))
        error.add_note(service.log[-5_000:])
        raise


async def create(logto: FakeLogto, number: int) -> None:
    for _ in range(number):
        logto.create_user()
    await logto.settle()


@asynccontextmanager
async def plain(folder: Path, key: str) -> AsyncIterator[Service]:
    """`serve` without credentials, beside the event loop on which the Logto answers."""
    service = await asyncio.to_thread(Service, folder, port=0, LOGTO_WEBHOOK_SIGNING_KEY=key)
    await asyncio.to_thread(service.__enter__)
    try:
        yield service
    finally:
        await asyncio.to_thread(service.__exit__, None, None, None)


async def junk(service: Service, number: int, webhook: str) -> None:
    """Requests of the right shape, signed with keys that nobody has."""
    rng = random.Random(1)
    async with httpx2.AsyncClient() as client:
        for start in range(0, number, 20):
            some = [_forged(rng, start + each, webhook) for each in range(20)]
            answers = await asyncio.gather(*(_post(client, service, each) for each in some))
            assert set(answers) == {401}


def _forged(rng: random.Random, number: int, webhook: str) -> SignedRequest:
    payload = {"event": "User.Created", "n": number, "hookId": webhook}
    return sign_request(payload, f"guess {rng.random()}")


async def _post(client: httpx2.AsyncClient, service: Service, delivery: SignedRequest) -> int:
    url = f"{service.url}/api/webhooks/logto"
    answer = await client.post(url, content=delivery.body, headers=dict(delivery.headers))
    return answer.status_code


async def count(service: Service, table: str) -> int:
    """How many rows a table has."""
    [(rows,)] = await asyncio.to_thread(service.rows, f"SELECT count(*) FROM {table}")
    return int(rows)
