"""Counts and names that agree with their nouns."""

from __future__ import annotations

import pytest

from logto_webhooks.plural import Count, Names


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 jobs are dead"), (1, "1 job is dead"), (2, "2 jobs are dead")]
)
def test_a_count_agrees(count: int, told: str) -> None:
    """One is alone in its form."""
    assert f"{Count(count):job is|jobs are} dead" == told
    assert f"{Count(count)}" == str(count)


@pytest.mark.parametrize(
    ("names", "told"), [(["a"], "the table a exists"), (["a", "b"], "the tables a, b exist")]
)
def test_a_noun_agrees_with_names(names: list[str], told: str) -> None:
    """One name takes the singular."""
    exists = "exists" if len(names) == 1 else "exist"
    assert f"{Names(names):the table|the tables} {exists}" == told
    assert f"{Names(names)}" == ", ".join(names)
