"""What all errors are."""

from __future__ import annotations

import inspect
import traceback
from typing import Final

# What is said of an error that nobody foresaw.
REPORT: Final = "this is a bug: report it as docs/troubleshooting.md#unexpected says"
_PACKAGE: Final = "logto_webhooks"


class LogtoWebhooksError(Exception):
    """Something in logto-webhooks went wrong."""

    def __init__(self, **data: object) -> None:
        super().__init__(*data.values())
        self.__dict__.update(data)

    def __str__(self) -> str:
        template = inspect.cleandoc(type(self).__doc__ or type(self).__name__)
        return " ".join(template.format(**self.__dict__).split())


def described(error: BaseException) -> str:
    """Name an error without what it may quote of a payload or a statement; one that nobody foresaw
    with its place in the code, and where to report it."""
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    return f"unexpected {located(error)}; {REPORT}"


def located(error: BaseException) -> str:
    """The kind of an error, and the last line of this package that it went through."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    frames = traceback.walk_tb(error.__traceback__)
    places = [
        f"{name.removeprefix(_PACKAGE).lstrip('.').replace('.', '/')}:{line}"
        for frame, line in frames
        if (name := str(frame.f_globals.get("__name__", ""))).split(".")[0] == _PACKAGE
    ]
    kind = type(error).__name__
    return f"{kind} at {places[-1]}" if places else kind
