"""Count telemetry events as Prometheus metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from operator import attrgetter
from typing import Any, Final, get_args

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from logto_webhooks import instrumentation as telemetry
from logto_webhooks.deliveries import DeliveryState, MappingStatus, Status
from logto_webhooks.event_loop import run_in_thread
from logto_webhooks.instrumentation import Observer, RefusedFor, TelemetryEvent, Why
from logto_webhooks.records.merge import OUTCOMES

PREFIX: Final = "logto_webhooks_"
ANSWER_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 8, 10)
_COUNT: Final[Callable[[Any], float]] = attrgetter("count")
ROW_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)


def _count_one(_: TelemetryEvent) -> float:
    return 1


def _read_duration(report: Any) -> float:
    return float(report.took_ms / 1000)


def _to_seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


class Metric(Struct, frozen=True):
    """A metric of a kind of telemetry event: a counter, or a histogram if it has `buckets`.

    `amount` returns what an event adds. `label` is a field of the event, with one of `values`.
    """

    name: str
    report: type[TelemetryEvent]
    says: str
    amount: Callable[[Any], float] = _count_one
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """The metric's name in Prometheus."""
        return PREFIX + self.name + ("" if self.buckets else "_total")


class Gauge(Struct, frozen=True):
    """A value that is read from the database. The metric is absent if it is None.

    With `each`, there is a value for each mapping, from its status.
    """

    name: str
    says: str
    value: Callable[[Status], float | None] = lambda status: None
    each: Callable[[MappingStatus], float] | None = None

    @property
    def full_name(self) -> str:
        """The metric's name in Prometheus."""
        return PREFIX + self.name


METRICS: Final = (
    Metric(
        "deliveries_stored",
        telemetry.DeliveryStored,
        "deliveries answered 200; duplicates were already in the inbox",
        label="duplicate",
        values=("false", "true"),
    ),
    Metric(
        "answer_seconds",
        telemetry.DeliveryStored,
        "seconds from a body's last byte to its 200",
        _read_duration,
        buckets=ANSWER_S,
    ),
    Metric(
        "requests_refused",
        telemetry.RequestRefused,
        "POSTs answered 4xx, or 503 because their body couldn't be read",
        label="code",
        values=get_args(RefusedFor),
    ),
    Metric(
        "requests_quarantined",
        telemetry.Quarantined,
        "requests quarantined because no known key signed them",
        _COUNT,
    ),
    Metric(
        "deliveries_rescued",
        telemetry.QuarantineReleased,
        "quarantined requests that a new key proved to be genuine",
        _COUNT,
    ),
    Metric("deliveries_not_stored", telemetry.NotStored, "deliveries answered 503", _COUNT),
    Metric(
        "deliveries_stored_late",
        telemetry.StoredLate,
        "deliveries stored after their request was over",
        _COUNT,
    ),
    Metric("store_outages", telemetry.Retrying, "times the database stopped storing deliveries"),
    Metric(
        "deliveries_spooled",
        telemetry.Spooled,
        "deliveries kept in the spool directory",
        _COUNT,
    ),
    Metric(
        "deliveries_unspooled",
        telemetry.Unspooled,
        "deliveries moved from the spool directory to the inbox",
        _COUNT,
    ),
    Metric(
        "spool_files_refused",
        telemetry.NotUnspooled,
        "files in the spool directory that the database refuses, or that hold no delivery",
    ),
    Metric(
        "deliveries_synced",
        telemetry.DeliverySynced,
        "deliveries applied, by outcome",
        label="outcome",
        values=tuple(outcome for outcome in OUTCOMES if outcome != "duplicate"),
    ),
    Metric(
        "delivery_to_row_seconds",
        telemetry.DeliverySynced,
        "seconds from the receipt of a delivery to its application",
        _read_duration,
        buckets=ROW_S,
    ),
    Metric(
        "deliveries_failed",
        telemetry.DeliveryFailed,
        "failed attempts to apply a delivery, including the last",
    ),
    Metric(
        "deliveries_given_up",
        telemetry.DeliveryFailed,
        "deliveries that became dead",
        lambda report: report.retry_in_s is None,
    ),
    Metric(
        "stalls",
        telemetry.Stalled,
        "times the worker couldn't continue, usually because of the database",
    ),
    Metric(
        "log_entries",
        telemetry.LogRecovered,
        "entries of Logto's log compared with the inbox",
        attrgetter("entries"),
    ),
    Metric(
        "deliveries_recovered",
        telemetry.LogRecovered,
        "deliveries recovered from Logto's log",
        attrgetter("recovered"),
    ),
    Metric("jobs_done", telemetry.HandlerRan, "jobs done"),
    Metric(
        "handler_seconds",
        telemetry.HandlerRan,
        "seconds from the call of a handler to the end of its job",
        _read_duration,
        buckets=ROW_S,
    ),
    Metric(
        "jobs_failed",
        telemetry.HandlerFailed,
        "failed calls of handlers, by the state of the job afterwards",
        label="state",
        values=("waiting", "dead", "discarded"),
    ),
    Metric(
        "handlers_blocking",
        telemetry.HandlerBlocks,
        "alarms because a handler blocked its event loop",
    ),
    Metric(
        "coroutines_abandoned",
        telemetry.CoroutineAbandoned,
        "coroutines of handlers that ignored their cancellation, and were abandoned",
    ),
    Metric(
        "handlers_held",
        telemetry.HandlerHeld,
        "alarms because a handler had too many abandoned calls",
    ),
    Metric(
        "flow_stopped",
        telemetry.FlowStopped,
        "alarms because no delivery arrived, or all were rejected",
        label="why",
        values=get_args(Why),
    ),
    Metric("refetches", telemetry.Refetched, "refetches from the Management API"),
    Metric("api_failures", telemetry.ApiUnavailable, "failed calls to the Management API"),
    Metric(
        "records_compared",
        telemetry.Reconciled,
        "users and organizations compared with Logto",
        lambda report: report.users + report.organizations,
    ),
    Metric(
        "records_drifted",
        telemetry.Reconciled,
        "records that differed from Logto",
        attrgetter("drifted"),
    ),
)

