"""Applying without receiving: `worker`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Annotated

import typer

from logto_webhooks import signals
from logto_webhooks.cli import event_loop, options, progress
from logto_webhooks.cli.load_app import load_handlers
from logto_webhooks.database import Database, database_for, for_another_loop
from logto_webhooks.ingest.spool import unspooling
from logto_webhooks.instrumentation import logs
from logto_webhooks.instrumentation.events import (
    DeliveryFailed,
    DeliverySynced,
    Observer,
    TelemetryEvent,
)
from logto_webhooks.plural import Count
from logto_webhooks.runtime import WorkerGroup
from logto_webhooks.settings import Settings
from logto_webhooks.states import DeliveryState

logger = logging.getLogger("logto_webhooks")


def worker(
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    max_attempts: options.MaxAttempts = None,
    lag_ms: options.LagMs = None,
    replay_window_s: options.ReplayWindow = None,
    spool_dir: options.SpoolDir = None,
    app: options.App = None,
    log_format: options.LogFormat = None,
    log_level: options.LogLevel = None,
    env_file: options.EnvFile = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="End when nothing is pending any more.")
    ] = False,
) -> None:
    """Apply what is in the inbox, without receiving."""
    settings = options.settings(
        env_file,
        database_url=database_url,
        schema=schema,
        max_attempts=max_attempts,
        lag_ms=lag_ms,
        replay_window_s=replay_window_s,
        spool_dir=spool_dir,
        app=app,
        log_format=log_format,
        log_level=log_level,
    )
    if not drain:
        logs.configure(settings.log_format, settings.log_level)
        event_loop.run_async(_work(settings))
        return
    with progress.bar("deliveries", silent=settings.log_format == "json") as bar:
        logs.configure(settings.log_format, settings.log_level)  # writes above the bar
        done = event_loop.run_async(_drain(settings, bar))
    if not done:
        raise typer.Exit(progress.STOPPED)


async def _work(settings: Settings) -> None:
    async with _working(settings, logs.observe, apart_too=True) as (work, _):
        await work.run()
        logger.info("stopped")


async def _drain(settings: Settings, bar: progress.Bar) -> bool:
    """Return False if it was stopped before the end."""
    applied, pending = 0, 0

    def observe(report: TelemetryEvent) -> None:
        nonlocal applied
        logs.observe(report)
        if isinstance(report, DeliverySynced | DeliveryFailed):
            applied += 1
            bar.update("deliveries", applied, applied / max(applied, pending))

    async with _working(settings, observe) as (work, database):
        pending = await _pending(database)
        await work.drain()
        if not work.worker.stopping:
            logger.info("nothing is pending")
            return True
        left = f"{Count(await _pending(database)):delivery|deliveries}"
        logger.warning("stopped, with %s pending; run it again to go on", left)
        return False


async def _pending(database: Database) -> int:
    return (await database.host.read(lambda store: store.status())).deliveries[
        DeliveryState.PENDING
    ]


@contextlib.asynccontextmanager
async def _working(
    settings: Settings, observe: Observer, *, apart_too: bool = False
) -> AsyncIterator[tuple[WorkerGroup, Database]]:
    """What works on the database, until SIGTERM or SIGINT; with `apart_too`, handlers on an event
    loop of their own."""
    database = database_for(settings)
    apart = for_another_loop(database, settings) if apart_too else None
    handlers = load_handlers(settings, apart or database)
    work = WorkerGroup(settings, database, observe, handlers, apart)
    signals.on_stop(work.stop)
    try:
        await database.check()
        logger.info("working on %s", database.name)
        async with unspooling(settings, database, observe, work.wake):
            with handlers.in_use():
                yield work, database
    finally:
        await database.host.close()
