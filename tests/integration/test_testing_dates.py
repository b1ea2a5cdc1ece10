"""The dates of deliveries go on while the clock of an application under test stands still."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from logto_webhooks import testing
from logto_webhooks.testing import FrozenClock, make

CLOCKS: dict[str, Callable[[], FrozenClock]] = {
    "frozen just now": FrozenClock,
    "frozen 10 minutes ago": lambda: FrozenClock(time.time_ns() // 1_000_000 - 600_000),
    "frozen at a moment of the test's choice": lambda: FrozenClock(1),
}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_the_newest_change_wins_however_long_the_clock_stands(
    clock: Callable[[], FrozenClock],
) -> None:
    """Without doubt, and whatever the values."""
    app = testing.App(clock=clock())
    names = ["Ana", "Bo", "Cleo", "Bo", "Ana"]
    app.deliver(make.user_created(id="ana", name=names[0]))
    for name in names[1:]:
        app.deliver(make.user_data_updated(id="ana", name=name))
        assert [found.row["name"] for found in app.users()] == [name]
    assert app.status().doubtful == 0


def test_a_date_in_the_future_is_as_wrong_as_in_production() -> None:
    """More than five minutes after the present."""
    app = testing.App()
    app.deliver(make.user_created(at=FrozenClock().now() + 200_000))
    assert app.status().doubtful == 0
    app.deliver(make.user_created(at=FrozenClock().now() + 400_000))
    assert app.status().doubtful == 1
