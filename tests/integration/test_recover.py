"""What was lost comes back from Logto's own log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.clock import SystemClock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Checkpoint, Store
from logto_webhooks.errors import InvalidApiResponse, LogtoUnreachable
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.logto.errors import ApiReply
from logto_webhooks.reconcile import recover
from logto_webhooks.reconcile.recover import RecoverResult, Recovery
from logto_webhooks.samples import history
from logto_webhooks.samples.history import differences
from logto_webhooks.signing_keys import OVERLAP_MS, WebhookKey
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto, Faults
from tests.support import recorded
from tests.support.fake import Refusing, asking, behind_proxy, credentials, serving
from tests.support.service import Service, command, one_line
from tests.support.stores import (
    STORES,
    Copy,
    StoreKind,
    delivery,
    keys_of,
    memory_host,
    open_host,
)
from tests.support.waiting import until

Json = dict[str, Any]


class Lossy(Struct, frozen=True):
    """The recorded history of which 15 % were answered 500: what arrived, and what didn't."""

    arrived: list[bytes]
    lost: list[bytes]


def lossy() -> Lossy:
    log = [msgspec.json.decode(line, type=Json) for line in logged("lossy")]
    failed = {
        msgspec.json.encode(entry["payload"]["hookRequest"]["body"], order="sorted")
        for entry in log
        if entry["payload"]["result"] != "Success"
    }
    bodies = [each.body for each in history.load("lossy").deliveries]
    lost = [
        body
        for body in bodies
        if msgspec.json.encode(msgspec.json.decode(body), order="sorted") in failed
    ]
    return Lossy([body for body in bodies if body not in lost], lost)


def logged(name: str) -> list[bytes]:
    """The lines of a recorded log, newest first."""
    return (recorded.FOLDER / "logs" / f"{name}.jsonl").read_bytes().splitlines()


def fake(name: history.Name) -> FakeLogto:
    return FakeLogto.from_history(
        name, log=[msgspec.json.decode(line, type=Json) for line in logged(name)]
    )


def client(logto: FakeLogto) -> ManagementClient:
    return ManagementClient(
        logto.url, logto.app_id, logto.app_secret, now=FrozenClock(), budget=10_000
    )


async def recovered(
    logto: FakeLogto,
    host: TransactionRunner,
    since: int | None = 0,
    dry_run: bool = False,
    key: str | None = None,
) -> RecoverResult:
    api = client(logto)
    try:
        keys = [key or logto.signing_key]
        return await Recovery(api, host, FrozenClock(), keys).run(since, dry_run)
    finally:
        await api.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_what_was_answered_500_comes_back(kind: StoreKind, tmp_path: Path) -> None:
    """All of it, and then the copy equals Logto but for what is in doubt."""

    async def live() -> None:
        told, host = lossy(), open_host(kind, tmp_path)
        copy = Copy(host)
        await copy.take(told.arrived)
        async with fake("lossy") as logto:
            found = await recovered(logto, host)
        assert len(told.lost) > 50
        assert found.causes == {"answered 5xx": len(told.lost)}
        assert found.recovered == len(told.lost)
        assert found.doubts == []
        while await copy.worker.step():
            pass
        known = await copy.known(keys_of(told.arrived + told.lost))
        final = history.load("lossy").final
        left = differences(final, known.users, known.organizations, known.waiting)
        assert [each for each in left if not each.doubtful] == []
        status = await host.read(lambda store: store.status())
        assert status.recovered == len(told.lost)
        await host.close()

    asyncio.run(live())


class Short(ManagementClient):
    """A client that gets an empty second page, as from a proxy with an old answer."""

    async def _ask(self, path: str, **params: int) -> ApiReply:
        reply = await super()._ask(path, **params)
        return replace(reply, content=[]) if params.get("page") == 2 else reply


def test_a_page_without_its_entries_is_no_end_of_the_log(tmp_path: Path) -> None:
    """What was read is stored, and the next run reads that stretch again."""

    async def live(host: TransactionRunner) -> None:
        async with fake("people") as logto:
            short = Short(
                logto.url, logto.app_id, logto.app_secret, now=FrozenClock(), budget=10_000
            )
            run = Recovery(short, host, FrozenClock(), [logto.signing_key]).run(0)
            with pytest.raises(InvalidApiResponse, match="lists 100 of"):
                await run
            await short.close()
            await recovered(logto, host)
        status = await host.read(lambda store: store.status())
        assert sum(status.deliveries.values()) == len(logged("people"))

    on_sqlite(live, tmp_path)


