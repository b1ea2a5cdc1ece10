"""Decide what is wrong at Logto: the webhook, its URL, its log."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.doctor.findings import Finding, bare, fine, make_finding, moment
from logto_webhooks.handlers.matching import wants
from logto_webhooks.interfaces import ApiResponse, Status
from logto_webhooks.jobs import RegisteredHandler
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.webhooks import Webhook, is_ours, subscription

SKEW_MS: Final = 5_000
UNREAD: Final = 3  # times as long as the log is left unread at most
MENDED_MS: Final = 3_600_000
_SECOND_MS: Final = 1_000
# Why an attempt came to nothing, in the words of logto/delivery_log.py -> the fault.
_CAUSES: Final = {
    "timed out": "log_timed_out",
    "wrong signature": "log_signature",
    "refused": "log_refused",
    "connection reset": "log_reset",
    "answered 5xx": "log_failing",
    "answered 4xx": "log_denied",
}


class LogSummary(Struct, kw_only=True):
    """What the newest entries of the last day say; `causes` are those of what failed, but for the
    `mended`, which failed more than an hour ago, and are here all the same.

    Of what isn't in the inbox, `answered` were logged as a success; of the others, the `recent`
    ones may be brought back yet, the `late` ones should have been.
    """

    entries: int = 0
    total: int = 0
    causes: dict[str, int] = {}
    mended: int = 0
    late: int = 0
    recent: int = 0
    answered: int = 0


class OurWebhooks(Struct, frozen=True):
    """The webhooks that lead here; `by_path` if only the path of their URL says so, which may be
    another system's."""

    hooks: list[Webhook]
    by_path: bool


def tally(
    looked: LogSummary, entries: Sequence[Any], missing: Sequence[Any], now: int, recover_ms: int
) -> None:
    """Count entries, of which some are `missing` here; what ended within `recover_ms` is recent."""
    looked.entries += len(entries)
    gone = {id(each) for each in missing}
    for entry in entries:
        cause = delivery_log.failure_cause(entry)
        if cause == delivery_log.ANSWERED:
            looked.answered += id(entry) in gone
        elif id(entry) in gone or entry["createdAt"] > now - MENDED_MS:
            looked.causes[cause] = looked.causes.get(cause, 0) + 1
        else:
            looked.mended += 1
    for entry in missing:
        if delivery_log.failure_cause(entry) != delivery_log.ANSWERED:
            recent = entry["createdAt"] > now - recover_ms
            looked.recent += recent
            looked.late += not recent


def skew_ms(answered: ApiResponse) -> int:
    """By how much Logto's clock is ahead of ours, at least; its header tells whole seconds."""
    if answered.date is None:
        return 0
    least = answered.date - (answered.asked_at + answered.took)
    most = answered.date + _SECOND_MS - answered.asked_at
    return least if least > 0 else min(most, 0)


def judge_clock(answered: ApiResponse) -> list[Finding]:
    """Compare the clocks."""
    skew = abs(skew_ms(answered))
    if skew > SKEW_MS:
        return [make_finding("clock_skew", seconds=round(skew / 1000))]
    return [fine("The clocks agree, within seconds.")]


def find_leading_here(
    hooks: Sequence[Webhook],
    keys: Collection[str],
    public_url: str | None,
    seen: Collection[str],
    path: str,
) -> OurWebhooks:
    """The webhooks that are ours: by key or URL, else by what came, else by the path alone."""
    named = [each for each in hooks if is_ours(each, keys, public_url)]
    known = [each for each in hooks if each.id in seen]
    alike = [each for each in hooks if bare(each.url).rstrip("/").endswith(path.rstrip("/"))]
    return OurWebhooks(named or known or alike, by_path=not (named or known))


def judge_webhooks(
    hooks: Sequence[Webhook], found_ours: OurWebhooks, public_url: str | None
) -> list[Finding]:
    """Judge whether one leads here, and only one."""
    ours = found_ours.hooks
    if not ours:
        known = [f"{each.name or each.id} ({bare(each.url)})" for each in hooks] or ["none"]
        return [make_finding("hook_missing", hooks=known)]
    enabled = [each for each in ours if each.enabled]
    if not enabled:
        return [make_finding("hook_disabled", hook=_name(each)) for each in ours]
    faults = [
        make_finding(
            "hook_elsewhere", hook=_name(each), url=bare(each.url), public_url=bare(public_url)
        )
        for each in enabled
        if public_url and not any(other.leads_to(public_url) for other in enabled)
    ]
    for url in {each.url.rstrip("/") for each in enabled}:
        same = [_name(each) for each in hooks if each.enabled and each.leads_to(url)]
        if len(same) > 1:
            faults.append(make_finding("hook_twice", url=bare(url), hooks=same))
    if found_ours.by_path:
        faults += [make_finding("hook_unproven", hook=_name(each)) for each in enabled]
    return faults or [fine(f"{_name(enabled[0])} leads to {bare(enabled[0].url)}.")]


def judge_events(ours: Sequence[Webhook], handlers: Sequence[RegisteredHandler]) -> list[Finding]:
    """Compare what is sent with what the copy and the handlers need."""
    sending = [each for each in ours if each.enabled] or ours
    sent = {event for each in sending for event in each.events}
    patterns = [pattern for each in handlers for pattern in each.patterns]
    synced = subscription()
    missing = [each for each in subscription(patterns) if each not in sent]
    lost = [each for each in missing if each in synced]
    unheard = [each for each in missing if each not in synced]
    faults = [make_finding("events_missing", events=lost)] if lost else []
    if unheard:
        waiting = [each.name for each in handlers if _waits(each, unheard)]
        faults.append(make_finding("events_missing_handlers", handlers=waiting, events=unheard))
    return faults or [fine("All events that are needed are subscribed to.")]


def judge_log(looked: LogSummary) -> list[Finding]:
    """Judge why deliveries failed."""
    counts: dict[str, int] = {}
    for cause, count in looked.causes.items():
        code = _CAUSES.get(cause, "log_other")
        counts[code] = counts.get(code, 0) + count
    faults = [make_finding(code, count=count) for code, count in sorted(counts.items())]
    if looked.mended and not faults:
        return [fine(f"{looked.mended} failed, none within the last hour; all are here by now.")]
    return faults or [fine(f"None of the newest {looked.entries} of {looked.total} failed.")]


def judge_gap(looked: LogSummary) -> list[Finding]:
    """Compare Logto's log with the inbox."""
    faults = []
    if looked.answered:
        faults.append(make_finding("gap_answered", count=looked.answered))
    if looked.late:
        faults.append(make_finding("gap", count=looked.late, entries=looked.entries))
    if looked.recent:
        faults.append(make_finding("gap_recent", count=looked.recent, entries=looked.entries))
    return faults or [fine(f"All of the newest {looked.entries} of {looked.total} are here.")]


def judge_recovery(status: Status, now: int, every_s: int) -> list[Finding]:
    """Judge when the log was last read."""
    at = status.complete_up_to
    if at is None:
        return [make_finding("log_unread", when="never")]
    if now - at > UNREAD * every_s * 1000:
        when = moment(at)
        return [make_finding("log_unread", when=f"at {when}")]
    return [fine("Logto's log is read again and again.")]


def _name(hook: Webhook) -> str:
    return hook.name or hook.id


def _waits(handler: RegisteredHandler, events: Sequence[str]) -> bool:
    return any(wants(pattern, event) for pattern in handler.patterns for event in events)
