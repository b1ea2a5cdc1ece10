"""What is measured, as data: the one table of metrics, which docs/metrics.md repeats.

A label's values are few, and known before: no text of a delivery is among them, no id, no secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, get_args

from msgspec import Struct

from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.outcome import OUTCOMES
from logto_webhooks.core.ports import Status
from logto_webhooks.core.reports import (
    Asked,
    ClockSetBack,
    Compared,
    Failed,
    FlowResumed,
    FlowStopped,
    HandlerBlocks,
    HandlerFailed,
    HandlerHeld,
    HandlerRan,
    HandlersKnown,
    LookedBack,
    NotAsked,
    NotStored,
    NotUnspooled,
    Refused,
    RefusedFor,
    Report,
    Rescued,
    Resumed,
    Retrying,
    SetAside,
    Spooled,
    Stalled,
    Stored,
    Synced,
    Unrunnable,
    Unspooled,
)
from logto_webhooks.core.silence import Why

PREFIX: Final = "logto_webhooks_"
ANSWER_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 8, 10)
ROW_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)


def _one(_: Report) -> float:
    return 1


def _count(report: NotStored | Spooled | Unspooled | SetAside | Rescued) -> float:
    return report.count


def _taken_s(report: Stored | Synced | HandlerRan) -> float:
    return report.took_ms / 1000


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


class Metric(Struct, frozen=True):
    """What follows from a report: a counter, or a histogram if there are `buckets`.

    `amount` is what a report adds; `label` one of its fields, which is one of `values`.
    """

    name: str
    report: type[Report]
    says: str
    amount: Callable[[Any], float] = _one
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """Its name as Prometheus has it."""
        return PREFIX + self.name + ("" if self.buckets else "_total")


class Gauge(Struct, frozen=True):
    """What the database tells when it is asked; absent where that is None."""

    name: str
    says: str
    value: Callable[[Status], float | None]

    @property
    def full_name(self) -> str:
        """Its name as Prometheus has it."""
        return PREFIX + self.name


METRICS: Final = (
    Metric(
        "deliveries_stored",
        Stored,
        "deliveries answered 200; duplicates were in the inbox already",
        label="duplicate",
        values=("false", "true"),
    ),
    Metric(
        "answer_seconds", Stored, "from a body's last byte to its 200", _taken_s, buckets=ANSWER_S
    ),
    Metric(
        "requests_refused",
        Refused,
        "POSTs answered 4xx, or 503 because their body couldn't be read",
        label="code",
        values=get_args(RefusedFor),
    ),
    Metric("requests_set_aside", SetAside, "POSTs of no known key that are kept", _count),
    Metric("deliveries_rescued", Rescued, "of those, which a key that was learnt proved", _count),
    Metric("deliveries_not_stored", NotStored, "deliveries answered 503", _count),
    Metric("store_outages", Retrying, "times the database began not to take deliveries"),
    Metric("deliveries_spooled", Spooled, "deliveries kept in the spool directory", _count),
    Metric("deliveries_unspooled", Unspooled, "of those, which are in the inbox by now", _count),
    Metric("spool_files_refused", NotUnspooled, "files of the spool that can't be stored"),
    Metric(
        "deliveries_synced",
        Synced,
        "deliveries applied, by what became of them",
        label="outcome",
        values=tuple(outcome for outcome in OUTCOMES if outcome != "duplicate"),
    ),
    Metric(
        "delivery_to_row_seconds",
        Synced,
        "from receiving a delivery to having applied it",
        _taken_s,
        buckets=ROW_S,
    ),
    Metric("deliveries_failed", Failed, "failed attempts to apply a delivery, the last included"),
    Metric(
        "deliveries_given_up",
        Failed,
        "deliveries that became dead",
        lambda told: told.retry_in_s is None,
    ),
    Metric("stalls", Stalled, "times the worker couldn't go on, and waited"),
    Metric(
        "log_entries",
        LookedBack,
        "entries of Logto's log compared with the inbox",
        lambda told: told.entries,
    ),
    Metric(
        "deliveries_recovered",
        LookedBack,
        "deliveries that only Logto's log had",
        lambda told: told.recovered,
    ),
    Metric("jobs_done", HandlerRan, "jobs that a handler did"),
    Metric(
        "handler_seconds",
        HandlerRan,
        "from calling a handler to having its job done",
        _taken_s,
        buckets=ROW_S,
    ),
    Metric(
        "jobs_failed",
        HandlerFailed,
        "calls of handlers that raised, by what became of the job",
        label="state",
        values=("waiting", "dead", "discarded"),
    ),
    Metric("handlers_blocking", HandlerBlocks, "alarms that a handler blocks its event loop"),
    Metric("handlers_held", HandlerHeld, "alarms that a handler left too many threads behind"),
    Metric(
        "flow_stopped",
        FlowStopped,
        "alarms that nothing comes any more, or that all is rejected",
        label="why",
        values=get_args(Why),
    ),
    Metric("asked", Asked, "times Logto was asked about a subject"),
    Metric("not_asked", NotAsked, "times Logto couldn't be asked"),
    Metric(
        "records_compared",
        Compared,
        "users and organizations compared with Logto's own",
        lambda told: told.users + told.organizations,
    ),
    Metric(
        "records_drifted",
        Compared,
        "records that differed from Logto's own",
        lambda told: told.drifted,
    ),
)

# Reports that aren't measured, and why.
UNMEASURED: Final[dict[type[Report], str]] = {
    ClockSetBack: "it is seldom, and logged",
    Resumed: "the stalls before it are counted",
    FlowResumed: "the gauge `silent` tells",
    HandlersKnown: "`handlers list` has them",
    Unrunnable: "`handlers list` counts them",
}

UP: Final = PREFIX + "database_up"
UP_SAYS: Final = (
    "1 if the database told the gauges, 0 if it couldn't be asked: then they are absent"
)

SPOOLED: Final = PREFIX + "deliveries_in_spool"
SPOOLED_SAYS: Final = "deliveries that wait in the spool directory; absent if there is none"

GAUGES: Final = (
    Gauge(
        "deliveries_pending",
        "deliveries that wait to be applied",
        lambda status: status.deliveries[State.PENDING],
    ),
    Gauge(
        "oldest_pending_seconds",
        "how long the oldest of them waits; 0 if none does",
        lambda status: status.oldest_pending_s or 0,
    ),
    Gauge(
        "deliveries_dead",
        "deliveries that were given up",
        lambda status: status.deliveries[State.DEAD],
    ),
    Gauge("records_doubtful", "records in doubt", lambda status: status.doubtful),
    Gauge("records_waiting", "records Logto must be asked about", lambda status: status.refetch),
    Gauge(
        "memberships_to_end",
        "memberships still listed though their user or organization was deleted",
        lambda status: status.memberships_to_end,
    ),
    Gauge(
        "silent",
        "1 while nothing comes any more, or all is rejected",
        lambda status: int(status.silent_since is not None),
    ),
    Gauge(
        "complete_up_to_timestamp_seconds",
        "up to when Logto's log was compared with the inbox; absent if never",
        lambda status: _seconds(status.complete_up_to),
    ),
    Gauge(
        "reconciled_timestamp_seconds",
        "when all records were last compared with Logto's own; absent if never",
        lambda status: _seconds(status.reconciled_at),
    ),
)