def test_a_dry_run_only_counts(tmp_path: Path) -> None:
    """Nothing is stored, and nothing is noted as done."""

    async def live(host: TransactionRunner) -> None:
        async with fake("people") as logto:
            found = await recovered(logto, host, dry_run=True)
            assert found.recovered == found.entries == len(logged("people"))
        status = await host.read(lambda store: store.status())
        assert sum(status.deliveries.values()) == 0
        assert status.complete_up_to is None

    on_sqlite(live, tmp_path)


def test_the_next_look_begins_where_the_last_one_ended(tmp_path: Path) -> None:
    """Less the overlap: entries are stamped when their attempt ended."""

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            logto.add_hook("http://127.0.0.1:9/webhook")
            logto.faults = Faults(lost=1)
            ends = []
            for wave in range(2):
                for _ in range(3):
                    logto.create_user()
                await logto.settle()
                found = await recovered(logto, host, since=None)
                assert found.recovered == 3
                assert found.causes == {"connection refused": 3}, wave
                ends.append(found.until)
            assert found.until - found.since < recover.FIRST_MS
            status = await host.read(lambda store: store.status())
            assert status.complete_up_to == max(ends), "the second can be dated some ms earlier"
            assert status.recovered == 6

    on_sqlite(live, tmp_path)


def test_a_webhook_whose_key_was_learned_is_read(tmp_path: Path) -> None:
    """It sends rarely, and the settings don't have its new key."""

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook", signing_key="another-key-of-32")
            learnt = WebhookKey(webhook_id=webhook["id"], key=webhook["signingKey"], learnt_at=1)
            logto.populate_log(webhook["id"], long_log(3, logto_now()))
            assert (await recovered(logto, host, since=None)).webhooks == []
            await host.run(lambda store: store.webhook_keys.learn([learnt]))
            found = await recovered(logto, host, since=None)
            assert (found.webhooks, found.recovered) == ([webhook["id"]], 3)

    on_sqlite(live, tmp_path)


def test_a_later_start_leaves_the_rest_to_the_next_run(tmp_path: Path) -> None:
    """What a run skipped because of its `since` isn't complete."""

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")
            now = logto_now()
            logto.populate_log(webhook["id"], long_log(3, now - 3_600_000))
            for since in (now - 60_000, now - 30_000):  # on a new database, and later
                found = await recovered(logto, host, since=since)
                assert found.recovered == 0
                assert "run `recover` without --since" in found.doubts[0]
                status = await host.read(lambda store: store.status())
                assert status.complete_up_to is None
            assert (await recovered(logto, host, since=None)).recovered == 3
            reached = (await host.read(lambda store: store.status())).complete_up_to
            assert (await recovered(logto, host, since=logto_now() + 1_000)).doubts
            assert (await host.read(lambda store: store.status())).complete_up_to == reached
            earlier = await recovered(logto, host, since=now - 7_200_000)
            assert earlier.recovered == 0
            status = await host.read(lambda store: store.status())
            assert (status.complete_up_to or 0) >= (reached or now)

    on_sqlite(live, tmp_path)


@pytest.mark.slow
def test_a_kill_costs_only_the_stretch_in_hand(tmp_path: Path) -> None:
    """Five times in the middle of a long log; nothing is missing, and what was done stays done."""
    entries = 3_000

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")
            logto.populate_log(webhook["id"], long_log(entries, logto_now()))
            starts = []
            for number in range(5):
                with pytest.raises(LogtoUnreachable):
                    await killed_after(logto, host, pages=7 + number)
                reached = await host.read(
                    lambda store: store.checkpoint(f"recover:{webhook['id']}")
                )
                starts.append(reached.at if reached else 0)
            assert starts == sorted(starts)
            assert starts[-1] > 0
            found = await recovered(logto, host, since=None)
            assert found.entries < entries
        status = await host.read(lambda store: store.status())
        assert sum(status.deliveries.values()) == entries

    on_sqlite(live, tmp_path)


def test_only_webhooks_that_point_here_are_asked(tmp_path: Path) -> None:
    """By key, by a delivery of theirs that was accepted, or by URL."""
    url = "https://app.example.com/api/webhooks/logto"

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            other = {"signing_key": "somebody else's"}
            by_key = logto.add_hook("http://127.0.0.1:9/a")
            by_url = logto.add_hook(f"{url}/", **other)
            by_delivery = logto.add_hook("http://127.0.0.1:9/c", **other)
            logto.add_hook("http://127.0.0.1:9/d", **other)
            body = msgspec.json.encode({"event": "PostSignIn", "hookId": by_delivery["id"]})
            await host.run(lambda store: store.add([delivery(body)]))
            api = client(logto)
            found = await Recovery(api, host, FrozenClock(), [logto.signing_key], url).run()
            assert set(found.webhooks) == {by_key["id"], by_url["id"], by_delivery["id"]}
            nobody = await Recovery(api, memory_host(), FrozenClock(), []).run()
            assert "no webhook of this Logto leads here" in nobody.doubts[0]
            await api.close()

    on_sqlite(live, tmp_path)


