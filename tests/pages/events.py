"""The reference of events, made of their classes and of what a real Logto sent."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from typing import Any, Final, get_type_hints

import msgspec
from msgspec import Struct

from logto_webhooks.deliveries import identify
from logto_webhooks.events import (
    ALIASES,
    BY_NAME,
    DERIVED,
    Application,
    Event,
    Organization,
    Role,
    Scope,
    User,
)
from logto_webhooks.events.base import is_test
from logto_webhooks.events.local import (
    LOCAL,
    LocalEvent,
    LocalOrganizationEvent,
    OrganizationRow,
    UserRow,
)
from logto_webhooks.events.users import InteractionEvent, UserEvent
from logto_webhooks.samples import history, payloads
from logto_webhooks.signing_keys import trust
from tests.support import recorded

Json = dict[str, Any]


def section(name: str) -> str:
    """What stands in the block of this name."""
    return _SECTIONS[name]()


def _in_module(module: str) -> str:
    kinds = [kind for kind in BY_NAME.values() if kind.__module__.endswith(f".{module}")]
    assert kinds, f"no event is in a module named {module}"
    return "\n\n".join(_sent(kind) for kind in kinds if kind.name not in DERIVED)


def _of_users(*, security: bool) -> str:
    """Those that change users or are about a sign-in, or all others in the same module."""
    kinds = [kind for kind in BY_NAME.values() if kind.__module__ == UserEvent.__module__]
    return "\n\n".join(
        _sent(kind) for kind in kinds if issubclass(kind, UserEvent | InteractionEvent) != security
    )


def _sent(event: type[Event]) -> str:
    calls = sorted(_calls().get(event.name, {"no call that was recorded"}))
    return _told(event, {"caused by": "; ".join(calls), "about": _subject(event.name)})


def _derived() -> str:
    return "\n\n".join(_told(BY_NAME[each], {"about": "user"}) for each in sorted(DERIVED))


def _local() -> str:
    return "\n\n".join(_told(each, {"about": _local_subject(each)}) for each in LOCAL.values())


def _local_subject(event: type[LocalEvent]) -> str:
    return "organization" if issubclass(event, LocalOrganizationEvent) else "user"


def _told(event: type[Event] | type[LocalEvent], more: dict[str, str]) -> str:
    lines = more | {"fields": _fields(event, without=Event)}
    doc = re.sub(r"\s+", " ", event.__doc__ or "").strip()
    return "\n".join(
        [
            f"### `{event.name}`",
            "",
            f"{doc} `events.{event.__name__}`",
            "",
            *(f"- **{name}**: {text}" for name, text in lines.items()),
        ]
    )


def _fields(of: type[Struct], without: type[Struct] | None = None) -> str:
    """Names and types, but for those that another class has, too."""
    shared = without.__struct_fields__ if without else ()
    hints = get_type_hints(of)
    own = [name for name in of.__struct_fields__ if name not in shared]
    return ", ".join(f"`{name}: {_type(hints[name])}`" for name in own) or "those of all"


def _type(hint: Any) -> str:
    if isinstance(hint, type) and not hasattr(hint, "__args__"):
        return hint.__name__
    plain = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(hint))
    plain = re.sub(r"Literal\[.*?\]", "str", plain).replace(" | UnsetType", "")
    return re.sub(r"Optional\[(\w+)\]", r"\1 | None", plain)


def _records() -> str:
    kinds = (User, Organization, Role, Scope, Application, UserRow, OrganizationRow)
    lines = [f"- `{each.__name__}`: {_fields(each)}" for each in kinds]
    return "\n".join(lines)


def _aliases() -> str:
    lines = [f"| `{alias}` | [`{name}`](#{anchor(name)}) |" for alias, name in ALIASES.items()]
    return "\n".join(["| it says | it is |", "| --- | --- |", *lines])


def anchor(name: str) -> str:
    """What GitHub makes of an event's title."""
    return name.replace(".", "").lower()


def _subject(name: str) -> str:
    made = payloads.payload(name, at=0, rng=random.Random(0))
    subject = identify(trust(msgspec.json.encode(made)), 0).subject
    return subject.partition(":")[0].replace("-", " ") if subject else "nothing known"


@functools.cache
def _calls() -> dict[str, set[str]]:
    """By event: the calls of Logto's API that sent it, in all that was recorded."""
    calls: dict[str, set[str]] = {}
    for body in _bodies():
        payload = msgspec.json.decode(body)
        if not is_test(payload):
            calls.setdefault(payload["event"], set()).add(_call(payload))
    return calls


def _bodies() -> Iterator[bytes]:
    yield from (each.body.encode() for each in recorded.deliveries() if "\\ud8" not in each.body)
    for name in history.NAMES:
        yield from (each.body for each in history.load(name).deliveries)


def _call(payload: Json) -> str:
    if route := payload.get("matchedRoute"):
        return f"`{payload['method']} {route}`"
    if kind := payload.get("interactionEvent"):
        return f"a person, without a route (`interactionEvent` is `{kind}`)"
    return "a person's account page, or `logto-configs`, without a route"


_SECTIONS: Final = {
    "users": lambda: _of_users(security=False),
    "organizations": lambda: _in_module("organizations"),
    "rbac": lambda: _in_module("rbac"),
    "security": lambda: _of_users(security=True),
    "derived": _derived,
    "local": _local,
    "all": lambda: _fields(Event),
    "records": _records,
    "aliases": _aliases,
}
