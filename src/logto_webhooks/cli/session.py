"""Run a command's coroutine, with an `Admin`, and with the application's handlers (`--app`)."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from logto_webhooks.admin import Admin
from logto_webhooks.database import Database
from logto_webhooks.errors import LogtoWebhooksError, SettingInvalid
from logto_webhooks.event_loop import NOT_CANCELLED
from logto_webhooks.handlers import Handlers
from logto_webhooks.settings import Settings

if TYPE_CHECKING:
    from logto_webhooks.app import LogtoWebhooks

T = TypeVar("T")
END_S: Final = 2.0  # for tasks that are left when all is done
logger = logging.getLogger("logto_webhooks")


def run_admin(settings: Settings, work: Callable[[Admin], Coroutine[Any, Any, T]]) -> T:
    """Run something with an `Admin` of these settings."""

    async def run() -> T:
        admin = Admin(lambda: settings)
        try:
            return await work(admin)
        finally:
            await admin.close()

    return run_async(run())


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, which serves several times as many requests, if it is installed.

    Tasks that don't end after `main` does, or when they are cancelled, end with the process.
    """
    end = threading.Timer(END_S, _end_process)
    end.daemon = True
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_run_then_start(main, end))
    else:
        return uvloop.run(_run_then_start(main, end))
    finally:
        end.cancel()


async def _run_then_start(main: Coroutine[Any, Any, T], end: threading.Timer) -> T:
    result = await main
    end.start()
    return result


def _end_process() -> None:
    """No event loop closes while a task of an application's ignores its cancellation."""
    logger.warning(NOT_CANCELLED)
    logging.shutdown()
    os._exit(0)


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
    # Here, so that a command that only reads the database starts without a web framework.
    from logto_webhooks.app import LogtoWebhooks

    module, colon, name = settings.app.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        problem = f"{settings.app!r} isn't of the form module:name, such as app.logto:logto"
        raise _invalid(settings, problem)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    application = _import(settings, module, name)
    if not isinstance(application, LogtoWebhooks):
        problem = f"{settings.app} isn't a LogtoWebhooks object"
        raise _invalid(settings, problem)
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
