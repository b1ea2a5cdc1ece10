"""When an answer was true, on Logto's clock."""

from __future__ import annotations

import pytest

from logto_webhooks.deliveries import ReceivedBody
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.logto.api_responses import ApiResponse, pairs_of_organization, read_span

T = 1_795_000_000_000


def answered(asked_at: int, date: int | None) -> ApiResponse:
    return ApiResponse(content={}, asked_at=asked_at, took=50, date=date)


def received(ahead: int) -> ReceivedBody:
    """A delivery that came when our clock was so far ahead of its dispatch."""
    return ReceivedBody(b"", T, T + ahead)


def test_the_date_alone_tells_to_the_second() -> None:
    """And may be a second old; of what came in one millisecond nobody knows the order."""
    assert read_span(answered(T + 999_999, T), []) == (T - 1051, T + 2000)


def test_deliveries_tell_how_far_our_clock_is_ahead() -> None:
    """The least that lies between dispatch and arrival."""
    at, _ = read_span(answered(T + 60_300, T), [received(60_000), received(60_400)])
    assert at == T + 299


def test_a_clock_that_was_wrong_is_not_believed() -> None:
    """Nothing is asked later than it is answered: or later deliveries would count for nothing."""
    at, _ = read_span(answered(T, T), [received(-300_000)])
    assert at <= T + 1000


@pytest.mark.parametrize("item", [None, {}, {"id": 5}, {"id": "a:b"}, {"id": "a\0b"}, {"id": ""}])
def test_an_id_that_cannot_be_used_is_refused(item: object) -> None:
    """As those of deliveries are."""
    with pytest.raises(InvalidApiResponse):
        pairs_of_organization("acme", [item])
