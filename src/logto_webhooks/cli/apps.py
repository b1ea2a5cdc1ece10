"""The application whose handlers a command runs: `--app module:name`."""

from __future__ import annotations

import importlib
import os
import sys

from logto_webhooks.errors import SettingInvalid
from logto_webhooks.service.handlers import Handlers
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.application import LogtoWebhooks


def handlers_of(settings: Settings) -> Handlers:
    """The handlers of the application; none has none. Raises as below."""
    application = application_of(settings)
    return Handlers() if application is None else application.handlers


def application_of(settings: Settings) -> LogtoWebhooks | None:
    """Import the application, from this folder, too, if one is named. Raises SettingInvalid.

    What the application's own module raises is raised.
    """
    if settings.app is None:
        return None
    module, _, name = settings.app.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _wrong(f"there is no module {error.name}, seen from here") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, LogtoWebhooks):
        raise _wrong(f"{settings.app} is no LogtoWebhooks")
    return found


def _wrong(problem: str) -> SettingInvalid:
    return SettingInvalid(name="LOGTO_WEBHOOKS_APP (--app)", problem=problem)
