"""Deliveries as Logto sends them, signed, and a plan of what goes wrong on their way."""

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
    """Sign a payload with a hook's key. Raises SettingInvalid for a key that isn't a text."""
    if not isinstance(key, str):
        raise SettingInvalid(name="key", problem=f"it must be a text, not {key!r}")
    body = msgspec.json.encode(payload)
    return SignedRequest(payload["event"], body, make_headers(body, key))


def make_headers(body: bytes, key: str) -> list[tuple[str, str]]:
    """The headers with which Logto would send a body."""
    return [
        (HEADER, sign(body, key)),
        ("user-agent", "Logto (https://logto.io/)"),
        ("content-type", "application/json"),
    ]


Fault = Literal["duplicates", "reordering", "loss", "wrong-signatures", "slow-sending"]

FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)
SHARE: Final = 0.3  # of the deliveries are struck by a fault, and at least one
FURTHEST: Final = 10  # so many others overtake one, as Logto sends so many at once
PIECES: Final = 8
_OF_ITSELF: Final[tuple[Fault, ...]] = ("reordering", "slow-sending")
_NO_HOOKS_KEY: Final = "a key of no webhook"


class Step(SignedRequest, frozen=True, kw_only=True):
    """A request to make, or to leave out; `number` is the delivery's place in Logto's order.

    `faults` is what befell this request.
    """

    number: int
    faults: tuple[Fault, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether it must not be sent."""
        return "loss" in self.faults

    @property
    def expected(self) -> int:
        """The status that it must be answered with."""
        return 401 if "wrong-signatures" in self.faults else 200


def plan_faults(
    deliveries: Sequence[SignedRequest], faults: Collection[Fault], seed: int
) -> list[Step]:
    """Say what is sent, in which order, and how.

    Duplicates, and copies with a wrong signature, are requests beside the true one: only `loss`
    keeps a delivery away, and nothing else strikes what is lost.
    """
    everywhere = range(len(deliveries))
    lost = _choose_struck(everywhere, "loss", seed) if "loss" in faults else set()
    kept = [place for place in everywhere if place not in lost]
    struck = {
        fault: lost if fault == "loss" else _choose_struck(kept, fault, seed) for fault in faults
    }
    placed: list[tuple[float, Step]] = []
    for index, delivery in enumerate(deliveries):
        hit = {fault for fault, places in struck.items() if index in places}
        placed += _make_steps(index, delivery, hit, random.Random(f"{seed} {index}"))
    return [step for _, step in sorted(placed, key=itemgetter(0))]


def _choose_struck(places: Sequence[int], fault: Fault, seed: int) -> set[int]:
    rng = random.Random(f"{seed} {fault}")
    if fault == "reordering":
        places = places[:-1]  # nothing comes that could overtake the last
    struck = {place for place in places if rng.random() < SHARE}
    return struck or set(rng.sample(places, min(1, len(places))))


def _make_steps(
    index: int, delivery: SignedRequest, hit: Collection[Fault], rng: random.Random
) -> Iterator[tuple[float, Step]]:
    if "loss" in hit:
        yield index, _make_step(index, delivery, "loss")
        return
    place = index + (rng.uniform(1, FURTHEST) if "reordering" in hit else 0.0)
    yield place, _make_step(index, delivery, *(fault for fault in _OF_ITSELF if fault in hit))
    if "duplicates" in hit:
        yield place + rng.uniform(1, FURTHEST), _make_step(index, delivery, "duplicates")
    if "wrong-signatures" in hit:
        yield place, _make_step(index, delivery, "wrong-signatures")


def _make_step(index: int, delivery: SignedRequest, *faults: Fault) -> Step:
    fields = asdict(delivery)
    if "wrong-signatures" in faults:
        fields["headers"] = make_headers(delivery.body, _NO_HOOKS_KEY)
    if "slow-sending" in faults:
        fields["pieces"] = PIECES
    return Step(**fields, number=index + 1, faults=faults)