def test_an_odd_entry_stops_nothing(tmp_path: Path) -> None:
    """It is told, and the others come back."""
    odd: list[Any] = [{"payload": None}, {"payload": []}, {}, {"payload": {"hookRequest": 5}}]

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")
            now = logto_now()
            broken = [{"id": str(n), "createdAt": now - 500} | each for n, each in enumerate(odd)]
            logto.populate_log(webhook["id"], [*broken, *long_log(3, now)])
            found = await recovered(logto, host, since=None)
            assert found.recovered == 3
            assert found.doubts == ["an entry of the log contains no delivery"]

    on_sqlite(live, tmp_path)


def test_a_log_that_was_cut_off_is_told(tmp_path: Path) -> None:
    """It lacks what the inbox has: so it may lack more. Test payloads are in no log."""

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")["id"]
            now = logto_now()

            async def got(at: int, **more: Any) -> None:
                body = {"event": "Role.Created", "hookId": webhook, "createdAt": stamp(at), **more}
                await host.run(lambda store: store.add([delivery(msgspec.json.encode(body))]))

            await got(now - 7_200_000, path="/fake-path/:id", params={"id": "fake-id"})
            assert (await recovered(logto, host, since=None)).doubts == []
            logto.populate_log(webhook, long_log(3, now - 1_000))
            await got(now - 3_600_000)
            [doubt] = (await recovered(logto, host, since=now - 7_200_000)).doubts
            assert "earlier failures are unknown" in doubt
            assert webhook in doubt

    on_sqlite(live, tmp_path)


@pytest.mark.parametrize("ahead_ms", [86_400_000, 60_000, -60_000])
def test_a_wrong_date_holds_back_no_later_look(ahead_ms: int, tmp_path: Path) -> None:
    """Nor does it hide anything from the look that got it."""

    async def live(host: TransactionRunner) -> None:
        dates = [ahead_ms]
        async with FakeLogto() as logto, behind_proxy(logto, lambda: dates[-1]) as api:
            logto.add_hook("http://127.0.0.1:9/webhook")
            logto.faults = Faults(lost=1)
            recovery = Recovery(api, host, SystemClock(), [logto.signing_key])
            for _ in range(2):
                logto.create_user()
                await logto.settle()
                found = await recovery.run()
                assert (found.recovered, found.doubts) == (1, [])
                assert found.until <= logto_now()
                dates.append(0)
            status = await host.read(lambda store: store.status())
            assert status.recovered == 2
            assert found.until <= (status.complete_up_to or 0) <= logto_now()

    on_sqlite(live, tmp_path)


