"""What to do about what an application answers."""

from __future__ import annotations

from typing import Final

from logto_webhooks.cli import tables

_HINTS: Final = {
    401: "the service doesn't know the key with which this was signed. Set "
    "LOGTO_WEBHOOK_SIGNING_KEY to the one it runs with; after a rotation, to the new one.",
    404: "there is no webhook at that path. Set LOGTO_WEBHOOKS_PATH to the one that there is, or "
    "give the whole URL with {option}.",
}


class Hints:
    """Tells each once, beside what is printed; `option` names a URL."""

    def __init__(self, option: str) -> None:
        self._option = option
        self._told: set[int] = set()

    def tell(self, status: int | None) -> None:
        """Say what to do about an answer, if that is known."""
        if status in _HINTS and status not in self._told:
            self._told.add(status)
            hint = _HINTS[status].format(option=self._option)
            tables.err.print(f"{status}: {hint}", markup=False, soft_wrap=True)
