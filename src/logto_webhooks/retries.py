"""Decide whether and when a failed delivery or job is retried."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from logto_webhooks.errors import (
    Discard,
    JobLost,
    MalformedEvent,
    NoAnswer,
    NotADelivery,
    RetryLater,
    TimedOut,
)

MAX_ATTEMPTS: Final = 8
MAX_LOSSES: Final = 3  # times that a job's process may end or hang before the job is dead
MAX_ERROR_CHARS: Final = 8_000
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 900.0
# After a lock time-out, a delivery is retried within 15 s. It is dead after about a day of them.
LONGEST_LOCKED_WAIT_S: Final = 15.0
MAX_TIME_OUTS: Final = 6_000
LONGEST_ROW_WAIT_S: Final = 60.0  # between two looks for the application's row
_A_YEAR_S: Final = 366 * 86_400.0


class Retry(Struct, frozen=True):
    """Retry after this many seconds."""

    after_s: float


class Dead(Struct, frozen=True):
    """Give up."""


class DiscardJob(Struct, frozen=True):
    """Discard the job for this reason."""

    why: str


def after_job_failure(
    error: BaseException, failures: int, jitter: float, max_attempts: int, waits: tuple[float, ...]
) -> Retry | Dead | DiscardJob:
    """Decide what follows a handler's error, after `failures` earlier ones.

    `waits` (seconds) come before the second, third, … attempt; the last is used for all later ones.
    Without them, the waits grow like a delivery's. A handler can decide with RetryLater or Discard.
    Subclasses of these can have attributes of any type, so this can raise anything.
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


def while_job_waits(age_s: float, jitter: float) -> Retry:
    """Decide when a job is tried again that waits for the application's row, or for a process of
    another release, `age_s` after its event. That is no failure, so there is no last attempt."""
    return Retry(min(max(FIRST_WAIT_S, age_s / 2), LONGEST_ROW_WAIT_S) * (1 - jitter / 2))


def to_text(value: object) -> str:
    """Convert to a plain `str`, not a subclass, and cut it. Can raise anything."""
    return str.__str__(str(value))[:MAX_ERROR_CHARS]


def _retry(after_s: float) -> Retry:
    return Retry(min(max(0.0, after_s), _A_YEAR_S))


def after_failure(
    error: Exception, attempt: int, failures: int, jitter: float, max_attempts: int = MAX_ATTEMPTS
) -> Retry | Dead:
    """Decide what follows a delivery's error in an attempt (the first is 1), after `failures`
    earlier ones.

    The waits triple: 1 s, 3 s, 9 s, … up to 15 minutes. `jitter` (0 to 1) shortens them by up to
    half, so that deliveries that failed together aren't retried together. A malformed event is dead
    at once, because a retry can't help. A time-out counts as an attempt but not as a failure,
    because it may not be the delivery's fault: the waits grow to 15 s, or up to 15 minutes if there
    was no answer at all, and the delivery is dead only after MAX_TIME_OUTS.
    """
    if isinstance(error, TimedOut | NoAnswer):
        time_outs = attempt - 1 - failures
        if time_outs + 1 >= max(MAX_TIME_OUTS, max_attempts):
            return Dead()
        longest_s = LONGEST_LOCKED_WAIT_S if isinstance(error, TimedOut) else LONGEST_WAIT_S
        return Retry(_grow(time_outs, longest_s, jitter))
    if isinstance(error, MalformedEvent | NotADelivery) or failures + 1 >= max_attempts:
        return Dead()
    return Retry(_grow(failures, LONGEST_WAIT_S, jitter))


def _grow(before: int, longest_s: float, jitter: float) -> float:
    """Return the next wait, after `before` others."""
    return min(FIRST_WAIT_S * 3.0 ** min(before, 20), longest_s) * (1 - jitter / 2)
