"""The states of deliveries and jobs as diagrams."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from logto_webhooks.deliveries import DeliveryState
from logto_webhooks.jobs import JOB_MOVES, JobState

S = TypeVar("S", bound=StrEnum)
M = TypeVar("M", bound=StrEnum)


class DeliveryMove(StrEnum):
    """What can happen to a delivery."""

    APPLY = "apply"
    IGNORE = "ignore"
    RETRY = "retry"
    GIVE_UP = "give up"
    REPLAY = "replay"  # by hand


DELIVERY_MOVES: Final[dict[tuple[DeliveryState, DeliveryMove], DeliveryState]] = {
    (DeliveryState.PENDING, DeliveryMove.APPLY): DeliveryState.DONE,
    (DeliveryState.PENDING, DeliveryMove.IGNORE): DeliveryState.IGNORED,
    (DeliveryState.PENDING, DeliveryMove.RETRY): DeliveryState.PENDING,
    (DeliveryState.PENDING, DeliveryMove.GIVE_UP): DeliveryState.DEAD,
    (DeliveryState.DONE, DeliveryMove.REPLAY): DeliveryState.PENDING,
    (DeliveryState.IGNORED, DeliveryMove.REPLAY): DeliveryState.PENDING,
    (DeliveryState.DEAD, DeliveryMove.REPLAY): DeliveryState.PENDING,
}


def diagram(name: str) -> str:
    """In Mermaid's language, which GitHub draws."""
    return _DIAGRAMS[name]


def _drawn(first: S, moves: Mapping[tuple[S, M], S]) -> str:
    names: dict[tuple[S, S], list[str]] = {}
    for (state, move), to in moves.items():
        names.setdefault((state, to), []).append(move)
    arrows = [f"    {state} --> {to}: {', '.join(by)}" for (state, to), by in names.items()]
    head = ["```mermaid", "stateDiagram-v2", "    direction LR", f"    [*] --> {first}"]
    return "\n".join([*head, *arrows, "```"])


_DIAGRAMS: Final = {
    "deliveries": _drawn(DeliveryState.PENDING, DELIVERY_MOVES),
    "jobs": _drawn(JobState.WAITING, JOB_MOVES),
}
