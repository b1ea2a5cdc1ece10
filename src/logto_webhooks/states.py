"""States of deliveries and jobs, and the moves between them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class DeliveryState(StrEnum):
    """The state of a delivery."""

    PENDING = "pending"  # to be applied, now or at `due_at`
    DONE = "done"
    IGNORED = "ignored"  # a test payload: it touches nothing
    DEAD = "dead"  # given up; its record is doubtful


class DeliveryMove(StrEnum):
    """What can happen to a delivery."""

    APPLY = "apply"
    IGNORE = "ignore"
    RETRY = "retry"
    GIVE_UP = "give up"
    REPLAY = "replay"  # by hand


DELIVERY_MOVES: Final[dict[tuple[DeliveryState, DeliveryMove], DeliveryState]] = {
    (DeliveryState.PENDING, DeliveryMove.APPLY): DeliveryState.DONE,
    (DeliveryState.PENDING, DeliveryMove.IGNORE): DeliveryState.IGNORED,
    (DeliveryState.PENDING, DeliveryMove.RETRY): DeliveryState.PENDING,
    (DeliveryState.PENDING, DeliveryMove.GIVE_UP): DeliveryState.DEAD,
    (DeliveryState.DONE, DeliveryMove.REPLAY): DeliveryState.PENDING,
    (DeliveryState.IGNORED, DeliveryMove.REPLAY): DeliveryState.PENDING,
    (DeliveryState.DEAD, DeliveryMove.REPLAY): DeliveryState.PENDING,
}


class JobState(StrEnum):
    """The state of a job."""

    WAITING = "waiting"  # in its queue, to be run now or when the queue is due
    DONE = "done"
    DEAD = "dead"  # given up, with the traceback
    DISCARDED = "discarded"  # by its handler, by age, or by hand


class JobMove(StrEnum):
    """What can happen to a job."""

    FINISH = "finish"
    RETRY = "retry"
    GIVE_UP = "give up"
    DISCARD = "discard"
    REPEAT = "repeat"  # by hand; what waits for its next attempt has it now


JOB_MOVES: Final[dict[tuple[JobState, JobMove], JobState]] = {
    (JobState.WAITING, JobMove.FINISH): JobState.DONE,
    (JobState.WAITING, JobMove.RETRY): JobState.WAITING,
    (JobState.WAITING, JobMove.GIVE_UP): JobState.DEAD,
    (JobState.WAITING, JobMove.DISCARD): JobState.DISCARDED,
    (JobState.WAITING, JobMove.REPEAT): JobState.WAITING,
    (JobState.DEAD, JobMove.DISCARD): JobState.DISCARDED,
    (JobState.DONE, JobMove.REPEAT): JobState.WAITING,
    (JobState.DEAD, JobMove.REPEAT): JobState.WAITING,
    (JobState.DISCARDED, JobMove.REPEAT): JobState.WAITING,
}


def job_targets(move: JobMove) -> dict[JobState, JobState]:
    """From which states a job moves so, and to which; `waiting` first."""
    return {state: JOB_MOVES[state, move] for state in JobState if (state, move) in JOB_MOVES}