UP: Final = PREFIX + "database_up"
UP_SAYS: Final = "1 if the database could be read, else 0; the other gauges are then absent"

SPOOLED: Final = PREFIX + "deliveries_in_spool"
SPOOLED_SAYS: Final = "deliveries in the spool directory; absent without a spool directory"

GAUGES: Final = (
    Gauge(
        "deliveries_pending",
        "deliveries waiting to be applied",
        lambda status: status.deliveries[DeliveryState.PENDING],
    ),
    Gauge(
        "oldest_pending_seconds",
        "age of the oldest pending delivery, in seconds; 0 if there is none",
        lambda status: status.oldest_pending_s or 0,
    ),
    Gauge(
        "deliveries_dead", "dead deliveries", lambda status: status.deliveries[DeliveryState.DEAD]
    ),
    Gauge("records_doubtful", "records in doubt", lambda status: status.doubtful),
    Gauge("records_waiting", "records that need a refetch", lambda status: status.refetch),
    Gauge(
        "memberships_to_end",
        "memberships of deleted users and organizations that are still listed",
        lambda status: status.memberships_to_end,
    ),
    Gauge(
        "silent",
        "1 while no deliveries arrive, or all are rejected",
        lambda status: int(status.silent_since is not None),
    ),
    Gauge(
        "complete_up_to_timestamp_seconds",
        "time up to which Logto's log was compared with the inbox; absent if never",
        lambda status: _to_seconds(status.complete_up_to),
    ),
    Gauge(
        "reconciled_timestamp_seconds",
        "time of the last full comparison with Logto; absent if never",
        lambda status: _to_seconds(status.reconciled_at),
    ),
    Gauge(
        "mapped_rows_waiting",
        "records of each `mapping` whose row waits for a user, an organization or a value",
        each=attrgetter("waiting"),
    ),
    Gauge(
        "mapped_rows_conflicting",
        "records of each `mapping` whose row the database refused, or that can't be linked",
        each=attrgetter("conflict"),
    ),
    Gauge(
        "mapped_rows_owed",
        "records of each `mapping` whose row is not written yet",
        each=attrgetter("owed"),
    ),
    Gauge(
        "mapped_rows_held",
        "records of each `mapping` whose row is kept, because too many would be deleted within an "
        "hour",
        each=attrgetter("held"),
    ),
    Gauge(
        "mapped_rows_excluded",
        "users or organizations without a row, because `where` or create=False of a `mapping` "
        "excludes them",
        each=attrgetter("excluded"),
    ),
    Gauge(
        "mapping_applied",
        "1 if the `mapping` was applied to all records, else 0",
        each=lambda mapping: int(mapping.is_applied),
    ),
)


