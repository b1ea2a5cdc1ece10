"""Lines that commands print."""

from __future__ import annotations

import traceback

import pytest

from logto_webhooks.cli import output
from logto_webhooks.cli.output import format_error
from logto_webhooks.errors import RetryLater
from logto_webhooks.explain.timeline import TimelineEntry
from logto_webhooks.jobs import JobRow

ODD = "ana\n2026-11-24 FAKED\t\x1b[31m\x9b2J\u202e\r"
SHOWN = r"ana\n2026-11-24 FAKED\t\x1b[31m\x9b2J\u202e\r"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no", "ValueError: no"),
        ("no such table\n[SQL: INSERT]\n(Background on this)", "ValueError: no such table"),
        ("", "ValueError"),
    ],
)
def test_what_a_traceback_says_was_raised(message: str, told: str) -> None:
    """Its first line; not what a library adds behind."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        raise ValueError(message) if message else ValueError
    assert format_error("".join(traceback.format_exception(caught.value))) == told


def shown(error: Exception) -> str:
    with pytest.raises(type(error)) as caught:
        raise error
    return format_error("".join(traceback.format_exception(caught.value)))


def test_of_a_group_itself_is_told() -> None:
    """Not the last of those that are in it."""
    assert shown(ExceptionGroup("both", [ValueError("a"), KeyError("b")])) == (
        "ExceptionGroup: both (2 sub-exceptions)"
    )


def test_who_asks_to_be_retried_did_not_fail() -> None:
    """Its own words are no error's."""
    assert shown(RetryLater(60)) == "asked for a retry"
    assert shown(RetryLater("no email yet", after_s=60)) == "asked for a retry: no email yet"
    assert shown(RetryLater("no email yet")) == "asked for a retry: no email yet"
    assert shown(RetryLater("first\nsecond")) == "asked for a retry: first"


def test_of_what_is_no_traceback_the_last_line_counts() -> None:
    """As of a job that was discarded with a word."""
    assert format_error("first\nwhy\n") == "why"
    assert format_error(None) == ""


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
    life = TimelineEntry(
        occurred_at=0, origin="read", event=ODD, call=ODD, outcome="applied", set=(ODD,)
    )
    for line in (output.format_job(row).plain, output.format_timeline_entry(life).plain):
        assert line.count(SHOWN) == 3
        assert line.isprintable()


@pytest.mark.parametrize("fold", [False, True])
def test_a_pipe_or_a_file_has_no_width(
    fold: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell is cut or wrapped, unless COLUMNS asks for it, as a terminal does."""
    long, time = "x" * 20_000, "2026-11-25T12:00:00.000Z"
    row = (long, "ana@example.com", time)
    monkeypatch.delenv("COLUMNS", raising=False)
    output.print_table("", ("id", "email", "at"), [row], fold=fold)
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == list(row)
    monkeypatch.setenv("COLUMNS", "80")
    output.print_table("", ("id", "email", "at"), [row], fold=fold)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
