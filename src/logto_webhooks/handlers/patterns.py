"""What a handler is for: events by class, by name, or by a pattern of names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final

from logto_webhooks.errors import InvalidHandler, UnknownEventName
from logto_webhooks.events import Event, TestPayload, UnknownEvent
from logto_webhooks.events.local import LOCAL, LocalEvent
from logto_webhooks.events.registry import ALIASES, BY_NAME, DERIVED
from logto_webhooks.handlers.matching import wants
from logto_webhooks.jobs import Tests

What = type[Event] | type[LocalEvent] | str
_KNOWN: Final[dict[str, type[Event] | type[LocalEvent]]] = {**BY_NAME, **LOCAL}
_SENT: Final = tuple(name for name in BY_NAME if name not in DERIVED)
_EACH: Final = 'Give classes such as events.UserCreated, or names, each by itself; for all, "*".'
_BY_NAME_ONLY: Final = (
    'What is made here is meant by its name alone, or by a pattern that begins with "Local" or '
    '"Organization.User.".'
)
_NO_TEST: Final = "Logto's console sends no test of what is made here."


def parse_patterns(what: Sequence[What], *, unknown: bool, tests: Tests) -> tuple[str, ...]:
    """The names and patterns of what is given; each means an event that can come, by the very rule
    by which jobs are made. `unknown` lets pass what this release doesn't know.

    Raises UnknownEventName, and InvalidHandler for a function.
    """
    return tuple(dict.fromkeys(_pattern(each, unknown, tests) for each in what))


def match_classes(patterns: Sequence[str], tests: Tests) -> list[type]:
    """The classes of the events that a handler is given."""
    if tests == "only":
        return [TestPayload]
    meant = [name for name in _KNOWN if _mean(patterns, name)]
    found: list[type] = [_KNOWN[name] for name in meant]
    if any(each == "*" or not _comes(each, tuple(_KNOWN)) for each in patterns):
        found.append(UnknownEvent)
    if tests == "too" and any(name in _SENT for name in meant):
        found.append(TestPayload)
    return found


def _pattern(what: What, unknown: bool, tests: Tests) -> str:
    name = _name(what)
    names = _SENT if tests == "only" else tuple(_KNOWN)
    if _comes(name, names) or (unknown and name and name.isprintable()):
        return name
    raise UnknownEventName(name=name, hint=_hint(name, tests))


def _name(what: Any) -> str:
    if isinstance(what, str):
        return ALIASES.get(what, what)
    if not isinstance(what, type):
        if callable(what):
            problem = "write what it is for, in parentheses: @logto.on(events.UserCreated)"
            raise InvalidHandler(name=getattr(what, "__qualname__", repr(what)), problem=problem)
        raise UnknownEventName(name=what, hint=_EACH)
    if issubclass(what, Event | LocalEvent) and what.name:
        return what.name
    raise UnknownEventName(name=what.__name__, hint=_EACH)


def _hint(name: str, tests: Tests) -> str:
    if any(fnmatchcase(each, name) for each in _KNOWN):
        return _NO_TEST if tests == "only" else _BY_NAME_ONLY
    if "*" in name or "?" in name:
        return "No event that this release knows is like that."
    near = get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(_KNOWN)}."


def _mean(patterns: Sequence[str], name: str) -> bool:
    return any(wants(each, name) for each in patterns)


def _comes(pattern: str, names: Sequence[str]) -> bool:
    return any(wants(pattern, each) for each in names)
