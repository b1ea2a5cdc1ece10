"""Deliveries that are replayed in one transaction."""

from __future__ import annotations

from logto_webhooks.apply.replay import REPLAYED_AT_ONCE, REPLAYED_BYTES, cut


def test_a_page_ends_by_number_and_by_size() -> None:
    """A long body can make thousands of jobs; one that is too long has a page of its own."""
    many = list(range(2 * REPLAYED_AT_ONCE + 1))
    assert [len(page) for page in cut(many, dict.fromkeys(many, 1))] == [200, 200, 1]
    half = REPLAYED_BYTES // 2
    sizes = {1: half, 2: half, 3: 1, 4: REPLAYED_BYTES + 1, 5: half}
    assert list(cut(list(sizes), sizes)) == [[1, 2], [3], [4], [5]]
