"""Name in a word what a delivery did."""

from __future__ import annotations

from typing import Final

from logto_webhooks.records.record import DeliveryChange, Record, RefetchRequest, Tombstone

# The strongest first: a delivery that changes several records has the strongest of their words.
OUTCOMES: Final = {
    "applied": "changed a record",
    "stale": "older than what was known already",
    "asks": "tells that something changed, not what: only Logto knows",
    "tombstoned": "about a record that is deleted, and stays so",
    "unchanged": "said what was known already",
    "nothing": "an event that changes no record",
    "unknown": "an event that this release doesn't know: kept",
    "test": "a test payload of Logto's console: touches nothing",
    "duplicate": "was in the inbox already",
}


def name_effect(known: Record, change: DeliveryChange, merged: Record) -> str:
    """Say in a word what merging did: applied, stale, tombstoned, unchanged or asks."""
    if known.deleted_at is not None:
        return "tombstoned" if merged.deleted_at is not None else "applied"
    if isinstance(change, RefetchRequest):
        return "asks"
    if merged.deleted_at is not None or merged.facts != known.facts:
        return "applied"
    if isinstance(change, Tombstone):
        return "unchanged"
    names = change.values
    if any(
        name not in known.groups or merged.groups[name].digest != known.groups[name].digest
        for name in names
    ):
        return "applied"
    lost = any(merged.groups[name].content != value.content for name, value in names.items())
    return "stale" if lost else "unchanged"
