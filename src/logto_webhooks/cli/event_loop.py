"""Running a command on an event loop, to an end that comes whatever is left running."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from logto_webhooks.handlers.loop_thread import NOT_CANCELLED

T = TypeVar("T")
END_S: Final = 2.0  # for what is left once all is done
logger = logging.getLogger("logto_webhooks")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop's event loop, where there is one: it serves several times as many.

    What doesn't end by itself after `main`, or when it is cancelled, ends with the process.
    """
    _collect_less()
    end = threading.Timer(END_S, _end_all)
    end.daemon = True
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_then(main, end))
    else:
        return uvloop.run(_then(main, end))
    finally:
        end.cancel()


async def _then(main: Coroutine[Any, Any, T], end: threading.Timer) -> T:
    result = await main
    end.start()
    return result


def _end_all() -> None:
    """No loop closes while a task of an application's won't be cancelled."""
    logger.warning(NOT_CANCELLED)
    logging.shutdown()
    os._exit(0)


def _collect_less() -> None:
    """Look for cycles of garbage seldom: batches make much, and hardly any cycle, and the
    default of every 700 objects costs a third of the sync."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
