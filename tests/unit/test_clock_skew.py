"""When an answer was true, on Logto's clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks.deliveries import FUTURE_MS, Clocks, Dated, typical_delay
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.logto.api_responses import DAY_MS, ApiResponse, pairs_of_organization, read_span
from logto_webhooks.logto.transport import ServerClock

T = 1_795_000_000_000


def answered(asked_at: int, date: int | None) -> ApiResponse:
    return ApiResponse(content={}, asked_at=asked_at, took=50, date=date)


def received(ahead: int, origin: str = "webhook") -> Dated:
    """A delivery that came when our clock was so far ahead of its dispatch."""
    return Dated(T, T, T + ahead, origin)


def delay_of(*recent: Dated) -> int | None:
    return typical_delay(Clocks(T, list(recent)))


def test_without_deliveries_a_second_is_left() -> None:
    """A Date tells whole seconds; and of what came in one millisecond nobody knows the order."""
    assert read_span(answered(T - 50, T), None) == (T - 1051, T + 2000)
    assert read_span(answered(T, None), None) == (T - 1001, T + 3999)


def test_deliveries_tell_how_far_our_clock_is_ahead() -> None:
    """Their median, which is late by what a delivery takes."""
    usual = delay_of(received(60_150), received(60_160), received(60_400))
    assert read_span(answered(T + 60_000, T), usual).at == T - 161


@pytest.mark.parametrize("odd", [-300_000, 300_000])
def test_a_few_odd_deliveries_shift_nothing(odd: int) -> None:
    """Such as those of another Logto whose clock is minutes ahead."""
    usual = delay_of(received(60_150), received(60_160), received(60_170))
    assert delay_of(received(60_160), received(60_160), received(odd)) == usual


def test_what_came_late_or_is_dated_oddly_tells_no_delay() -> None:
    """Logto's log brings back what is old."""
    old, odd = received(3_600_000, "log"), Dated(T + 10**9, T, T)
    assert delay_of(old, odd) is None
    assert delay_of(old, old, odd, odd, received(120)) == 120


@given(
    proxy=st.integers(-(10**8), 10**8),
    receivers=st.integers(-(10**8), 10**8),
    ours=st.integers(-(10**8), 10**8),
    took=st.integers(1, 30_000),
    wrong=st.sampled_from(["proxy", "clocks", "neither"]),
    has_deliveries=st.booleans(),
)
def test_one_wrong_clock_costs_no_change(
    proxy: int, receivers: int, ours: int, took: int, wrong: str, has_deliveries: bool
) -> None:
    """The span has the moment at which it was asked and that at which it was answered, whether a
    proxy tells the Date, or our clock isn't that of the receivers."""
    proxy = proxy if wrong == "proxy" else 0
    ours = ours if wrong == "clocks" else receivers if has_deliveries else 0
    date = (T + took + proxy) // 1000 * 1000
    answer = ApiResponse(content={}, asked_at=T + ours, took=took, date=date)
    at, end = read_span(answer, delay_of(received(receivers + 120)) if has_deliveries else None)
    assert at < T
    assert end > T + took


@pytest.mark.parametrize("ahead", [-300_000, -3_000, -1_200, -200])
def test_the_date_bounds_what_another_hosts_clock_tells(ahead: int) -> None:
    """Deliveries are received by a host whose clock is behind that of the host that asks."""
    assert read_span(answered(T + 400, T), ahead).at == T - 51


@given(
    offset=st.integers(-(10**9), 10**9),
    answers=st.lists(
        st.tuples(
            st.integers(1, 1_500), st.integers(0, 900), st.integers(0, 900), st.integers(0, 1_000)
        ),
        min_size=1,
    ),
)
def test_dates_tell_a_moment_that_is_never_too_late(
    offset: int, answers: list[tuple[int, int, int, int]]
) -> None:
    """Whatever the clocks, the ways there and back, and however old a Date is; and never more
    than the one answer alone tells."""
    clock, now = ServerClock(), T
    for pause, there, back, stale in answers:
        now += pause
        asked, made = now, now + there
        date = (made - stale) // 1000 * 1000
        now = made + back
        at = clock.read((asked - offset) / 1000, there + back, date)
        assert date - (there + back) - 1 <= at <= asked


def test_many_dates_tell_it_to_a_few_milliseconds() -> None:
    """Each answer comes at another moment of its second."""
    clock, tells = ServerClock(), []
    for number in range(50):
        asked = T + number * 1_013
        tells.append(clock.read(asked / 1000, 10, (asked + 5) // 1000 * 1000) - asked)
    assert -30 <= tells[-1] <= 0


def test_a_server_clock_that_is_set_back_is_followed() -> None:
    """Nothing is asked later than it is answered: or later changes would count for nothing."""
    clock = ServerClock()
    assert clock.read(1_000.0, 10, T) == T - 10
    assert clock.read(1_001.0, 10, T - 60_000) == T - 60_010


@pytest.mark.parametrize("item", [None, {}, {"id": 5}, {"id": "a:b"}, {"id": "a\0b"}, {"id": ""}])
def test_an_id_that_cannot_be_used_is_refused(item: object) -> None:
    """As those of deliveries are."""
    with pytest.raises(InvalidApiResponse):
        pairs_of_organization("acme", [item])


def test_a_date_in_the_far_future_is_wrong() -> None:
    """Each later change of the record would be in doubt until then."""
    date = T + 10**12
    assert read_span(answered(T, date), 100).end == T - 50 + FUTURE_MS + 2_000
    assert read_span(answered(T, date), None).end == T + 50 + DAY_MS + 2_000
