"""An alarm when the flow of deliveries stops; and none where little happens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from logto_webhooks.arrivals import (
    DAY_MS,
    LEARNT_MS,
    LEAST_MS,
    Flow,
    FlowMonitor,
    find_silence,
    record_flow,
)
from logto_webhooks.clock import SystemClock
from logto_webhooks.database import open_database
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, Origin
from logto_webhooks.instrumentation import FlowResumed, FlowStopped, TelemetryEvent
from logto_webhooks.signing_keys import RejectedRequest
from logto_webhooks.testing import FrozenClock, make
from tests.integration.conftest import Run
from tests.support.service import Service
from tests.support.stores import RECEIVED_AT, delivery
from tests.support.waiting import until

HOUR_MS = 3_600_000


@given(gaps=st.lists(st.integers(0, 3 * DAY_MS)), quiet_ms=st.integers(0, 10 * DAY_MS))
def test_what_was_usual_before_is_no_alarm(gaps: list[int], quiet_ms: int) -> None:
    """Nor is anything before a weekend was seen; twice the longest gap is one."""
    flow = Flow(began=0, last=LEARNT_MS, gaps=tuple(gaps))
    found = find_silence(flow, LEARNT_MS + quiet_ms)
    usual = max(gaps, default=0)
    assert (found is not None) == (quiet_ms > max(LEAST_MS, 2 * usual))
    young = replace(flow, began=1)
    assert find_silence(young, LEARNT_MS + quiet_ms) is None
    assert (find_silence(young, LEARNT_MS + quiet_ms, HOUR_MS) is not None) == (quiet_ms > HOUR_MS)


def test_all_rejected_is_an_alarm_at_once() -> None:
    """Before anything ever came, too: then the key was never right."""
    assert find_silence(Flow(rejected=4), 0) is None
    found = find_silence(Flow(rejected=5), 0)
    assert found
    assert found.why == "rejected"


def flow_now(store: Store) -> Flow:
    return record_flow(store, RECEIVED_AT + 100 * DAY_MS)


def test_a_delivery_of_the_future_hides_no_silence(run: Run) -> None:
    """When the receiver's clock is right again."""
    for at in (RECEIVED_AT + DAY_MS, RECEIVED_AT):
        add(run, at)
        flow = run(lambda store: record_flow(store, RECEIVED_AT + HOUR_MS))
    assert flow.last == RECEIVED_AT


@pytest.mark.slow
def test_the_flow_is_learnt_from_the_inbox(run: Run) -> None:
    """The longest gap of each day, for two weeks; what Logto's log brought back is no flow."""
    assert run(flow_now) == Flow()
    for day in range(20):
        for hour in (8, 9, 17):
            add(run, RECEIVED_AT + day * DAY_MS + hour * HOUR_MS)
            run(flow_now)
    flow = run(flow_now)
    assert flow.began == RECEIVED_AT + 8 * HOUR_MS
    assert flow.last == RECEIVED_AT + 19 * DAY_MS + 17 * HOUR_MS
    assert flow.gaps == (15 * HOUR_MS,) * 14
    add(run, RECEIVED_AT + 25 * DAY_MS, origin="log")
    assert run(flow_now) == flow
    assert find_silence(flow, (flow.last or 0) + 30 * HOUR_MS) is None
    assert find_silence(flow, (flow.last or 0) + 31 * HOUR_MS) is not None


@pytest.mark.slow
def test_a_gap_is_forgotten_after_two_weeks(run: Run) -> None:
    """Be there nothing on that day of the week ever after: an outage ended on a Saturday."""
    for day in (0, 5, *(each for each in range(6, 40) if each % 7 != 5)):
        add(run, RECEIVED_AT + day * DAY_MS)
        run(flow_now)
        gaps = run(flow_now).gaps
        assert (max(gaps, default=0) == 5 * DAY_MS) == (5 <= day < 19), day


def test_what_is_rejected_since_the_last_is_counted(run: Run) -> None:
    """Of webhooks that are known here; junk that names others is no alarm."""
    now = SystemClock().now()  # by the database's clock, old ones are deleted
    add(run, now)
    strangers = [_stranger(now + at, known) for at in (-1, 1, 2) for known in (True, False)]
    run(lambda store: store.webhook_keys.add_rejected(strangers))
    assert run(flow_now).rejected == 2


def test_it_is_told_once(tmp_path: Path) -> None:
    """And that deliveries come again; `status` knows, too."""

    async def main() -> None:
        database, clock = open_database(f"sqlite:///{tmp_path / 'a.db'}"), FrozenClock(RECEIVED_AT)
        told: list[TelemetryEvent] = []
        await database.migrate()
        watch = FlowMonitor(database.host, clock, told.append, 3600)

        async def came() -> None:
            await database.host.run(lambda store: store.add([_delivery(clock.now(), "webhook")]))
            await watch.look()

        await came()
        clock.tick(3601)
        await watch.look()
        await watch.look()
        assert (await database.host.read(lambda store: store.status())).silent_since == RECEIVED_AT
        await came()
        assert told == [FlowStopped("silent", 3601, 0), FlowResumed(3601)]
        assert (await database.host.read(lambda store: store.status())).silent_since is None
        await database.host.close()

    asyncio.run(main())


@pytest.mark.process
def test_a_service_says_it_at_start(tmp_path: Path) -> None:
    """It is ready all the same, and names the command that finds out why."""
    with Service(tmp_path) as service:
        assert service.http.get("/readyz").json() == {"ready": True}
        for _ in range(5):
            service.post(make.user_created(key="another"))
        until(lambda: bool(service.rows("SELECT 1 FROM logto_rejected")))
    with Service(tmp_path) as service:
        service.wait_for_log("all requests are rejected: find out why with logto-webhooks doctor")
        assert service.http.get("/readyz").json()["silence"]["why"] == "rejected"


def add(run: Run, at: int, origin: Origin = "webhook") -> None:
    run(lambda store: store.add([_delivery(at, origin)]))


def _delivery(at: int, origin: Origin) -> NewDelivery:
    return replace(delivery(make.user_created(at=at).body), received_at=at, origin=origin)


def _stranger(at: int, known: bool) -> RejectedRequest:
    return RejectedRequest(
        body=b"x", signature="0" * 64, received_at=at, webhook_id="h", known=known
    )
