"""What a test is told: what became of a delivery, and of the handlers that ran."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from logto_webhooks.instrumentation import (
    DeliveryFailed,
    DeliverySynced,
    HandlerFailed,
    HandlerRan,
    TelemetryEvent,
)


class HandlerCall(Struct, frozen=True):
    """One call of a handler. `state` is the state of its job afterwards: done, waiting (it failed
    and will be tried again), dead or discarded."""

    handler: str
    event: str
    subject: str
    state: str
    error: BaseException | None = None


class DeliveryResult(Struct, frozen=True):
    """The result of a delivery: the status of the answer, the outcome of the sync, and `runs`, the
    calls of handlers that followed.

    `outcome` is applied, stale, tombstoned, unchanged, asks, nothing, test, unknown, failed, dead
    or duplicate, or None if the delivery wasn't accepted.
    """

    status: int
    id: int | None = None
    outcome: str | None = None
    runs: tuple[HandlerCall, ...] = ()

    @property
    def ran(self) -> list[str]:
        """The names of the handlers that finished, in the order in which they ran."""
        return [each.handler for each in self.runs if each.state == "done"]


def to_handler_call(report: HandlerRan | HandlerFailed, error: BaseException | None) -> HandlerCall:
    """What a report tells of a call."""
    state = report.state if isinstance(report, HandlerFailed) else "done"
    return HandlerCall(report.handler, report.event, report.subject, state, error)


def to_outcome(id: int, reports: Sequence[TelemetryEvent]) -> str | None:
    """What the sync last reported of a delivery."""
    for report in reversed(reports):
        if isinstance(report, DeliverySynced) and report.id == id:
            return report.outcome
        if isinstance(report, DeliveryFailed) and report.id == id:
            return "dead" if report.retry_in_s is None else "failed"
    return None
