"""What became of deliveries that were sent on purpose: a line each, or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from logto_webhooks.cli import tables
from logto_webhooks.cli.hints import Hints
from logto_webhooks.core.events import parse
from logto_webhooks.core.projection import plan
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import MalformedEvent
from logto_webhooks.samples.faults import Fault, Step

_BEFELL: Final[dict[Fault, str]] = {
    "duplicates": "duplicate",
    "reordering": "out of order",
    "loss": "lost",
    "wrong-signatures": "wrong signature",
    "slow-sending": "slow",
}


class Played:
    """Prints each step once it is answered; as JSON, all of them at the end, as planned."""

    def __init__(self, seed: int, steps: Sequence[Step], *, as_json: bool) -> None:
        self._seed = seed
        self._steps = steps
        self._answers: dict[tuple[int, tuple[Fault, ...]], Any] = {}
        self._as_json = as_json
        self._unexpected: set[int] = set()
        _warn(steps)
        for each in steps:
            if each.lost:
                self._print(each)

    @property
    def surprising(self) -> bool:
        """Whether an answer was another than is expected."""
        return bool(self._unexpected)

    def answered(self, step: Step, response: Any) -> None:
        """Note an answer."""
        self._answers[step.number, step.faults] = response
        if response.status_code != step.expected:
            self._unexpected.add(response.status_code)
        self._print(step, response.status_code, tables.plain(response.text))

    def end(self, *, summary: bool) -> None:
        """Print what is left to say."""
        statuses = Counter(each.status_code for each in self._answers.values())
        lost = sum(each.lost for each in self._steps)
        if self._as_json:
            told = {
                "seed": self._seed,
                "deliveries": [self._told(each) for each in self._steps],
                "sent": len(self._answers),
                "answered": {str(status): count for status, count in sorted(statuses.items())},
                "lost": lost,
            }
            print(msgspec.json.encode(told).decode())
        elif summary:
            answers = [f"{count} answered {status}" for status, count in sorted(statuses.items())]
            counts = [f"{len(self._answers)} sent", *answers, f"{lost} lost on purpose"]
            tables.out.print(
                f"seed {self._seed}: {', '.join(counts)}", markup=False, soft_wrap=True
            )
        hints = Hints("--to")
        for status in sorted(self._unexpected):
            hints.tell(status)

    def _told(self, step: Step) -> dict[str, Any]:
        told = {"number": step.number, "event": step.event, "faults": step.faults}
        if step.lost:
            return told | {"status": None, "answer": None}
        response = self._answers[step.number, step.faults]
        return told | {"status": response.status_code, "answer": _decoded(response)}

    def _print(self, step: Step, *answer: Any) -> None:
        if self._as_json:
            return
        befell = ", ".join(_BEFELL[each] for each in step.faults)
        words = [step.event, *([f"({befell})"] if befell else []), *answer]
        tables.out.print(*words, markup=False, soft_wrap=True)


def _warn(steps: Sequence[Step]) -> None:
    """Say so if the sync will not take it: the answer can't, it is 200 once it is stored."""
    try:
        plan(parse(vouch(steps[0].body)))
    except MalformedEvent as error:
        tables.warn(str(error))


def _decoded(response: Any) -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return response.text  # of a proxy, perhaps
