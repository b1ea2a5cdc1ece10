"""How a handler is run."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.core.lifecycle import MAX_ATTEMPTS

T = TypeVar("T")
TIME_LIMIT_S: Final = 60.0
_LONGEST_S: Final = 1e9  # 31 years: what a database can add to a time, and no infinity
Wait = Annotated[float, Meta(ge=0, le=_LONGEST_S)]
Duration = Annotated[float, Meta(gt=0, le=_LONGEST_S)]
Count = Annotated[int, Meta(ge=1)]


class Options(
    Struct,
    frozen=True,
    kw_only=True,
    rename={"time_limit_s": "time_limit", "max_age_s": "max_age"},
):
    """How a handler is run; times in seconds.

    `waits` are those before the second, third, … attempt; without any they grow from 1 s to 15
    min. A job older than `max_age_s` is discarded. `concurrency` is how many of its jobs a process
    runs at once.
    """

    max_attempts: Count = MAX_ATTEMPTS
    waits: tuple[Wait, ...] = ()
    time_limit_s: Duration = TIME_LIMIT_S
    max_age_s: Duration | None = None
    concurrency: Count | None = None


def checked(options: Options) -> Options:
    """The same, if each can be. Raises ValueError, which says what can't."""
    fields = msgspec.structs.fields(Options)
    given = {each.encode_name: getattr(options, each.name) for each in fields}
    return of(given, Options)


def of(given: dict[str, Any], kind: type[T]) -> T:
    """Make a struct of what was given. Raises ValueError, which names what can't be."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        expected, _, where = str(error).partition(" - at `$.")
        raise ValueError(f"{where.rstrip('`')}: {expected}") from None
