"""Counts that agree with their nouns."""

from __future__ import annotations

import pytest

from logto_webhooks.plural import Count


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 jobs are dead"), (1, "1 job is dead"), (2, "2 jobs are dead")]
)
def test_a_count_agrees(count: int, told: str) -> None:
    """One is alone in its form."""
    assert f"{Count(count):job is|jobs are} dead" == told
    assert f"{Count(count)}" == str(count)