def test_a_checkpoint_in_the_future_counts_for_nothing(tmp_path: Path) -> None:
    """It is told, and replaced."""

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")["id"]
            logto.populate_log(webhook, long_log(3, logto_now()))
            for name in ("recover", f"recover:{webhook}"):
                future = Checkpoint(logto_now() + 86_400_000, 5)
                await host.run(partial(_save, name, future))
            found = await recovered(logto, host, since=None)
            assert found.recovered == 3
            [doubt] = found.doubts
            assert "in the future" in doubt
            status = await host.read(lambda store: store.status())
            assert (status.complete_up_to, status.recovered) == (found.until, 8)
            assert (await recovered(logto, host, since=None)).doubts == []

    on_sqlite(live, tmp_path)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_hides_nothing(
    restarted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Logto logs soon after has dates that were read already. By the next look, the clock has
    passed them again; another process doesn't know that it was set back."""
    clock, passed_s = FrozenClock(), 0.0
    monkeypatch.setattr(recover, "monotonic", lambda: passed_s)

    def wait(seconds: float) -> None:
        nonlocal passed_s
        clock.tick(seconds)
        passed_s += seconds

    async def live(host: TransactionRunner) -> None:
        async with FakeLogto(now=clock.now) as logto, asking(logto) as api:
            logto.add_hook("http://127.0.0.1:9/webhook")
            logto.faults = Faults(lost=1)
            recovery = Recovery(api, host, clock, [logto.signing_key])
            await recovery.run()
            clock.tick(-60)
            wait(1)
            logto.create_user()
            await logto.settle()
            wait(300)
            if restarted:
                recovery = Recovery(api, host, clock, [logto.signing_key])
            assert (await recovery.run()).recovered == 1

    on_sqlite(live, tmp_path)


def _save(name: str, reached: Checkpoint, store: Store) -> None:
    store.save_checkpoint(name, reached)


def on_sqlite(live: Callable[[TransactionRunner], Coroutine[Any, Any, None]], folder: Path) -> None:
    async def run() -> None:
        host = open_host("sqlite", folder)
        try:
            await live(host)
        finally:
            await host.close()

    asyncio.run(run())


async def killed_after(logto: FakeLogto, host: TransactionRunner, pages: int) -> None:
    """Recover, but die when so many pages of the log were read."""

    class Dying(ManagementClient):
        async def log(self, webhook_id: str, start: int, end: int) -> Any:
            nonlocal pages
            async for page in super().log(webhook_id, start, end):
                pages -= 1
                if pages < 0:
                    raise LogtoUnreachable(endpoint=logto.url, problem="killed")
                yield page

    api = Dying(logto.url, logto.app_id, logto.app_secret, now=FrozenClock(), budget=10_000)
    try:
        await Recovery(api, host, FrozenClock(), [logto.signing_key]).run()
    finally:
        await api.close()


def logto_now() -> int:
    return time.time_ns() // 1_000_000


def long_log(count: int, now: int) -> Sequence[Json]:
    """Entries of the last twelve hours, the newest first."""
    gap = 43_200_000 // count
    made = []
    for number in range(count):
        at = now - number * gap - 1000
        body = {"event": "Role.Created", "createdAt": stamp(at), "n": number}
        payload = {"result": "Error", "error": "timed out", "hookRequest": {"body": body}}
        made.append({"id": str(number), "payload": payload, "createdAt": at})
    return made


def stamp(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat()


@pytest.mark.process
def test_the_command_brings_back_and_status_tells(tmp_path: Path) -> None:
    """A dry run first; then all is there, once."""

    async def run(*arguments: str, **environment: str) -> Json:
        done = await asyncio.to_thread(command, *arguments, folder=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        found: Json = msgspec.json.decode(done.stdout)
        return found

    async def live() -> None:
        async with fake("lossy") as logto:
            given = credentials(logto)
            await asyncio.to_thread(command, "migrate", folder=tmp_path)
            since = ("--since", "2026-11-24T00:00Z", "--json")
            dry = await run("recover", "--dry-run", *since, **given)
            found = await run("recover", *since, **given)
            assert dry["recovered"] == found["recovered"] == len(logged("lossy"))
            assert found["causes"]["answered 5xx"] == len(lossy().lost)
            assert (await run("recover", *since, **given))["recovered"] == 0
            status = await run("status", "--json")
            assert status["recovered"] == found["recovered"]
            assert status["deliveries"]["pending"] == found["recovered"]

    asyncio.run(live())


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--since", "yesterday"], "neither a time such as"),
        (["--app-secret", "wrong"], "LOGTO_M2M_APP_SECRET"),
        (["--endpoint", "http://127.0.0.1:9"], "Can't reach Logto at http://127.0.0.1:9"),
        (["--endpoint", "logto.example.com"], "Logto's address"),
        (["--api-resource", "https://nowhere/api"], "LOGTO_WEBHOOKS_API_RESOURCE"),
    ],
)
def test_what_is_wrong_is_one_line(options: list[str], says: str, tmp_path: Path) -> None:
    """That names what to do, and shows no secret."""

    async def live() -> None:
        async with FakeLogto() as logto:
            given = credentials(logto)
            await asyncio.to_thread(command, "migrate", folder=tmp_path)
            done = await asyncio.to_thread(command, "recover", *options, folder=tmp_path, **given)
            assert done.returncode == 2
            *warned, error = done.stderr.splitlines()
            assert error.startswith("error: ")
            assert says in error
            # A secret on a command line is warned of besides.
            assert len(warned) == options.count("--app-secret")
            assert all("all users of this machine can see" in line for line in warned)
            assert logto.app_secret not in done.stderr

    asyncio.run(live())


@pytest.mark.process
def test_without_credentials_it_says_which(tmp_path: Path) -> None:
    """All three."""
    command("migrate", folder=tmp_path)
    done = command("recover", folder=tmp_path)
    assert done.returncode == 2
    assert "LOGTO_M2M_APP_ID" in one_line(done.stderr)


@pytest.mark.process
def test_serve_brings_back_what_it_missed(tmp_path: Path) -> None:
    """What was sent while it was down is there soon after its start."""

    async def live() -> None:
        async with FakeLogto() as logto:
            logto.add_hook("http://127.0.0.1:9/webhook")
            ana = logto.create_user(primaryEmail="ana@example.com")
            await logto.settle()
            async with serving(tmp_path, logto) as service:
                line = await asyncio.to_thread(service.wait_for_log, "compared the inbox")
                assert "recovered=1" in line
                await asyncio.to_thread(until, lambda: found(tmp_path, ana["id"]))

    asyncio.run(live())


def found(folder: Path, user_id: str) -> bool:
    return command("users", user_id, folder=folder).returncode == 0


@pytest.mark.process
def test_serve_says_when_logto_cannot_be_asked(tmp_path: Path) -> None:
    """And goes on receiving."""
    given = {
        "LOGTO_ENDPOINT": "http://127.0.0.1:9",
        "LOGTO_M2M_APP_ID": "x",
        "LOGTO_M2M_APP_SECRET": "a-secret",
    }
    with Service(tmp_path, port=0, **given) as service:
        assert "a-secret" not in service.wait_for_log("Logto's API can't be used")
        assert service.http.get("/healthz").status_code == 200


@pytest.mark.parametrize("kind", STORES)
def test_keys_are_forgotten_with_their_webhooks(kind: StoreKind, tmp_path: Path) -> None:
    """A webhook is deleted because its key leaked; or its key was changed while nothing came."""
    now = FrozenClock().now()
    keys = {name: f"{name}-key-0123456789" for name in ("kept", "changed", "deleted", "expiring")}

    def read(store: Store) -> dict[str, int | None]:
        return {key.key: key.until for key in store.webhook_keys.learnt()}

    async def live() -> None:
        host = open_host(kind, tmp_path)
        async with FakeLogto(signing_key="settings-key-0123456789") as logto:
            url = "http://127.0.0.1:9/api/webhooks/logto"
            logto.add_hook(url)
            ids = {name: logto.add_hook(url, signing_key=key)["id"] for name, key in keys.items()}
            learnt = [
                WebhookKey(
                    webhook_id=ids[name],
                    key=key,
                    learnt_at=1,
                    until=now + 60_000 if name == "expiring" else None,
                )
                for name, key in keys.items()
            ]
            await host.run(lambda store: store.webhook_keys.learn(learnt))
            body = {"event": "PostSignIn", "createdAt": "2026-01-01T00:00:00.000Z"}
            await Copy(host).take([msgspec.json.encode(body | {"hookId": ids["kept"]})])
            new_key = logto.rotate_signing_key(ids["changed"])["signingKey"]
            logto.delete_hook(ids["deleted"])
            logto.delete_hook(ids["expiring"])
            await recovered(logto, host, dry_run=True)
            assert len(await host.read(read)) == 4
            await recovered(logto, host)
        untils = await host.read(read)
        end = untils.pop(keys["changed"])
        assert end is not None
        assert 0 <= end - now - OVERLAP_MS < 30_000
        assert untils == {keys["kept"]: None, new_key: None, keys["expiring"]: now + 60_000}
        async with FakeLogto(signing_key="of-another-logto-0123") as another:
            another.add_hook("http://127.0.0.1:9/elsewhere")
            await recovered(another, host, key="settings-key-0123456789")
        assert keys["kept"] in await host.read(read)
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("refused", [0, 1])
def test_a_log_that_cannot_be_read_holds_back_no_other(refused: int, tmp_path: Path) -> None:
    """Of two webhooks that lead here, Logto answers 500 about the log of one."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        async with FakeLogto() as logto, asking(logto, Refusing) as api:
            assert isinstance(api, Refusing)
            url = "http://127.0.0.1:9/api/webhooks/logto"  # refuses connections
            ids = [logto.add_hook(url)["id"] for _ in range(2)]
            logto.create_user(name="Ana")
            await logto.settle()
            api.refused = {f"hooks/{ids[refused]}"}
            recovery = Recovery(api, host, FrozenClock(), [logto.signing_key])
            with pytest.raises(LogtoUnreachable):
                await recovery.run()
            names = [f"recover:{webhook_id}" for webhook_id in ids]
            read = await host.read(lambda store: [store.checkpoint(name) for name in names])
            assert [checkpoint is None for checkpoint in read] == [refused == 0, refused == 1]
            [received] = await host.read(lambda store: store.recent(9))
            assert b'"event":"User.Created"' in received.body
        await host.close()

    asyncio.run(live())
