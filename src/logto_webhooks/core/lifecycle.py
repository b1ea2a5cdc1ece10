"""The states of a delivery and the moves between them, as one table; and what a failure means."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from logto_webhooks.errors import MalformedEvent, NotADelivery


class State(StrEnum):
    """Where a delivery stands."""

    PENDING = "pending"  # to be applied, now or at `due_at`
    DONE = "done"
    IGNORED = "ignored"  # a test payload: it touches nothing
    DEAD = "dead"  # given up; its record is doubtful


class Move(StrEnum):
    """What can happen to a delivery."""

    APPLY = "apply"
    IGNORE = "ignore"
    RETRY = "retry"
    GIVE_UP = "give up"


MOVES: Final[dict[tuple[State, Move], State]] = {
    (State.PENDING, Move.APPLY): State.DONE,
    (State.PENDING, Move.IGNORE): State.IGNORED,
    (State.PENDING, Move.RETRY): State.PENDING,
    (State.PENDING, Move.GIVE_UP): State.DEAD,
}

MAX_ATTEMPTS: Final = 8
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 900.0


class Retry(Struct, frozen=True):
    """Try again after so many seconds."""

    after_s: float


class Dead(Struct, frozen=True):
    """Give up."""


def after_failure(
    error: Exception, attempt: int, jitter: float, max_attempts: int = MAX_ATTEMPTS
) -> Retry | Dead:
    """Decide what follows the failure of the given attempt (the first is 1).

    The waits grow threefold: 1 s, 3 s, 9 s, … up to 15 minutes; `jitter` (0 to 1) takes off up
    to half, so that what failed together isn't tried together. A malformed event stays
    malformed: it is dead at once.
    """
    if isinstance(error, MalformedEvent | NotADelivery) or attempt >= max_attempts:
        return Dead()
    wait = min(FIRST_WAIT_S * 3.0 ** min(attempt - 1, 20), LONGEST_WAIT_S)
    return Retry(wait * (1 - jitter / 2))
