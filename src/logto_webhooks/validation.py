"""Validate ids, states and filters before a query uses them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Final, TypeVar
from urllib.parse import urlsplit

from logto_webhooks.deliveries import DeliveryFilter, DeliveryState
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.jobs import JobFilter, JobState

GREATEST_ID: Final = 2**63 - 1
Name = TypeVar("Name", bound=str)
States = TypeVar("States", bound=StrEnum)


def nearest(name: str, names: Collection[str]) -> str:
    """Suggest the most similar name, or all of them."""
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"the closest is {near[0]}" if near else f"use one of {', '.join(names)}"


def strip_url(url: str) -> str:
    """Remove parts that may be secret from a URL: the password and the query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "<invalid URL>"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def check_choice(name: str, value: str, choices: Collection[Name]) -> Name:
    """Check one of several names. Raises SettingInvalid, which suggests one."""
    for choice in choices:
        if choice == value:
            return choice
    problem = f"there is no {value!r}; {nearest(value, choices)}"
    raise SettingInvalid(name=name, problem=problem)


def check_ids(kind: str, ids: Iterable[object]) -> list[int]:
    """Check IDs, and remove duplicates. Raises SettingInvalid."""
    checked: dict[int, None] = {}
    for id in ids:
        if type(id) is not int or not 0 < id <= GREATEST_ID:
            problem = f"{id!r:.60} isn't a positive whole number"
            raise SettingInvalid(name=f"the ID of a {kind}", problem=problem)
        checked[id] = None
    return list(checked)


def check_state(value: str, states: type[States]) -> States:
    """Check a state. Raises SettingInvalid."""
    names = [state.value for state in states]
    if value not in names:
        problem = f"{value!r:.60} isn't one of {', '.join(names)}"
        raise SettingInvalid(name="the state", problem=problem)
    return states(value)


def check_text(name: str, text: str) -> str:
    """Check text that a database can search for. Raises SettingInvalid."""
    try:
        text.encode()
    except UnicodeError:
        raise SettingInvalid(name=name, problem="it isn't UTF-8 text") from None
    if "\0" in text:
        raise SettingInvalid(name=name, problem="it contains a NUL character")
    return text


def check_job_filter(filter: JobFilter) -> JobFilter:
    """Check a filter of jobs. Raises SettingInvalid."""
    check_ids("job", filter.ids or ())
    _check_optional_ids("job", filter.id, filter.after)
    _check_optional_ids("delivery", filter.delivery_id)
    if filter.state is not None:
        check_state(filter.state, JobState)
    _check_texts(handler=filter.handler, event=filter.event, subject=filter.subject)
    check_limit(filter.limit)
    return filter


def check_delivery_filter(filter: DeliveryFilter) -> DeliveryFilter:
    """Check a filter of deliveries. Raises SettingInvalid."""
    _check_optional_ids("delivery", filter.after)
    if filter.state is not None:
        check_state(filter.state, DeliveryState)
    _check_texts(event=filter.event, subject=filter.subject, text=filter.text)
    check_limit(filter.limit)
    return filter


def _check_optional_ids(kind: str, *ids: object) -> None:
    check_ids(kind, [id for id in ids if id is not None])


def _check_texts(**texts: str | None) -> None:
    for name, text in texts.items():
        if text is not None:
            check_text(f"the {name}", text)


_LATEST: Final = 253_402_300_799_999  # the end of the year 9999, in milliseconds


def check_moment(name: str, moment: int | None) -> int | None:
    """Check a time in milliseconds. Raises SettingInvalid."""
    if moment is not None and (type(moment) is not int or not 0 <= moment <= _LATEST):
        problem = f"{moment!r:.60} isn't a time in milliseconds since 1970"
        raise SettingInvalid(name=name, problem=problem)
    return moment


def check_limit(limit: int) -> int:
    """Check how many to list at most. Raises SettingInvalid."""
    if type(limit) is not int or not 0 < limit <= GREATEST_ID:
        problem = f"{limit!r:.60} isn't a whole number from 1 to {GREATEST_ID}"
        raise SettingInvalid(name="the limit", problem=problem)
    return limit


def is_url(text: str) -> bool:
    """Return whether a text is an HTTP URL."""
    if any(character.isspace() or not character.isprintable() for character in text):
        return False  # clients may interpret such a URL differently
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
