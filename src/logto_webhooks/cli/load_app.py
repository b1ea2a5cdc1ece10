"""Import the application whose handlers a command runs: `--app module:name`."""

from __future__ import annotations

import importlib
import os
import sys

from logto_webhooks.app import LogtoWebhooks
from logto_webhooks.database import Database
from logto_webhooks.errors import LogtoWebhooksError, SettingInvalid
from logto_webhooks.handlers import Handlers
from logto_webhooks.settings import Settings


def load_handlers(settings: Settings, database: Database | None = None) -> Handlers:
    """Return the application's handlers; none if the settings name none. Raises as below."""
    application = load_application(settings, database)
    return Handlers() if application is None else application.handlers


def load_application(settings: Settings, database: Database | None = None) -> LogtoWebhooks | None:
    """Import the application that the settings name, also from the current folder, and give it
    these settings, and the database if it is open.

    Raises SettingInvalid, and the errors of this package that the application's own module raises.
    """
    if settings.app is None:
        return None
    module, colon, name = settings.app.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise _invalid(
            settings, f"{settings.app!r} isn't of the form module:name, such as app.logto:logto"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    application = _import(settings, module, name)
    if not isinstance(application, LogtoWebhooks):
        raise _invalid(
            settings, f"{settings.app} isn't a LogtoWebhooks; name the variable that holds one"
        )
    application.run_by(settings, database)
    return application


def _import(settings: Settings, module: str, name: str) -> object:
    try:
        value: object = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part, None)
    except LogtoWebhooksError:
        raise
    except ModuleNotFoundError as error:
        raise _invalid(settings, f"there is no module {error.name} on the import path") from None
    except (Exception, SystemExit) as error:
        # Without its message, which may quote a secret.
        command = f"run python -c 'import {module}' to see where"
        raise _invalid(settings, f"{module} raised {type(error).__name__}; {command}") from None
    return value


def _invalid(settings: Settings, problem: str) -> SettingInvalid:
    return SettingInvalid(name=settings.name_of("app"), problem=problem)
