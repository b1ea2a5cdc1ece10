"""What a test needs, as its marks say."""

from __future__ import annotations

marks: set[str] | None = None  # of the running test; None outside of tests


def need(*wanted: str) -> None:
    """Fail unless the running test has one of these marks."""
    assert marks is None or not marks.isdisjoint(wanted), f"mark this test as {wanted[0]}"
