"""Run the service (`serve`), or only its worker (`worker`), which receives no deliveries."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Final

from typer import Exit, Option

from logto_webhooks import event_loop, server
from logto_webhooks.cli import output
from logto_webhooks.cli.options import DATABASE, LOGS, OPTIONS, with_settings
from logto_webhooks.cli.session import load_code, run_async
from logto_webhooks.database import Database, database_for, for_another_loop, read_status
from logto_webhooks.deliveries import DeliveryState
from logto_webhooks.ingest.spool import spool_of, unspool_in_background
from logto_webhooks.instrumentation import (
    DeliveryFailed,
    DeliverySynced,
    Observer,
    TelemetryEvent,
    logs,
)
from logto_webhooks.instrumentation.logs import fan_out
from logto_webhooks.instrumentation.prometheus import Metrics
from logto_webhooks.mapping.file import find_map_file
from logto_webhooks.plural import Count
from logto_webhooks.runtime import Service, WorkerGroup
from logto_webhooks.settings import Settings

logger = logging.getLogger("logto_webhooks")


@with_settings(*OPTIONS)
def serve(settings: Settings) -> None:
    """Receive Logto's webhooks and apply them."""
    logs.configure(settings.log_format, settings.log_level)
    gc.unfreeze()  # otherwise, `no_collection` can't keep large values from the collector
    run_async(_serve(settings))
    logger.info("stopped")


async def _serve(settings: Settings) -> None:
    database = database_for(settings)
    spool = spool_of(settings)
    metrics = Metrics(partial(read_status, database), spooled=spool.count if spool else None)
    observe = fan_out(logs.observe, metrics.observe)
    apart = for_another_loop(database, settings)
    handlers, mappings = load_code(settings, apart, OPTIONS)
    map_file = find_map_file(settings)
    service = Service(
        settings, database, observe, handlers, metrics.scrape, apart, mappings, map_file
    )
    await service.open()
    listener = server.listen(settings.host, settings.port)
    address = settings.url_at(listener.getsockname()[1])
    logger.info("listening on %s, storing data in %s", address, database.name)
    await server.Server(service.app, listener, service.hurry).run()


_WORKER: Final = (
    *DATABASE,
    "max_attempts",
    "lag_ms",
    "replay_window_s",
    "spool_dir",
    "app",
    "map_file",
    *LOGS,
)


@with_settings(*_WORKER)
def worker(
    settings: Settings,
    drain: Annotated[bool, Option("--drain", help="Exit when nothing is pending.")] = False,
) -> None:
    """Apply deliveries in the inbox without receiving new ones."""
    gc.unfreeze()  # as in `serve`
    if not drain:
        logs.configure(settings.log_format, settings.log_level)
        run_async(_work(settings))
        return
    with output.show_progress("deliveries", silent=settings.log_format == "json") as bar:
        logs.configure(settings.log_format, settings.log_level)  # writes above the bar
        is_done = run_async(_drain(settings, bar))
    if not is_done:
        raise Exit(output.STOPPED)


async def _work(settings: Settings) -> None:
    async with _open_workers(settings, logs.observe, apart_too=True) as (workers, _):
        await workers.run()
        logger.info("stopped")


async def _drain(settings: Settings, bar: output.Bar) -> bool:
    """Return False if it was stopped before the end."""
    applied, pending = 0, 0

    def observe(event: TelemetryEvent) -> None:
        nonlocal applied
        logs.observe(event)
        if isinstance(event, DeliverySynced | DeliveryFailed):
            applied += 1
            bar.update("deliveries", applied, applied / max(applied, pending))

    async with _open_workers(settings, observe) as (workers, database):
        pending = await _count_pending(database)
        await workers.drain()
        if not workers.delivery_worker.stopping:
            logger.info("nothing is pending")
            return True
        left = f"{Count(await _count_pending(database)):delivery|deliveries}"
        logger.warning("stopped with %s pending; run it again to continue", left)
        return False


async def _count_pending(database: Database) -> int:
    status = await database.host.read_long(lambda store: store.status())
    return status.deliveries[DeliveryState.PENDING]


@contextlib.asynccontextmanager
async def _open_workers(
    settings: Settings, observe: Observer, *, apart_too: bool = False
) -> AsyncIterator[tuple[WorkerGroup, Database]]:
    """Open the database and its workers, until a signal. With `apart_too`, handlers run on
    a separate event loop."""
    database = database_for(settings)
    apart = for_another_loop(database, settings) if apart_too else None
    handlers, mappings = load_code(settings, apart or database, _WORKER)
    map_file = find_map_file(settings)
    workers = WorkerGroup(settings, database, observe, handlers, apart, mappings, map_file)
    event_loop.on_stop(workers.stop)
    try:
        await database.check()
        await workers.read_map_file()
        if database.may_work():
            logger.info("working on %s", database.name)
        async with unspool_in_background(settings, database, observe, workers.delivery_worker.wake):
            with handlers.in_use():
                yield workers, database
    finally:
        await database.host.close()
        logs.sum_up()
