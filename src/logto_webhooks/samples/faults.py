"""What can go wrong on the way from Logto: a plan, which follows from a seed alone."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import Final, Literal, get_args

from msgspec.structs import asdict

from logto_webhooks.samples.request import SignedRequest, make_headers

Fault = Literal["duplicates", "reordering", "loss", "wrong-signatures", "slow-sending"]

FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)
SHARE: Final = 0.3  # of the deliveries are struck by a fault, and at least one
FURTHEST: Final = 10  # so many others overtake one, as Logto sends so many at once
PIECES: Final = 8
_OF_ITSELF: Final[tuple[Fault, ...]] = ("reordering", "slow-sending")
_NO_HOOKS_KEY: Final = "a key of no hook"


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
    lost = _struck(everywhere, "loss", seed) if "loss" in faults else set()
    kept = [each for each in everywhere if each not in lost]
    struck = {each: lost if each == "loss" else _struck(kept, each, seed) for each in faults}
    placed: list[tuple[float, Step]] = []
    for index, delivery in enumerate(deliveries):
        hit = {fault for fault, places in struck.items() if index in places}
        placed += _requests(index, delivery, hit, random.Random(f"{seed} {index}"))
    return [step for _, step in sorted(placed, key=lambda each: each[0])]


def _struck(places: Sequence[int], fault: Fault, seed: int) -> set[int]:
    rng = random.Random(f"{seed} {fault}")
    if fault == "reordering":
        places = places[:-1]  # nothing comes that could overtake the last
    struck = {each for each in places if rng.random() < SHARE}
    return struck or set(rng.sample(places, min(1, len(places))))


def _requests(
    index: int, delivery: SignedRequest, hit: Collection[Fault], rng: random.Random
) -> Iterator[tuple[float, Step]]:
    if "loss" in hit:
        yield index, _step(index, delivery, "loss")
        return
    place = index + (rng.uniform(1, FURTHEST) if "reordering" in hit else 0.0)
    yield place, _step(index, delivery, *(each for each in _OF_ITSELF if each in hit))
    if "duplicates" in hit:
        yield place + rng.uniform(1, FURTHEST), _step(index, delivery, "duplicates")
    if "wrong-signatures" in hit:
        yield place, _step(index, delivery, "wrong-signatures")


def _step(index: int, delivery: SignedRequest, *faults: Fault) -> Step:
    fields = asdict(delivery)
    if "wrong-signatures" in faults:
        fields["headers"] = make_headers(delivery.body, _NO_HOOKS_KEY)
    if "slow-sending" in faults:
        fields["pieces"] = PIECES
    return Step(**fields, number=index + 1, faults=faults)
