"""The states, and what follows a failure."""

from __future__ import annotations

import pytest

from logto_webhooks.deliveries import DeliveryState
from logto_webhooks.errors import JobLost, MalformedEvent, NoAnswer, RetryLater, TimedOut
from logto_webhooks.retries import MAX_TIME_OUTS, Dead, Retry, after_failure, after_job_failure
from tests.pages.states import DELIVERY_MOVES, DeliveryMove

ERROR = RuntimeError("x")


def test_only_what_is_pending_moves() -> None:
    """Every move is in the table; the other states are final, but for who replays by hand."""
    assert {state for state, move in DELIVERY_MOVES if move is not DeliveryMove.REPLAY} == {
        DeliveryState.PENDING
    }
    assert {move for _, move in DELIVERY_MOVES} == set(DeliveryMove)
    assert set(DELIVERY_MOVES.values()) == set(DeliveryState)


def test_the_waits_grow_and_end() -> None:
    """Threefold, up to 15 minutes; the eighth failure is the last."""
    decisions = [after_failure(ERROR, before + 1, before, jitter=0) for before in range(8)]
    assert decisions == [*map(Retry, [1, 3, 9, 27, 81, 243, 729]), Dead()]
    assert after_failure(ERROR, 20, 19, jitter=0, max_attempts=99) == Retry(900)


def test_jitter_takes_off_up_to_half() -> None:
    """So that what failed together isn't tried together."""
    assert after_failure(ERROR, 3, 2, jitter=1) == Retry(4.5)


@pytest.mark.parametrize("attempt", [1, 5])
def test_a_malformed_event_is_dead_at_once(attempt: int) -> None:
    """Trying again can't mend it."""
    malformed = MalformedEvent(event="x", problem="y")
    assert after_failure(malformed, attempt, attempt - 1, jitter=0) == Dead()


def test_what_ends_its_process_is_dead() -> None:
    """However many attempts are left."""
    assert after_job_failure(JobLost(times=3), 0, 0, 99, ()) == Dead()


@pytest.mark.parametrize(("asked", "wait"), [(-5, 0), (float("nan"), 0), (1e300, 31_622_400)])
def test_a_handler_asks_for_any_wait(asked: float, wait: float) -> None:
    """What no database holds comes next to it; what is no number fails in the handler."""
    assert after_job_failure(RetryLater(asked), 0, 0, 8, ()) == Retry(wait)
    assert after_job_failure(ERROR, 0, 0, 8, (asked,)) == Retry(wait)
    with pytest.raises(ValueError, match="soon"):
        RetryLater(after_s="soon")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "says", "wait"),
    [
        (RetryLater(), "asked for a retry", None),
        (RetryLater(60), "asked for a retry in 60 s", 60),
        (RetryLater(after_s=0.5), "asked for a retry in 0.5 s", 0.5),
        (RetryLater("no email"), "asked for a retry: no email", None),
        (RetryLater("no email", 60), "asked for a retry in 60 s: no email", 60),
        (RetryLater(after_s=60, why="no email"), "asked for a retry in 60 s: no email", 60),
    ],
)
def test_a_handler_says_why_it_asks(asked: RetryLater, says: str, wait: float | None) -> None:
    """The reason, the time, both or neither."""
    assert (str(asked), asked.after_s) == (says, wait)


def test_a_time_out_is_tried_again_soon_and_for_long() -> None:
    """A lock says nothing against a delivery: it isn't dead after the usual attempts."""
    locked = TimedOut(problem="locked")
    assert after_failure(locked, 1, 0, jitter=0) == Retry(1)
    assert after_failure(locked, 100, 0, jitter=0) == Retry(15)
    assert after_failure(locked, MAX_TIME_OUTS, 0, jitter=0) == Dead()


def test_a_delivery_without_an_answer_is_tried_ever_more_rarely() -> None:
    """Each try may hold up others for seconds; but it isn't dead after the usual attempts."""
    silent = NoAnswer(problem="no answer within 10 s")
    assert [after_failure(silent, attempt, 0, jitter=0) for attempt in (1, 2, 20)] == [
        Retry(1),
        Retry(3),
        Retry(900),
    ]


def test_time_outs_and_failures_have_limits_of_their_own() -> None:
    """After many time-outs a failure is the first of eight, with its short wait; and the other way
    round."""
    locked = TimedOut(problem="locked")
    assert after_failure(ERROR, 100, 0, jitter=0) == Retry(1)
    assert after_failure(ERROR, 100, 7, jitter=0) == Dead()
    assert after_failure(locked, 8, 7, jitter=0) == Retry(1)
    assert after_failure(locked, MAX_TIME_OUTS + 6, 7, jitter=0) == Retry(15)
    assert after_failure(locked, MAX_TIME_OUTS + 7, 7, jitter=0) == Dead()
