"""Deliveries that are replayed in one transaction."""

from __future__ import annotations

from logto_webhooks.apply.replay import REPLAYED_AT_ONCE, REPLAYED_BYTES, cut
from logto_webhooks.testing import make


def test_a_page_ends_by_number_and_by_size() -> None:
    """A long body can make thousands of jobs; one that is too long has a page of its own."""
    many = list(range(2 * REPLAYED_AT_ONCE + 1))
    assert [len(page) for page in cut(many, dict.fromkeys(many, 1))] == [200, 200, 1]
    half = REPLAYED_BYTES // 2
    sizes = {1: half, 2: half, 3: 1, 4: REPLAYED_BYTES + 1, 5: half}
    assert list(cut(list(sizes), sizes)) == [[1, 2], [3], [4], [5]]


def test_a_page_of_membership_deliveries_names_few_members() -> None:
    """Each is a change of the transaction, which accepting waits for on SQLite."""
    ids = [f"u{number:011}" for number in range(100)]  # as long as Logto's
    size = len(make.organization_membership_updated(id="acme", addedUserIds=ids).body)
    pages = cut(range(50), dict.fromkeys(range(50), size))
    assert max(len(page) * len(ids) for page in pages) <= 1_000
