"""Running the service: `serve`."""

from __future__ import annotations

import logging
from functools import partial

from logto_webhooks import server
from logto_webhooks.cli import event_loop, options
from logto_webhooks.cli.load_app import load_handlers
from logto_webhooks.database import database_for, for_another_loop, read_status
from logto_webhooks.ingest.spool import spool_of
from logto_webhooks.instrumentation import logs
from logto_webhooks.instrumentation.logs import fan_out
from logto_webhooks.instrumentation.prometheus import Metrics
from logto_webhooks.runtime import Service
from logto_webhooks.settings import Settings

logger = logging.getLogger("logto_webhooks")


def serve(
    signing_key: options.SigningKey = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    worker: options.WithWorker = None,
    host: options.Host = None,
    port: options.Port = None,
    path: options.Path_ = None,
    max_body_bytes: options.MaxBody = None,
    max_attempts: options.MaxAttempts = None,
    lag_ms: options.LagMs = None,
    replay_window_s: options.ReplayWindow = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    api_budget: options.ApiBudget = None,
    recover_every_s: options.RecoverEvery = None,
    reconcile_every_s: options.ReconcileEvery = None,
    silence_after_s: options.SilenceAfter = None,
    public_url: options.PublicUrl = None,
    spool_dir: options.SpoolDir = None,
    app: options.App = None,
    log_format: options.LogFormat = None,
    log_level: options.LogLevel = None,
    env_file: options.EnvFile = None,
) -> None:
    """Receive Logto's webhooks, and apply them, in one process."""
    settings = options.settings(
        env_file,
        signing_key=signing_key,
        database_url=database_url,
        schema=schema,
        worker=worker,
        host=host,
        port=port,
        path=path,
        max_body_bytes=max_body_bytes,
        max_attempts=max_attempts,
        lag_ms=lag_ms,
        replay_window_s=replay_window_s,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        api_budget=api_budget,
        recover_every_s=recover_every_s,
        reconcile_every_s=reconcile_every_s,
        silence_after_s=silence_after_s,
        public_url=public_url,
        spool_dir=spool_dir,
        app=app,
        log_format=log_format,
        log_level=log_level,
    )
    logs.configure(settings.log_format, settings.log_level)
    event_loop.run_async(_serve(settings))
    logger.info("stopped")


async def _serve(settings: Settings) -> None:
    database = database_for(settings)
    spool = spool_of(settings)
    metrics = Metrics(partial(read_status, database), spooled=spool.count if spool else None)
    observe = fan_out(logs.observe, metrics.observe)
    apart = for_another_loop(database, settings)
    handlers = load_handlers(settings, apart)
    service = Service(settings, database, observe, handlers, metrics.scrape, apart)
    await database.open()
    listener = server.listen(settings.host, settings.port)
    address = settings.url_at(listener.getsockname()[1])
    logger.info("listening on %s, keeping its data in %s", address, database.name)
    await server.Server(service.app, listener).run()
