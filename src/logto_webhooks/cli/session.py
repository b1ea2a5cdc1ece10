"""Run a command's coroutine, with an `Admin` or the application's handlers (`--app`)."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from logto_webhooks.admin import Admin, locate
from logto_webhooks.database import Database
from logto_webhooks.errors import ApplicationMissing, LogtoWebhooksError, SettingInvalid
from logto_webhooks.event_loop import NOT_CANCELLED
from logto_webhooks.handlers import Handlers
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.file import MapFile, find_map_file, map_tables
from logto_webhooks.settings import Settings

if TYPE_CHECKING:
    from logto_webhooks.app import LogtoWebhooks

T = TypeVar("T")
END_S: Final = 2.0  # for remaining tasks to end
logger = logging.getLogger("logto_webhooks")


def run_admin(
    settings: Settings, work: Callable[[Admin], Coroutine[Any, Any, T]], *, maps: bool = False
) -> T:
    """Run `work` with an `Admin` of these settings. If it `maps`, it writes the tables of the file
    with mappings. Raises MapFileInvalid, InvalidMapping."""
    map_file = find_map_file(settings) if maps else None

    async def run() -> T:
        admin = Admin(lambda: settings)
        try:
            await _map_tables(admin, map_file)
            return await work(admin)
        finally:
            await admin.close()

    return run_async(run())


async def _map_tables(admin: Admin, map_file: MapFile | None) -> None:
    if map_file is not None:
        await admin.database.check()
        await map_tables(admin.database.host, map_file, admin.mappings)


def run_application(settings: Settings, work: Callable[[Admin], Coroutine[Any, Any, T]]) -> T:
    """Run `work` with the application of `--app`, on its own database, and the file with mappings.
    If another database is set, warn, and raise SettingInvalid for an option. Raises like
    `load_application`, ApplicationMissing if there is neither, MapFileInvalid, and InvalidMapping.
    """
    application = load_application(settings)
    map_file = find_map_file(settings)
    if application is None and map_file is None:
        raise ApplicationMissing
    if application is None:
        return run_admin(settings, work, maps=True)
    _check_database(settings, application)

    async def run() -> T:
        try:
            await _map_tables(application, map_file)
            application.mappings.check_complete()
            return await work(application)
        finally:
            await application.close()

    return run_async(run())


def _check_database(settings: Settings, application: LogtoWebhooks) -> None:
    for name in ("database_url", "schema"):
        source = settings.sources.get(name)
        if source is None:
            continue
        ours: str | None
        theirs: str | None
        ours, theirs = settings.schema, application.schema
        if name == "database_url":
            ours, theirs = locate(Admin(lambda: settings).database), locate(application.database)
        if ours == theirs:
            continue
        shown = theirs or "the connection's default"
        if source.startswith("--"):
            problem = f"the application has its own, {shown}: leave the option out"
            raise SettingInvalid(name=source, problem=problem)
        logger.warning("%s has no effect here: the application uses %s.", source, shown)


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, if it is installed: it serves several times as many requests.

    If tasks of the application don't end within `END_S` after `main`, the process exits. Raises
    KeyboardInterrupt on Ctrl-C.
    """
    end = threading.Timer(END_S, _end_process)
    end.daemon = True
    try:
        return _find_run()(_run_then_start(main, end))
    except RuntimeError as error:
        # uvloop raises it if Ctrl-C comes while the loop ends.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        end.cancel()


def _find_run() -> Callable[[Coroutine[Any, Any, T]], T]:
    try:
        from uvloop import run
    except ImportError:
        return asyncio.run
    return run


async def _run_then_start(main: Coroutine[Any, Any, T], end: threading.Timer) -> T:
    result = await main
    end.start()
    return result


def _end_process() -> None:
    """Exit, because an event loop can't close while a task ignores its cancellation."""
    logger.warning(NOT_CANCELLED)
    logging.shutdown()
    os._exit(0)


