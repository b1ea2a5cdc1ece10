"""What all errors are."""

from __future__ import annotations

import inspect


class LogtoWebhooksError(Exception):
    """Something in logto-webhooks went wrong."""

    def __init__(self, **data: object) -> None:
        super().__init__(*data.values())
        self.__dict__.update(data)

    def __str__(self) -> str:
        template = inspect.cleandoc(type(self).__doc__ or type(self).__name__)
        return " ".join(template.format(**self.__dict__).split())


def described(error: Exception) -> str:
    """Name an error without what it may quote of a payload or a statement."""
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    return f"unexpected {type(error).__name__}"
