"""Validate ids, states and filters before a query uses them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Final, TypeVar
from urllib.parse import urlsplit

from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.jobs import JobFilter
from logto_webhooks.states import DeliveryState, JobState

GREATEST_ID: Final = 2**63 - 1
Name = TypeVar("Name", bound=str)
States = TypeVar("States", bound=StrEnum)


def nearest(given: str, known: Collection[str]) -> str:
    """Which of the known names is likely meant."""
    near = get_close_matches(given, known, n=1, cutoff=0.5)
    return f"the nearest is {near[0]}" if near else f"known are {', '.join(known)}"


def check_choice(name: str, given: str, known: Collection[Name]) -> Name:
    """One of some names. Raises SettingInvalid, which says which is likely meant."""
    for each in known:
        if each == given:
            return each
    problem = f"there is no {given!r}, {nearest(given, known)}"
    raise SettingInvalid(name=name, problem=problem)


def check_ids(what: str, given: Iterable[object]) -> list[int]:
    """The ids, each once. Raises SettingInvalid for what can be none."""
    found: dict[int, None] = {}
    for each in given:
        if type(each) is not int or not 0 < each <= GREATEST_ID:
            problem = f"{each!r:.60} is no id: that is a whole number from 1 on"
            raise SettingInvalid(name=f"the id of a {what}", problem=problem)
        found[each] = None
    return list(found)


def check_state(given: str, states: type[States]) -> States:
    """One of the states. Raises SettingInvalid."""
    known = [each.value for each in states]
    if given not in known:
        problem = f"{given!r:.60} is none of {', '.join(known)}"
        raise SettingInvalid(name="the state", problem=problem)
    return states(given)


def check_text(what: str, given: str) -> str:
    """A text that a database can look for. Raises SettingInvalid."""
    try:
        given.encode()
    except UnicodeError:
        raise SettingInvalid(name=what, problem="it isn't UTF-8 text") from None
    if "\0" in given:
        raise SettingInvalid(name=what, problem="it has a NUL, which no text here has")
    return given


def check_job_filter(wanted: JobFilter) -> JobFilter:
    """A filter that can be asked for. Raises SettingInvalid."""
    check_ids("job", wanted.ids or ())
    _checked("job", wanted.id, wanted.after)
    _checked("delivery", wanted.delivery_id)
    if wanted.state is not None:
        check_state(wanted.state, JobState)
    _texts(handler=wanted.handler, event=wanted.event, subject=wanted.subject)
    limited(wanted.limit)
    return wanted


def check_delivery_filter(wanted: DeliveryFilter) -> DeliveryFilter:
    """A filter that can be asked for. Raises SettingInvalid."""
    _checked("delivery", wanted.after)
    if wanted.state is not None:
        check_state(wanted.state, DeliveryState)
    _texts(event=wanted.event, subject=wanted.subject, text=wanted.text)
    limited(wanted.limit)
    return wanted


def _checked(what: str, *given: object) -> None:
    check_ids(what, [each for each in given if each is not None])


def _texts(**given: str | None) -> None:
    for name, each in given.items():
        if each is not None:
            check_text(f"the {name}", each)


def limited(limit: int) -> int:
    """How many to list at most. Raises SettingInvalid."""
    if type(limit) is not int or not 0 < limit <= GREATEST_ID:
        problem = f"{limit!r:.60} isn't 1 or more, up to {GREATEST_ID}"
        raise SettingInvalid(name="the limit", problem=problem)
    return limit


def is_url(text: str) -> bool:
    """Return whether you can post to it."""
    if any(character.isspace() or not character.isprintable() for character in text):
        return False  # what reads it would take it for another
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
