"""A recorded history as the state of a Logto: its records, its hook and its log."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import msgspec
from msgspec import Struct

from logto_webhooks import samples
from logto_webhooks.samples.history import Final, Name
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake.log import entry, response
from logto_webhooks.testing.fake.state import FakeState


class _Delivery(Struct):
    received_at: int
    body: str
    answered: int


def load(name: Name, log: Sequence[Json] | None) -> tuple[FakeState, int]:
    """The state at the end of a history, and when that was.

    `log` is the recorded log, newest first. Without it, it is made from the deliveries: then the
    entries' ids are made up, and each ended when the delivery was received.
    """
    folder = resources.files(samples) / "histories" / name
    final = msgspec.json.decode((folder / "final.json").read_bytes(), type=Final)
    hook = msgspec.json.decode((folder / "hook.json").read_bytes(), type=Json)
    if log is None:
        lines = (folder / "deliveries.jsonl").read_bytes().splitlines()
        log = _log([msgspec.json.decode(line, type=_Delivery) for line in lines])
    state = _state(final)
    state.add_hook(hook)
    state.log(hook["id"]).hold(log)
    return state, log[0]["createdAt"]


def _state(final: Final) -> FakeState:
    state = FakeState()
    for user in final.users:
        state.users.add(user)
    for organization in final.organizations:
        state.add_organization(organization)
    for organization_id, members in final.members.items():
        state.members[organization_id] = {each["id"]: each["organizationRoles"] for each in members}
    return state


def _log(deliveries: list[_Delivery]) -> list[Json]:
    newest_first = sorted(deliveries, key=lambda each: each.received_at, reverse=True)
    payloads = [(each, msgspec.json.decode(each.body, type=Json)) for each in newest_first]
    return [
        _entry(number, each, payload)
        for number, (each, payload) in enumerate(payloads)
        if payload["userAgent"] != "fake-user-agent"
    ]


def _entry(number: int, delivery: _Delivery, payload: Json) -> Json:
    answered = response(delivery.answered, b"ok")
    error = None if delivery.answered == 200 else f"HTTPError: status {delivery.answered}"
    return entry(f"{number:021}", payload, delivery.received_at, answered, error)
