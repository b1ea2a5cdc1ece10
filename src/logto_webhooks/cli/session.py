"""Run a command's coroutine on an event loop, and use `Admin` in it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from logto_webhooks.admin import Admin
from logto_webhooks.event_loop import NOT_CANCELLED
from logto_webhooks.settings import Settings

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
    _collect_less()
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


def _collect_less() -> None:
    """Look for garbage cycles seldom: batches make many objects and hardly any cycle, and the
    default of every 700 objects costs a third of the sync."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