def load_code(
    settings: Settings, database: Database | None = None, used: Collection[str] = ()
) -> tuple[Handlers, Mappings]:
    """Return the application's handlers and mappings, if there are any. Warn if they will run on a
    `database` that isn't the application's, and if one of the `used` settings isn't its own. Raises
    like `load_application`."""
    application = load_application(settings, database)
    if application is None:
        return Handlers(), Mappings()
    if database is not None:
        _warn_about_database(locate(database), locate(application.database), settings)
    if ignored := [name for name in application.list_ignored(settings) if name in used]:
        variables = ", ".join(settings.name_of(name) for name in ignored)
        logger.warning(
            "These arguments of LogtoWebhooks(…) have no effect here: %s. Set %s, or use "
            "LogtoWebhooks.from_env().",
            ", ".join(ignored),
            variables,
        )
    return application.handlers, application.mappings


def _warn_about_database(ours: str, theirs: str, settings: Settings) -> None:
    if ours == theirs:
        return
    from logto_webhooks.doctor.faults import make_finding

    setting = settings.name_of("database_url")
    finding = make_finding("application_database", ours=ours, theirs=theirs, setting=setting)
    logger.warning("%s %s", finding.text, finding.do)


def load_application(settings: Settings, database: Database | None = None) -> LogtoWebhooks | None:
    """Import the application from the import path or the current folder. Give it these settings,
    and `database` if it isn't None.

    Raises SettingInvalid, and errors of this package that the application's module raises.
    """
    if settings.app is None:
        return None
    # Imported here, so that a command that only reads the database loads no web framework.
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
        named = vars(sys.modules[module]).items()
        found = [name for name, value in named if isinstance(value, LogtoWebhooks)]
        meant = f"; did you mean {module}:{found[0]}?" if found else ""
        problem = f"{settings.app} isn't a LogtoWebhooks object"
        if application is None:
            problem = f"there is no {name} in {module}"
        raise _invalid(settings, f"{problem}{meant}")
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
        problem = f"there is no module {error.name} on the import path"
        if error.name != module and not module.startswith(f"{error.name}."):
            problem = f"{problem}, which {module} imports"
        raise _invalid(settings, problem) from None
    except (Exception, SystemExit) as error:
        raised = f"{module} raised {type(error).__name__}{_find_place(error)}{_quote(error)}"
        if isinstance(error, KeyError) and (variable := _missing_variable(error)):
            raised = f"{raised}: {variable} isn't in the environment"
            advice = (
                ".env isn't exported to your application: use LogtoWebhooks.from_env(), or export "
                "it"
            )
        else:
            advice = f"run python -c 'import {module}' to see where"
        raise _invalid(settings, f"{raised}; {advice}") from None
    return value


def _quote(error: BaseException) -> str:
    """Return the message of an error if it is about names in code: others may contain a secret."""
    message = str(error)
    is_about_code = type(error) in (AttributeError, NameError, ImportError) or (
        type(error) is TypeError and re.match(r"[\w.<>]+\(\) (got|missing|takes) ", message)
    )
    return f": {message.rstrip('.')}" if is_about_code and "\n" not in message else ""


def _find_place(error: BaseException) -> str:
    """Return the last line of the application that led to an error, if it is in this folder."""
    here = f"{os.getcwd()}{os.sep}"
    lines = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if isinstance(error, SyntaxError):
        lines.append((error.filename or "", error.lineno or 0))
    own = [
        f" at {file.removeprefix(here)}:{line}"
        for file, line in lines
        if file.startswith(here) and not file.startswith((sys.prefix, sys.base_prefix))
    ]
    return own[-1] if own else ""


def _missing_variable(error: KeyError) -> str | None:
    """Return the name of the variable that `os.environ` lacks, if it raised the error."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    name = str(error.args[0]) if error.args else ""
    is_variable = re.fullmatch("[A-Z][A-Z0-9_]*", name) is not None
    return name if is_variable and frame.f_globals.get("__name__") == os.__name__ else None


def _invalid(settings: Settings, problem: str) -> SettingInvalid:
    return SettingInvalid(name=settings.name_of("app"), problem=problem)
