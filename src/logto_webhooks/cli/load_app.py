"""The application whose handlers a command runs: `--app module:name`."""

from __future__ import annotations

import importlib
import os
import sys

from logto_webhooks.app import LogtoWebhooks
from logto_webhooks.database import Database
from logto_webhooks.errors import LogtoWebhooksError, SettingInvalid
from logto_webhooks.handlers.registry import Handlers
from logto_webhooks.settings import Settings


def load_handlers(settings: Settings, database: Database | None = None) -> Handlers:
    """The handlers of the application; none has none. Raises as below."""
    application = load_application(settings, database)
    return Handlers() if application is None else application.handlers


def load_application(settings: Settings, database: Database | None = None) -> LogtoWebhooks | None:
    """Import the application, from this folder, too, if one is named, and give it the settings,
    and the database that they name, if that is open.

    Raises SettingInvalid, and the errors of this package that the application's own module raises.
    """
    if settings.app is None:
        return None
    module, colon, name = settings.app.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not colon or not all(each.isidentifier() for each in parts):
        raise _wrong(f"{settings.app!r} isn't of the form module:name, such as app.logto:logto")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = _imported(module, name)
    if not isinstance(found, LogtoWebhooks):
        raise _wrong(f"{settings.app} is no LogtoWebhooks: name the variable that is one")
    found.run_by(settings, database)
    return found


def _imported(module: str, name: str) -> object:
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part, None)
    except LogtoWebhooksError:
        raise
    except ModuleNotFoundError as error:
        raise _wrong(f"there is no module {error.name}, seen from here") from None
    except (Exception, SystemExit) as error:
        # Not what it says: that may quote a secret.
        seen = f"run python -c 'import {module}' to see where"
        raise _wrong(f"{module} raised {type(error).__name__}; {seen}") from None
    return found


def _wrong(problem: str) -> SettingInvalid:
    return SettingInvalid(name="LOGTO_WEBHOOKS_APP (--app)", problem=problem)
