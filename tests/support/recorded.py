"""Recorded input of a real Logto, as the tests want it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from logto_webhooks.samples.request import SignedRequest

FOLDER = Path(__file__).parent.parent / "recorded"


class Recorded(Struct, frozen=True):
    """One recorded delivery; `name` is its file's."""

    event: str
    body: str
    headers: list[tuple[str, str]]
    signing_key: str = ""
    name: str = ""

    @property
    def signed(self) -> SignedRequest:
        """As it is sent again: uvicorn counts the length by itself."""
        skipped = ("content-length", "connection", "host", "transfer-encoding")
        headers = [(name, value) for name, value in self.headers if name not in skipped]
        return SignedRequest(self.event, self.body.encode(), headers)


class Sequence(Struct, frozen=True):
    """One user, changed eight times in parallel."""

    user_id: str
    signing_key: str
    deliveries: list[Recorded]
    final_api_user: dict[str, object]


def deliveries() -> list[Recorded]:
    """All recorded deliveries, by name."""
    files = sorted((FOLDER / "deliveries").glob("*.json"))
    return [
        msgspec.structs.replace(
            msgspec.json.decode(file.read_bytes(), type=Recorded), name=file.stem
        )
        for file in files
    ]


KEYS = tuple(sorted({each.signing_key for each in deliveries()}))
