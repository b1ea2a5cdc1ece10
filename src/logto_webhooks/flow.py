"""Decide whether deliveries stopped arriving, or all are refused."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

DAY_MS: Final = 86_400_000
DAYS: Final = 14  # of which the longest gap is remembered
LEARNT_MS: Final = 8 * DAY_MS  # a weekend is among them
LEAST_MS: Final = 3_600_000
TIMES: Final = 2  # as long as the longest gap
REJECTED: Final = 5

Why = Literal["silent", "rejected"]


class Flow(Struct, frozen=True, kw_only=True):
    """What is known of it; times in milliseconds, None before anything came.

    `gaps` are the longest of each day; `rejected` counts what no key signed since the `last`.
    """

    began: int | None = None
    last: int | None = None
    gaps: tuple[int, ...] = ()
    rejected: int = 0


class Gap(Struct, frozen=True):
    """How long (ms) nothing had come when a delivery came."""

    ended_at: int
    length: int


class RecordedFlow(Struct, frozen=True, kw_only=True):
    """What a database keeps of it: when the first and the `last` delivery came, the longest gap of
    each of the last days, and since when it is silent; None while it isn't."""

    began: int | None = None
    last: int | None = None
    silent_since: int | None = None
    gaps: tuple[Gap, ...] = ()


class Silence(Struct, frozen=True, kw_only=True):
    """It stopped `since` a moment (ms); `usual_ms` is the longest gap that is usual."""

    why: Why
    since: int
    usual_ms: int | None = None


def find_silence(flow: Flow, now: int, after_ms: int | None = None) -> Silence | None:
    """Judge. Without `after_ms`, what is silence is learnt."""
    since = flow.last or 0
    if flow.rejected >= REJECTED:
        return Silence(why="rejected", since=since)
    if flow.last is None or flow.began is None:
        return None
    usual = max(flow.gaps, default=0)
    if after_ms is None:
        if flow.last - flow.began < LEARNT_MS:
            return None
        after_ms = max(LEAST_MS, TIMES * usual)
    if now - flow.last <= after_ms:
        return None
    return Silence(why="silent", since=since, usual_ms=usual)
