"""The base class of events, and how an event is built from a payload."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.errors import MalformedEvent

Json = dict[str, Any]
# PostgreSQL's text can't contain NUL, and a colon separates the two ids of a membership.
Id = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\A[^\0:]*\Z")]
LATEST = 253_402_300_799_999  # the end of the year 9999, the latest possible datetime
Millis = Annotated[int, Meta(ge=0, le=LATEST)]
E = TypeVar("E", bound="Event")


class Application(Struct, frozen=True, kw_only=True):
    """The application that the user used."""

    id: str
    name: str | None = None
    type: str | None = None
    description: str | None = None


class Event(Struct, frozen=True, kw_only=True, rename="camel"):
    """The fields of all events. `payload` is the complete payload, including unknown fields.

    If an optional field doesn't have its documented form, it has its default value. Its raw value
    is in `payload`, and its name in `odd_fields`.
    """

    name: ClassVar[str] = ""
    strict: ClassVar[frozenset[str]] = frozenset()  # JSON names of fields that must be valid
    data_as: ClassVar[str | None] = None  # the field for `data`
    id_as: ClassVar[str | None] = None  # the field for the subject's id
    id_param: ClassVar[str] = "id"

    event: str
    created_at: datetime | None = None
    hook_id: str | None = None
    user_agent: str | None = None
    ip: str | None = None
    path: str | None = None
    method: str | None = None
    status: int | None = None
    params: Json = {}
    matched_route: str | None = None
    interaction_event: str | None = None
    session_id: str | None = None
    application_id: str | None = None
    application: Application | None = None
    payload: Json = {}
    odd_fields: tuple[str, ...] = ()

    @property
    def at(self) -> int:
        """When Logto sent it, in milliseconds since the epoch. Raises MalformedEvent."""
        if self.created_at is None:
            raise MalformedEvent(event=self.event, problem="createdAt is missing")
        at = to_millis(self.created_at)
        if not 0 <= at <= LATEST:
            raise MalformedEvent(event=self.event, problem="createdAt is out of range")
        return at

    @classmethod
    def shape(cls, payload: Json) -> Json:
        """Map parts of a payload to the fields of this class, by the route only."""
        shaped: Json = {}
        data = payload.get("data")
        if cls.data_as and data is not None:
            shaped[cls.data_as] = data
        if cls.id_as:
            shaped[cls.id_as] = first_present(
                payload.get(cls.id_as),
                get_from(payload.get("params"), cls.id_param),
                get_from(data, "id"),
            )
        return shaped


class UnknownEvent(Event, frozen=True, kw_only=True):
    """An event that this release doesn't know. `payload` is the complete payload."""


class TestPayload(Event, frozen=True, kw_only=True):
    """A test payload from Logto's console. It can have the name of any event."""

    __test__: ClassVar[bool] = False  # pytest must not collect it


def has_whole_record(payload: Json, routes: Collection[str]) -> bool:
    """Whether `data` is a whole record: from one of `routes`, or from a sign-up, the account API
    and others, which have neither a route nor a path."""
    route = payload.get("matchedRoute")
    return payload.get("path") is None if route is None else route in routes


def first_present(*candidates: Any) -> Any:
    """Return the first candidate that isn't None."""
    return next((candidate for candidate in candidates if candidate is not None), None)


def get_from(part: Any, name: str) -> Any:
    """Return a field of a part of a payload; None if the part isn't an object or lacks it."""
    return part.get(name) if isinstance(part, dict) else None


def to_millis(moment: datetime) -> int:
    """Convert to milliseconds since the epoch. Without a time zone, it is UTC, as in Logto."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1000)


def is_test(payload: Json) -> bool:
    """Recognize a test payload by values that only Logto's server sets and no real record has."""
    if payload.get("path") == "/fake-path/:id":
        return bool(get_from(payload.get("params"), "id") == "fake-id")
    return payload.get("userId") == "fake-id" and payload.get("userAgent") == "fake-user-agent"


def sent_at(payload: Json) -> int | None:
    """Return a payload's `createdAt` (ms); None if it isn't a date of the years 1 to 9999."""
    text = payload.get("createdAt")
    try:
        return to_millis(datetime.fromisoformat(text)) if isinstance(text, str) else None
    except (ValueError, OverflowError):
        return None


def corrected(payload: Json, occurred_at: int) -> int | None:
    """Return the date that replaces an implausible `createdAt`; None if nothing does.

    `occurred_at` (ms) is the delivery's date in the inbox; 0 if it has none. A missing `createdAt`,
    or one that isn't a date, isn't replaced: the payload is malformed.
    """
    text = payload.get("createdAt")
    if not occurred_at or not isinstance(text, str) or not _ANY_DATE.match(text):
        return None
    return None if sent_at(payload) == occurred_at else occurred_at


# JavaScript writes years after 9999 and before 0 with a sign and six digits.
_ANY_DATE = re.compile(r"[+-]?\d{4,6}-\d\d-\d\dT\d\d:\d\d")


def build(payload: Json, cls: type[E], at: int | None = None) -> E:
    """Make the event. `at` (ms) replaces its `createdAt`, if it isn't None.

    Raises MalformedEvent if a field that the sync needs is invalid.
    """
    # `shape` comes last, so that the payload can't override the fields that it sets.
    fields = payload | {"payload": payload, "oddFields": ()} | cls.shape(payload)
    if at is not None:
        fields["createdAt"] = datetime.fromtimestamp(at / 1000, UTC)
    try:
        return msgspec.convert(fields, cls)
    except msgspec.ValidationError:
        odd = _find_odd_fields(fields, cls)
    kept = {name: value for name, value in fields.items() if name not in odd}
    try:
        return msgspec.convert(kept | {"oddFields": odd}, cls)
    except msgspec.ValidationError as error:
        raise MalformedEvent(event=cls.name, problem=str(error)) from None


def _find_odd_fields(fields: Json, cls: type[Event]) -> list[str]:
    odd = []
    for field in msgspec.structs.fields(cls):
        name = field.encode_name
        if name in fields and name not in cls.strict:
            try:
                msgspec.convert(fields[name], field.type)
            except msgspec.ValidationError:
                odd.append(name)
    return odd
