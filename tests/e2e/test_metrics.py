"""Metrics: what `serve` tells Prometheus, and what it does when the database can't be asked."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from logto_webhooks.database import open_database
from logto_webhooks.deliveries import DeliveryState, MappingStatus, Status
from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.instrumentation import (
    ApiUnavailable,
    DeliveryFailed,
    DeliveryStored,
    DeliverySynced,
    LogRecovered,
    NotStored,
    Reconciled,
    Refetched,
    RequestRefused,
    Resumed,
    Stalled,
    StoredLate,
    TelemetryEvent,
    prometheus,
)
from logto_webhooks.instrumentation.logs import fan_out
from logto_webhooks.instrumentation.prometheus import GAUGES, METRICS, Metrics
from logto_webhooks.runtime import Service as Wired
from logto_webhooks.settings import Settings
from logto_webhooks.testing import SIGNING_KEY, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import serving
from tests.support.service import HastyService, Service, wait_until_done
from tests.support.unmeasured import UNMEASURED
from tests.support.waiting import until

Samples = dict[str, float]


def samples(text: str) -> Samples:
    """Each sample by its name without the prefix, as `name` or `name{label=value}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            inside = ",".join(f"{key}={label}" for key, label in labels.items())
            short = name.removeprefix("logto_webhooks_")
            found[f"{short}{{{inside}}}" if inside else short] = value
    return found


def scraped(service: Service) -> Samples:
    answer = service.http.get("/metrics")
    assert answer.status_code == 200
    return samples(answer.text)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service")) as running:
        yield running


def test_what_came_and_what_became_of_it_is_counted(tmp_path: Path) -> None:
    """Stored, duplicate, refused and applied; how long it took; what the database holds."""
    with Service(tmp_path) as service:
        delivery = make.user_created(id="ana", email="ana@example.com")
        for each in (delivery, delivery, make.console_test(), make.user_created(key="another")):
            service.post(each)
        service.http.post("/wrong")
        wait_until_done(service)
        service.wait_for_log("outcome=test")
        told = scraped(service)
    expected = {
        "deliveries_stored_total{duplicate=false}": 2,
        "deliveries_stored_total{duplicate=true}": 1,
        "answer_seconds_count": 3,
        "requests_refused_total{code=invalid_signature}": 1,
        "requests_refused_total{code=not_found}": 1,
        "requests_refused_total{code=too_large}": 0,
        "deliveries_synced_total{outcome=applied}": 1,
        "deliveries_synced_total{outcome=test}": 1,
        "delivery_to_row_seconds_count": 2,
        "deliveries_failed_total": 0,
        "database_up": 1,
        "deliveries_pending": 0,
        "oldest_pending_seconds": 0,
        "deliveries_dead": 0,
        "records_doubtful": 0,
    }
    assert {name: told[name] for name in expected} == expected
    assert 0 < told["answer_seconds_sum"] < 60


def test_it_answers_in_the_format_that_is_asked_for(service: Service) -> None:
    """The plain one, or OpenMetrics; the plain one for what nobody can read."""
    plain = service.http.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    wanted = {"accept": "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5"}
    opened = service.http.get("/metrics", headers=wanted)
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    odd = service.http.get("/metrics", headers={"accept": "text/plain;version=x"})
    assert odd.headers["content-type"] == plain.headers["content-type"]


def test_no_text_of_a_delivery_or_a_request_is_in_it(service: Service) -> None:
    """However many odd ones come, there are as many samples as before."""
    before = scraped(service).keys()
    for name in ("Odd.Event", "Another.Odd"):
        service.post(make.event("User.Created", id="secret-id", event=name, name="secret-name"))
    service.http.post("/secret-path")
    until(lambda: scraped(service)["deliveries_synced_total{outcome=unknown}"] == 2)
    assert scraped(service).keys() == before
    text = service.http.get("/metrics").text
    assert "secret" not in text
    assert "Odd" not in text
    assert SIGNING_KEY not in text


def test_a_database_that_is_gone_fails_no_scrape(tmp_path: Path) -> None:
    """The counters are there, the gauges aren't; and what wasn't stored is counted."""
    with HastyService(tmp_path) as service:
        assert service.post(make.user_created()).status_code == 200
        wait_until_done(service)
        moved = service.file.rename(tmp_path / "moved.db")
        assert service.post(make.user_created()).status_code == 503
        told = scraped(service)
        assert told["database_up"] == 0
        assert "deliveries_pending" not in told
        assert told["deliveries_stored_total{duplicate=false}"] == 1
        assert told["deliveries_not_stored_total"] == 1
        moved.rename(service.file)
        until(lambda: scraped(service)["database_up"] == 1)
        assert scraped(service)["deliveries_pending"] == 0


def test_what_logto_told_is_counted(tmp_path: Path) -> None:
    """What its log brought back, what it was asked, what differed; and when that was."""

    async def live() -> Samples:
        async with FakeLogto() as logto:
            logto.add_hook("http://127.0.0.1:9/webhook")
            logto.create_user(primaryEmail="ana@example.com")
            await logto.settle()
            given = {"LOGTO_WEBHOOKS_RECONCILE_EVERY_S": "3600"}
            async with serving(tmp_path, logto, **given) as service:
                for line in ("compared the inbox", "compared all records"):
                    await asyncio.to_thread(service.wait_for_log, line)
                return await asyncio.to_thread(scraped, service)

    told = asyncio.run(live())
    assert told["deliveries_recovered_total"] == 1
    assert told["log_entries_total"] == 1
    assert told["records_compared_total"] == 1
    assert told["api_failures_total"] == 0
    assert told["complete_up_to_timestamp_seconds"] > 1e9
    assert told["reconciled_timestamp_seconds"] > 1e9


def test_an_application_that_mounts_the_webhook_has_no_metrics(tmp_path: Path) -> None:
    """Only `serve` gives them."""
    database = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    wired = Wired(Settings(signing_key=SIGNING_KEY), database, lambda _: None)

    async def ask() -> int:
        transport = httpx2.ASGITransport(wired.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/metrics")).status_code

    assert asyncio.run(ask()) == 404


REPORTS: list[tuple[TelemetryEvent, Samples]] = [
    (
        DeliveryStored(1, "e", "user:ana", True, 20),
        {"deliveries_stored_total{duplicate=true}": 1, "answer_seconds_sum": 0.02},
    ),
    (RequestRefused(413, "too_large", "", ""), {"requests_refused_total{code=too_large}": 1}),
    (NotStored(7, "gone"), {"deliveries_not_stored_total": 7}),
    (StoredLate(7), {"deliveries_stored_late_total": 7}),
    (
        DeliverySynced(1, "e", "user:ana", "stale", 3000),
        {"deliveries_synced_total{outcome=stale}": 1, "delivery_to_row_seconds_sum": 3},
    ),
    (
        DeliveryFailed(1, "e", None, "x", 1, 2.0),
        {"deliveries_failed_total": 1, "deliveries_given_up_total": 0},
    ),
    (
        DeliveryFailed(1, "e", None, "x", 8, None),
        {"deliveries_failed_total": 1, "deliveries_given_up_total": 1},
    ),
    (Stalled("gone", 1), {"stalls_total": 1}),
    (Resumed(), {}),
    (LogRecovered(9, 2, "x: 2", ""), {"log_entries_total": 9, "deliveries_recovered_total": 2}),
    (Refetched("user:ana", ("doubtful",)), {"refetches_total": 1}),
    (ApiUnavailable("gone", 1), {"api_failures_total": 1}),
    (Reconciled(5, 2, 1, "x: 1", ""), {"records_compared_total": 7, "records_drifted_total": 1}),
]


class Counted:
    """Metrics of a database that counts when it is asked, unless it fails or hangs."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asked = 0
        self.error: Exception | None = None
        self.hangs = False
        self.gate = asyncio.Event()
        self.counted_in: list[int] = []
        self.metrics = Metrics(self._ask, lambda: self.now, self._count_spooled)

    async def _ask(self) -> Status:
        self.asked += 1
        if self.error:
            raise self.error
        if self.hangs:
            await self.gate.wait()
        deliveries = dict.fromkeys((state.value for state in DeliveryState), 0)
        deliveries[DeliveryState.PENDING] = self.asked
        return Status(
            deliveries=deliveries,
            doubtful=2,
            refetch=3,
            oldest_pending_s=4,
            mappings=[
                MappingStatus(mapping="users", is_applied=False, waiting=5, owed=6, excluded=7)
            ],
        )

    def _count_spooled(self) -> int:
        self.counted_in.append(threading.get_ident())
        return 8

    async def scrape(self) -> Samples:
        text, _ = await self.metrics.scrape("")
        return samples(text.decode())

    def scraped(self) -> Samples:
        return asyncio.run(self.scrape())


@pytest.mark.parametrize(("report", "adds"), REPORTS, ids=lambda each: type(each).__name__)
def test_each_report_counts_where_it_should(report: TelemetryEvent, adds: Samples) -> None:
    """And nowhere else."""
    counted = Counted()
    before = counted.scraped()
    counted.metrics.observe(report)
    after = counted.scraped()
    changed = {name for name in after if after[name] != before[name]}
    assert {name: after[name] for name in adds} == adds
    assert {name for name in changed if "_bucket{" not in name and not name.endswith("_count")} == {
        name for name, value in adds.items() if value
    }
    assert bool(changed) == (type(report) not in UNMEASURED)


def test_every_metric_is_there_from_the_start() -> None:
    """A rate needs a sample before the first that counts; what is unknown is absent."""
    told = Counted().metrics
    text = asyncio.run(told.scrape(""))[0].decode()
    for metric in METRICS:
        assert f"\n{metric.full_name}{'_count' if metric.buckets else ''}" in text
    absent = {gauge.name for gauge in GAUGES if not re.search(rf"\n{gauge.full_name}[ {{]", text)}
    assert absent == {"complete_up_to_timestamp_seconds", "reconciled_timestamp_seconds"}


def test_mapped_tables_are_counted() -> None:
    """Each by its name."""
    scraped = Counted().scraped()
    names = (
        "mapped_rows_waiting",
        "mapped_rows_conflicting",
        "mapped_rows_owed",
        "mapped_rows_excluded",
        "mapping_applied",
    )
    assert [scraped[f"{name}{{mapping=users}}"] for name in names] == [5, 0, 6, 7, 0]


def test_the_database_counts_at_most_once_in_five_seconds() -> None:
    """However many scrape, and also when they do so at once."""
    counted = Counted()

    async def at_once() -> None:
        await asyncio.gather(*(counted.scrape() for _ in range(5)))

    asyncio.run(at_once())
    counted.now += 4.9
    assert counted.scraped()["deliveries_pending"] == 1
    counted.now += 0.1
    assert counted.scraped()["deliveries_pending"] == 2
    assert counted.asked == 2


def test_scrapes_that_give_up_leave_their_count_to_the_next() -> None:
    """If each began another one, none might ever end."""
    counted = Counted()
    counted.hangs = True

    async def give_up_and_scrape() -> Samples:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(counted.scrape(), 0.01)
        counted.gate.set()
        return await counted.scrape()

    assert asyncio.run(give_up_and_scrape())["deliveries_pending"] == 1
    assert counted.asked == 1


def test_the_spool_is_counted_in_a_thread_and_kept() -> None:
    """A directory of many files would block the event loop in each scrape."""
    counted = Counted()
    for _ in range(3):
        assert counted.scraped()["deliveries_in_spool"] == 8
    assert len(counted.counted_in) == 1
    assert counted.counted_in != [threading.get_ident()]


def fails(counted: Counted) -> None:
    counted.error = StoreUnavailable(problem="gone")


def hangs(counted: Counted) -> None:
    counted.hangs = True


@pytest.mark.parametrize("goes", [fails, hangs])
def test_a_database_that_cannot_be_asked_takes_only_the_gauges_along(
    goes: Callable[[Counted], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it can be asked again; it isn't asked more often for that."""
    monkeypatch.setattr(prometheus, "PATIENCE_S", 0.01)
    counted = Counted()
    goes(counted)
    for _ in range(3):
        told = counted.scraped()
        assert told["database_up"] == 0
        assert "records_doubtful" not in told
    assert counted.asked == 1
    counted.error, counted.hangs = None, False
    counted.now += 5
    told = counted.scraped()
    assert (told["database_up"], told["records_doubtful"]) == (1, 2)


def test_an_observer_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The others are told, before and after it; it is logged once."""
    first: list[TelemetryEvent] = []
    last: list[TelemetryEvent] = []

    def broken(report: TelemetryEvent) -> None:
        raise ZeroDivisionError

    observe = fan_out(first.append, broken, last.append)
    with caplog.at_level(logging.ERROR, logger="logto_webhooks"):
        for _ in range(3):
            observe(Resumed())
    assert first == last == [Resumed()] * 3
    assert [record.message for record in caplog.records] == [
        "an observer failed; its further failures are not logged"
    ]
