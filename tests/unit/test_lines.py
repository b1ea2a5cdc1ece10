"""One line of what came, whatever is in it."""

from __future__ import annotations

from logto_webhooks.cli import lines
from logto_webhooks.core.jobs import JobRow
from logto_webhooks.core.life import Line

ODD = "ana\n2026-11-24 FAKED\t\x1b[31m\x9b2J\u202e\r"
SHOWN = r"ana\n2026-11-24 FAKED\t\x1b[31m\x9b2J\u202e\r"


def test_nothing_in_it_makes_another_line_or_steers_a_terminal() -> None:
    """Nor turns the text around."""
    row = JobRow(
        id=1,
        handler=ODD,
        event=ODD,
        subject=ODD,
        state="dead",
        occurred_at=0,
        attempts=1,
        failures=1,
        runs=0,
        delivery_id=None,
        finished_at=None,
        error=None,
    )
    life = Line(occurred_at=0, origin="read", event=ODD, call=ODD, outcome="applied", set=(ODD,))
    for line in (lines.of_job(row).plain, lines.of_life(life).plain):
        assert line.count(SHOWN) == 3
        assert line.isprintable()
