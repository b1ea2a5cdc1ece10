"""Reports as Prometheus' metrics, beside what the database tells when they are scraped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from logto_webhooks.adapters.observers.metrics import (
    GAUGES,
    METRICS,
    PREFIX,
    SPOOLED,
    SPOOLED_SAYS,
    UP,
    UP_SAYS,
    Metric,
)
from logto_webhooks.core.ports import Observer, Status
from logto_webhooks.core.reports import Report

KEEP_S: Final = 5.0  # the database counts at most that often, however many scrape
PATIENCE_S: Final = 5.0  # Prometheus itself gives up after 10 s
Ask = Callable[[], Awaitable[Status]]


class Metrics:
    """Counts reports in a registry of its own; what is scraped is since the process began."""

    def __init__(
        self,
        ask: Ask,
        seconds: Callable[[], float] = time.monotonic,
        spooled: Callable[[], int] | None = None,
    ) -> None:
        """`ask` lets the database count; `seconds` is a clock that never goes back; `spooled`
        counts what is in the spool directory, if there is one."""
        self._registry = CollectorRegistry()
        self._meters: dict[type[Report], list[Observer]] = {}
        for metric in METRICS:
            meter = _meter(metric, self._registry)
            self._meters.setdefault(metric.report, []).append(meter)
        self._gauges = _Gauges(ask, seconds, spooled)
        self._registry.register(self._gauges)

    def observe(self, report: Report) -> None:
        """Count a report."""
        for meter in self._meters.get(type(report), ()):
            meter(report)

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that the header Accept prefers, and its type."""
        await self._gauges.refresh()
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type


def _meter(metric: Metric, registry: CollectorRegistry) -> Observer:
    name, amount = PREFIX + metric.name, metric.amount
    if metric.buckets:
        histogram = Histogram(name, metric.says, buckets=metric.buckets, registry=registry)
        return lambda report: histogram.observe(amount(report))
    if metric.label is None:
        counter = Counter(name, metric.says, registry=registry)
        return lambda report: counter.inc(amount(report))
    return _labelled(metric, metric.label, registry)


def _labelled(metric: Metric, label: str, registry: CollectorRegistry) -> Observer:
    counter = Counter(PREFIX + metric.name, metric.says, [label], registry=registry)
    # All are there from the start: a rate needs a sample before the first that counts.
    children = {value: counter.labels(value) for value in metric.values}

    def count(report: Report) -> None:
        children[str(getattr(report, label)).lower()].inc(metric.amount(report))

    return count


class _Gauges(Collector):
    """What the database told last."""

    def __init__(
        self, ask: Ask, seconds: Callable[[], float], spooled: Callable[[], int] | None
    ) -> None:
        self._ask = ask
        self._spooled = spooled
        self._seconds = seconds
        self._status: Status | None = None
        self._due = float("-inf")
        self._asking = asyncio.Lock()

    async def refresh(self) -> None:
        """Ask, unless that was done just now."""
        async with self._asking:
            if self._seconds() >= self._due:
                self._status = await self._asked()
                self._due = self._seconds() + KEEP_S

    async def _asked(self) -> Status | None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._ask()
        except Exception:  # whatever it is, the counters are worth having
            return None

    def collect(self) -> Iterator[Family]:
        """Yield the gauges; called by the registry."""
        status = self._status
        yield GaugeMetricFamily(UP, UP_SAYS, int(status is not None))
        if self._spooled is not None:
            yield GaugeMetricFamily(SPOOLED, SPOOLED_SAYS, self._spooled())
        if status is None:
            return
        for gauge in GAUGES:
            if (value := gauge.value(status)) is not None:
                yield GaugeMetricFamily(gauge.full_name, gauge.says, value)
