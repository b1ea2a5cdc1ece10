"""The samples have the fields that a real Logto sends, no more and no less."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from logto_webhooks.samples.payloads import payload
from tests.support import recorded

Json = dict[str, Any]


def body_of(delivery: recorded.Recorded) -> Json:
    body: Json = msgspec.json.decode(delivery.body)
    return body


def has_a_sample(delivery: recorded.Recorded) -> bool:
    """Whether it came the way of which there is a sample, and isn't a test of the console's."""
    body = body_of(delivery)
    sample = payload(delivery.event, at=0, rng=random.Random(0))
    same_way = body.get("matchedRoute") == sample.get("matchedRoute")
    return (
        same_way
        and "fake" not in body.get("userAgent", "")
        and body.get("data") != {"result": "success"}
    )


# Absent when empty, and when the caller names no program.
MAY_LACK = {"addedUserIds", "removedUserIds", "userAgent"}
LIKE_SAMPLES = list(filter(has_a_sample, recorded.deliveries()))


@pytest.mark.parametrize("delivery", LIKE_SAMPLES, ids=lambda delivery: delivery.name)
def test_a_sample_has_the_fields_of_what_was_recorded(delivery: recorded.Recorded) -> None:
    """Those of the payload, of its record and of the application."""
    body = body_of(delivery)
    sample = payload(delivery.event, at=0, rng=random.Random(0))
    for part in ("data", "user", "application"):
        theirs, ours = body.get(part), sample.get(part)
        if isinstance(theirs, dict) or isinstance(ours, dict):
            assert sorted(ours or ()) == sorted(theirs or ()), part
    assert sorted(sample.keys() - MAY_LACK) == sorted(body.keys() - MAY_LACK)


def test_most_events_were_recorded() -> None:
    """So the test above is about most samples."""
    assert len({delivery.event for delivery in LIKE_SAMPLES}) > 15
