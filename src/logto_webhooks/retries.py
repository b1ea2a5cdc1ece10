"""Decide what follows a failure of a delivery or a job: try again, and when, or give up."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from logto_webhooks.errors import (
    Discard,
    JobLost,
    MalformedEvent,
    NotADelivery,
    RetryLater,
    TimedOut,
)

MAX_ATTEMPTS: Final = 8
MAX_LOSSES: Final = 3  # of a job that whoever held it said nothing more about
MAX_ERROR_CHARS: Final = 8_000
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 900.0
# What is locked is tried again once a minute, and given up after about a day.
LONGEST_LOCKED_WAIT_S: Final = 15.0
MAX_TIME_OUTS: Final = 6_000
_A_YEAR_S: Final = 366 * 86_400.0


class Retry(Struct, frozen=True):
    """Try again after so many seconds."""

    after_s: float


class Dead(Struct, frozen=True):
    """Give up."""


class DiscardJob(Struct, frozen=True):
    """Discard the job, and why."""

    why: str


def after_job_failure(
    error: BaseException, failures: int, jitter: float, max_attempts: int, waits: tuple[float, ...]
) -> Retry | Dead | DiscardJob:
    """Decide what follows a handler's error, of which there were `failures` before.

    `waits` (seconds) are those before the second, third, … attempt, the last for all later ones;
    without any they grow as a delivery's. A handler can decide by itself: RetryLater, Discard.
    Raises anything if what these carry can't be used: a subclass can set it to anything.
    """
    if isinstance(error, Discard):
        return DiscardJob(to_text(Discard.why if error.why is None else error.why))
    if failures + 1 >= max_attempts or isinstance(error, JobLost):
        return Dead()
    if isinstance(error, RetryLater) and error.after_s is not None:
        return _retry(float(error.after_s))
    if waits:
        return _retry(waits[min(failures, len(waits) - 1)])
    return Retry(_grow(failures, LONGEST_WAIT_S, jitter))


def to_text(value: object) -> str:
    """What `str` makes of it, no subclass of that and not too long. Raises anything."""
    return str.__str__(str(value))[:MAX_ERROR_CHARS]


def _retry(after_s: float) -> Retry:
    return Retry(min(max(0.0, after_s), _A_YEAR_S))


def after_failure(
    error: Exception, attempt: int, failures: int, jitter: float, max_attempts: int = MAX_ATTEMPTS
) -> Retry | Dead:
    """Decide what follows an error in the given attempt (the first is 1) of a delivery, which had
    so many `failures` before.

    The waits grow threefold: 1 s, 3 s, 9 s, … up to 15 minutes; `jitter` (0 to 1) takes off up
    to half, so that what failed together isn't tried together. A malformed event stays
    malformed: it is dead at once. A time-out counts as an attempt, but is no failure, because it
    says nothing against the delivery: the waits grow to 15 s, and it is dead only after about a
    day of them.
    """
    if isinstance(error, TimedOut):
        time_outs = attempt - 1 - failures
        if time_outs + 1 >= max(MAX_TIME_OUTS, max_attempts):
            return Dead()
        return Retry(_grow(time_outs, LONGEST_LOCKED_WAIT_S, jitter))
    if isinstance(error, MalformedEvent | NotADelivery) or failures + 1 >= max_attempts:
        return Dead()
    return Retry(_grow(failures, LONGEST_WAIT_S, jitter))


def _grow(before: int, longest_s: float, jitter: float) -> float:
    """Return the wait after so many others."""
    return min(FIRST_WAIT_S * 3.0 ** min(before, 20), longest_s) * (1 - jitter / 2)
