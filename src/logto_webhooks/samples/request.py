"""Sign deliveries as Logto does, and plan faults of their transport."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final, Literal, get_args

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from logto_webhooks.errors import SettingInvalid
from logto_webhooks.signing_keys import HEADER, sign


class SignedRequest(Struct, frozen=True):
    """A signed request. `event` is the event's name. `pieces` simulates a slow network that sends
    the body in several pieces."""

    event: str
    body: bytes
    headers: list[tuple[str, str]]
    pieces: int = 1


def sign_request(payload: dict[str, Any], key: str) -> SignedRequest:
    """Sign a payload with a webhook's key. Raises SettingInvalid if the key isn't text."""
    if not isinstance(key, str):
        kind = type(key).__name__  # the key itself is a secret
        raise SettingInvalid(name="key", problem=f"it must be a text, not of type {kind}")
    body = msgspec.json.encode(payload)
    return SignedRequest(payload["event"], body, make_headers(body, key))


def make_headers(body: bytes, key: str) -> list[tuple[str, str]]:
    """Make the headers that Logto would send with a body."""
    return [
        (HEADER, sign(body, key)),
        ("user-agent", "Logto (https://logto.io/)"),
        ("content-type", "application/json"),
    ]


Fault = Literal["duplicates", "reordering", "loss", "wrong-signatures", "slow-sending"]

FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)
SHARE: Final = 0.3  # share of deliveries that get a fault; at least one does
FURTHEST: Final = 10  # a delivery moves back at most this far, because Logto sends 10 at once
PIECES: Final = 8
_WITHOUT_COPY: Final[tuple[Fault, ...]] = ("reordering", "slow-sending")
_UNKNOWN_KEY: Final = "a key of no webhook"


class Step(SignedRequest, frozen=True, kw_only=True):
    """A request to send or to leave out, with its `faults`. `number` is the delivery's place in
    Logto's order."""

    number: int
    faults: tuple[Fault, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether it must not be sent."""
        return "loss" in self.faults

    @property
    def expected(self) -> int:
        """The expected status of the response."""
        return 401 if "wrong-signatures" in self.faults else 200


def plan_faults(
    deliveries: Sequence[SignedRequest], faults: Collection[Fault], seed: int
) -> list[Step]:
    """Plan which requests are sent, in which order, and with which faults.

    Duplicates, and copies with a wrong signature, are sent in addition to the original. A lost
    delivery has no other fault.
    """
    everywhere = range(len(deliveries))
    lost = _choose_affected(everywhere, "loss", seed) if "loss" in faults else set()
    kept = [place for place in everywhere if place not in lost]
    affected = {
        fault: lost if fault == "loss" else _choose_affected(kept, fault, seed) for fault in faults
    }
    placed: list[tuple[float, Step]] = []
    for index, delivery in enumerate(deliveries):
        own_faults = {fault for fault, places in affected.items() if index in places}
        placed += _make_steps(index, delivery, own_faults, random.Random(f"{seed} {index}"))
    return [step for _, step in sorted(placed, key=itemgetter(0))]


def _choose_affected(places: Sequence[int], fault: Fault, seed: int) -> set[int]:
    rng = random.Random(f"{seed} {fault}")
    if fault == "reordering":
        places = places[:-1]  # no delivery can overtake the last one
    affected = {place for place in places if rng.random() < SHARE}
    return affected or set(rng.sample(places, min(1, len(places))))


def _make_steps(
    index: int, delivery: SignedRequest, own_faults: Collection[Fault], rng: random.Random
) -> Iterator[tuple[float, Step]]:
    if "loss" in own_faults:
        yield index, _make_step(index, delivery, "loss")
        return
    place = index + (rng.uniform(1, FURTHEST) if "reordering" in own_faults else 0.0)
    yield (
        place,
        _make_step(index, delivery, *(fault for fault in _WITHOUT_COPY if fault in own_faults)),
    )
    if "duplicates" in own_faults:
        yield place + rng.uniform(1, FURTHEST), _make_step(index, delivery, "duplicates")
    if "wrong-signatures" in own_faults:
        yield place, _make_step(index, delivery, "wrong-signatures")


def _make_step(index: int, delivery: SignedRequest, *faults: Fault) -> Step:
    fields = asdict(delivery)
    if "wrong-signatures" in faults:
        fields["headers"] = make_headers(delivery.body, _UNKNOWN_KEY)
    if "slow-sending" in faults:
        fields["pieces"] = PIECES
    return Step(**fields, number=index + 1, faults=faults)
