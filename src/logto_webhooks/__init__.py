"""Logto's webhooks, received durably, and an exact copy of Logto's users and organizations."""

import importlib
from typing import TYPE_CHECKING, Any

from logto_webhooks import events
from logto_webhooks.errors import Discard, LogtoWebhooksError, RetryLater, UserIsDeletedError
from logto_webhooks.events.local import OrganizationRow, UserRow
from logto_webhooks.jobs import Delivery
from logto_webhooks.signing_keys import VerifiedBody, sign, verify

if TYPE_CHECKING:
    from logto_webhooks import tables
    from logto_webhooks.app import LogtoWebhooks

__all__ = [
    "Delivery",
    "Discard",
    "LogtoWebhooks",
    "LogtoWebhooksError",
    "OrganizationRow",
    "RetryLater",
    "UserIsDeletedError",
    "UserRow",
    "VerifiedBody",
    "events",
    "sign",
    "tables",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import what needs SQLAlchemy or Starlette only when it is asked for."""
    if name == "LogtoWebhooks":
        from logto_webhooks.app import LogtoWebhooks

        return LogtoWebhooks
    if name == "tables":
        return importlib.import_module("logto_webhooks.tables")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What can be asked for, imported or not."""
    return sorted({*globals(), *__all__})