KEEP_S: Final = 5.0  # the database counts at most once in this time, however many scrape
PATIENCE_S: Final = 5.0  # Prometheus gives up after 10 s
Ask = Callable[[], Awaitable[Status]]


class Metrics:
    """Counts telemetry events in a separate registry, since the process started."""

    def __init__(
        self,
        ask: Ask,
        seconds: Callable[[], float] = time.monotonic,
        spooled: Callable[[], int] | None = None,
    ) -> None:
        """`ask` counts in the database. `seconds` is a monotonic clock. `spooled` counts deliveries
        in the spool directory, if there is one."""
        self._registry = CollectorRegistry()
        self._meters: dict[type[TelemetryEvent], list[Observer]] = {}
        for metric in METRICS:
            meter = _make_meter(metric, self._registry)
            self._meters.setdefault(metric.report, []).append(meter)
        self._gauges = _Gauges(ask, seconds, spooled)
        self._registry.register(self._gauges)

    def observe(self, report: TelemetryEvent) -> None:
        """Count a telemetry event."""
        for meter in self._meters.get(type(report), ()):
            meter(report)

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that the Accept header prefers, and the content type."""
        await self._gauges.refresh()
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # a version that isn't a number
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type


def _make_meter(metric: Metric, registry: CollectorRegistry) -> Observer:
    name, amount = PREFIX + metric.name, metric.amount
    if metric.buckets:
        histogram = Histogram(name, metric.says, buckets=metric.buckets, registry=registry)
        return lambda report: histogram.observe(amount(report))
    if metric.label is None:
        counter = Counter(name, metric.says, registry=registry)
        return lambda report: counter.inc(amount(report))
    return _make_labelled_meter(metric, metric.label, registry)


def _make_labelled_meter(metric: Metric, label: str, registry: CollectorRegistry) -> Observer:
    counter = Counter(PREFIX + metric.name, metric.says, [label], registry=registry)
    # Create all from the start: a rate needs a sample before the first event.
    children = {value: counter.labels(value) for value in metric.values}

    def count(report: TelemetryEvent) -> None:
        children[str(getattr(report, label)).lower()].inc(metric.amount(report))

    return count


class _Gauges(Collector):
    """The gauges, from the last counts of the database."""

    def __init__(
        self, ask: Ask, seconds: Callable[[], float], spooled: Callable[[], int] | None
    ) -> None:
        self._ask = ask
        self._count_spooled = spooled
        self._seconds = seconds
        self._status: Status | None = None
        self._spooled: int | None = None
        self._due = float("-inf")
        self._counting: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Count, unless that was less than `KEEP_S` ago.

        All scrapes share one count, which goes on if they give up: otherwise, each would begin
        another one, and none might end.
        """
        loop = asyncio.get_running_loop()
        if self._counting is None or self._counting.get_loop() is not loop:
            if self._seconds() < self._due:
                return
            self._counting = loop.create_task(self._count())
        await asyncio.shield(self._counting)

    async def _count(self) -> None:
        try:
            self._status, self._spooled = await asyncio.gather(
                self._ask_database(), self._look_at_spool()
            )
            self._due = self._seconds() + KEEP_S
        finally:
            self._counting = None

    async def _look_at_spool(self) -> int | None:
        """Count in a thread, because there may be many files."""
        if self._count_spooled is None:
            return None
        try:
            return await run_in_thread(self._count_spooled)
        except OSError:
            return None

    async def _ask_database(self) -> Status | None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._ask()
        except Exception:  # the counters are still useful
            return None

    def collect(self) -> Iterator[Family]:
        """Yield the gauges; called by the registry."""
        status = self._status
        yield GaugeMetricFamily(UP, UP_SAYS, int(status is not None))
        if self._spooled is not None:
            yield GaugeMetricFamily(SPOOLED, SPOOLED_SAYS, self._spooled)
        if status is None:
            return
        for gauge in GAUGES:
            if gauge.each is not None:
                family = GaugeMetricFamily(gauge.full_name, gauge.says, labels=["mapping"])
                for mapping in status.mappings:
                    family.add_metric([mapping.mapping], gauge.each(mapping))
                yield family
            elif (value := gauge.value(status)) is not None:
                yield GaugeMetricFamily(gauge.full_name, gauge.says, value)
