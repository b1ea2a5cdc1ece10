"""The checks of `doctor`. Each reads facts from the context and returns findings."""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from logto_webhooks.clock import SystemClock, to_iso
from logto_webhooks.database.mapped_rows import NOT_WRITTEN, UnwrittenRows
from logto_webhooks.database.migrate import is_number, is_usable
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import (
    RECENT,
    DeliveryFilter,
    DeliveryState,
    MappingStatus,
    typical_delay,
)
from logto_webhooks.doctor.context import DAY_MS, CheckContext, ProbeResult, probe_url
from logto_webhooks.doctor.faults import (
    Finding,
    make_finding,
    make_ok,
    make_skipped,
)
from logto_webhooks.errors import LogtoApiError, LogtoUnreachable, SettingInvalid, StoreUnavailable
from logto_webhooks.jobs import JobCount, JobState, RegisteredHandler
from logto_webhooks.logto.api_responses import ApiResponse
from logto_webhooks.logto.errors import signs_of_admin
from logto_webhooks.logto.webhooks import Webhook, subscription
from logto_webhooks.plural import Count
from logto_webhooks.settings import CREDENTIALS
from logto_webhooks.signing_keys import (
    SHORTEST,
    Keyring,
    WebhookKey,
    fingerprint,
    problem_of_key,
    problem_of_secret,
)
from logto_webhooks.validation import strip_url

_PENDING_S: Final = 60
_WAITING_S: Final = 600  # longer than the first retries of a job take
_UNSETTLED_S: Final = 600
_OWED_S: Final = 60  # much longer than until the next try
_MAYBE_APP: Final = ", with --app if your application has the mappings"
_GROUPS: Final = 3  # reasons for which rows wait
_SKEW_MS: Final = 5_000
_UNREAD: Final = 3  # times the interval at which Logto's log is read
_DEAD_ROWS: Final = 10_000  # harmless in any table
_MB: Final = 2**20
_FULL: Final = 16  # the disk counts as full at a 16th of the least free space
_SLOW: Final = 0.3  # share of the time limit of a response
_DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")
_UNSIGNED: Final = (401, "invalid_signature")  # our own response to an unsigned request
_LOSING: Final = (301, 302, 303)
_BY_STATUS: Final = {404: "address_not_found", 405: "address_method"}
# Cause of a failed attempt, from logto/delivery_log.py -> the fault.
_CAUSES: Final = {
    "timed out": "log_timed_out",
    "wrong signature": "log_signature",
    "connection refused": "log_refused",
    "connection reset": "log_reset",
    "answered 5xx": "log_failing",
    "answered 4xx": "log_denied",
}


class Check(NamedTuple):
    """A check. It is skipped unless the checks it `needs` passed. It runs after those it `uses`."""

    name: str
    run: Callable[[CheckContext], Awaitable[list[Finding]]]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


async def check_database(context: CheckContext) -> list[Finding]:
    """Check that the database can be reached, and the version of its tables."""
    setting = context.target.database_setting
    try:
        info = await context.database_info()
    except SettingInvalid as error:
        return [make_finding("database_setting", problem=str(error), setting=setting)]
    except StoreUnavailable as error:
        return [make_finding("database_unusable", problem=error.problem, setting=setting)]
    if info.schema is None:
        return [make_finding("schema_missing", place=info.place)]
    if info.schema == info.needed:
        return [make_ok(f"{info.place} has the tables of this release.")]
    if not is_number(info.schema):
        return [make_finding("schema_unknown", found=info.schema)]
    code = "schema_newer" if is_usable(info.schema) else "schema_old"
    return [make_finding(code, found=info.schema, needed=info.needed)]


async def check_durability(context: CheckContext) -> list[Finding]:
    """Check that commits reach the disk."""
    info = await context.database_info()
    off = [f"{name} = off" for name in _DURABLE if info.settings.get(name) == "off"]
    faults = [make_finding("not_durable", settings=off)] if off else []
    if info.settings.get("transaction_read_only") == "on":
        setting = context.target.database_setting
        faults.append(make_finding("database_read_only", setting=setting))
    if info.unwritable is not None:
        faults.append(make_finding("database_unwritable", problem=info.unwritable))
    if not faults and (problem := await context.find_refusal()) is not None:
        faults.append(make_finding("database_unwritable", problem=problem))
    return faults or [make_ok("Each delivery is on disk before it is answered 200.")]


async def check_vacuum(context: CheckContext) -> list[Finding]:
    """Check that no dead rows accumulate in tables that the server doesn't vacuum. SQLite has no
    dead rows, so it gets no finding."""
    unvacuumed = (await context.database_info()).unvacuumed
    if unvacuumed is None:
        return []
    full = [table for table in unvacuumed if table.dead > max(_DEAD_ROWS, table.live // 5)]
    if not full:
        return [make_ok("No dead rows accumulate.")]
    dead = sum(table.dead for table in full)
    return [make_finding("vacuum_off", dead=dead, tables=[table.table for table in full])]


async def check_disk(context: CheckContext) -> list[Finding]:
    """Check the free disk space."""
    info = await context.database_info()
    if info.free is None:
        return [make_skipped("doctor can't check the disk of a database server.")]
    free_mb, least_mb = info.free // _MB, context.target.least_free_mb
    if free_mb >= least_mb:
        return [make_ok(f"{free_mb} MB are free.")]
    code = "disk_full" if free_mb < least_mb // _FULL else "disk_low"
    return [make_finding(code, free_mb=free_mb, place=info.place)]


async def check_files(context: CheckContext) -> list[Finding]:
    """Check that other users can't read files with personal data or keys."""
    modes = context.target.open_files()
    if not modes:
        return [make_ok("Only the owner can read the files.")]
    files = [f"{path} (mode {mode})" for path, mode in modes.items()]
    return [make_finding("files_open", files=files, paths=" ".join(map(shlex.quote, modes)))]


async def check_api(context: CheckContext) -> list[Finding]:
    """Check that the Management API answers."""
    settings = context.settings
    missing = settings.missing_credentials
    if len(missing) == len(CREDENTIALS):
        return [make_finding("api_missing")]
    if missing:
        return [make_finding("api_partial", missing=missing)]
    signs = signs_of_admin(settings.endpoint, settings.app_id)
    try:
        webhooks = await context.webhooks()
    except LogtoUnreachable as error:
        admin = [make_finding("api_admin", signs=signs)] if signs else []
        problem = {"endpoint": error.endpoint, "problem": error.problem}
        return [*admin, make_finding("api_unreachable", **problem)]
    except LogtoApiError as error:
        if signs:
            return [make_finding("api_admin", signs=f"{signs}; Logto refused: {error.problem}")]
        problem = {"endpoint": error.endpoint, "problem": error.problem, "hint": error.hint}
        return [make_finding("api_refused", **problem)]
    if signs:
        return [make_finding("api_admin_answers", signs=signs)]
    return [make_ok(f"Logto answers. It has {Count(len(webhooks)):webhook|webhooks}.")]


async def check_clock(context: CheckContext) -> list[Finding]:
    """Compare our clock with Logto's, and what tells of Logto's with each other."""
    last = (await context.webhook_pages())[-1]
    faults = []
    if abs(skew_ms := _measure_skew_ms(last)) > _SKEW_MS:
        faults.append(make_finding("clock_skew", seconds=round(abs(skew_ms) / 1000)))
    delay = None
    if "database" in context.passed:
        delay = await context.read(lambda store: typical_delay(store.clocks(RECENT)))
    if delay is not None and abs(gap_ms := _measure_skew_ms(last, delay)) > _SKEW_MS:
        faults.append(make_finding("dates_differ", seconds=round(abs(gap_ms) / 1000)))
    return faults or [make_ok("Logto's clock and this machine's agree within seconds.")]


def _measure_skew_ms(response: ApiResponse, delay: int = 0) -> int:
    """Return how far the Date is ahead of our clock less the delay at least. It has whole
    seconds."""
    if response.date is None:
        return 0
    least = response.date - (response.asked_at - delay + response.took)
    most = response.date + 1_000 - (response.asked_at - delay)
    return least if least > 0 else min(most, 0)


async def check_key(context: CheckContext) -> list[Finding]:
    """Check that a signing key is set and is the webhook's."""
    keys = context.target.keys
    if not keys:
        return [make_finding("key_missing")]
    faults = []
    for key in keys:
        if (problem := problem_of_secret(key)) is not None:
            faults.append(make_finding("key_unusable", problem=problem))
        elif len(key) < SHORTEST:
            faults.append(make_finding("key_short", length=len(key)))
    ours = [webhook for webhook in await context.our_webhooks() if webhook.enabled]
    learned = await context.learned_keys()
    keyring, now = Keyring(keys), SystemClock().now()
    keyring.learn(learned, now)
    for ended_at in keyring.find_ended(now).values():
        faults.append(make_finding("key_ended", at=to_iso(ended_at)))
    for webhook in ours:
        faults += _compare_key(webhook, keys, learned)
    if not ours and "database" in context.passed:
        return faults + await context.read(lambda store: _check_key_use(keys, store))
    return faults or [make_ok("The key is the webhook's key." if ours else "A key is set.")]


def _compare_key(
    webhook: Webhook, keys: Collection[str], learned: Sequence[WebhookKey]
) -> list[Finding]:
    if (problem := problem_of_key(webhook.signing_key)) is not None:
        return [make_finding("key_not_told", webhook=_name(webhook), problem=problem)]
    if webhook.signing_key in keys:
        return []
    is_learned = any(key.key == webhook.signing_key for key in learned)
    return [make_finding("key_outdated" if is_learned else "key_differs", webhook=_name(webhook))]


def _check_key_use(keys: Sequence[str], store: Store) -> list[Finding]:
    """Judge the keys by the received deliveries. A first use is recorded with a delay."""
    used = store.webhook_keys.used({})
    rejected = store.webhook_keys.count_rejected()
    received = any(row.origin == "webhook" for row in store.inbox.search(DeliveryFilter()))
    if any(fingerprint(key) in used for key in keys) or (received and not used):
        return [make_ok("Deliveries signed with this key have arrived.")]
    if rejected:
        return [make_finding("key_doubted", count=rejected)]
    return [make_finding("key_unproven")]


async def check_webhook(context: CheckContext) -> list[Finding]:
    """Check that exactly one webhook leads here."""
    webhooks, ours = await context.webhooks(), await context.find_our_webhooks()
    public_url = context.settings.public_url
    if not ours.webhooks:
        names = [f"{_name(webhook)} ({strip_url(webhook.url)})" for webhook in webhooks] or ["none"]
        options = context.settings.repeat_options("app")
        return [make_finding("webhook_missing", options, webhooks=names)]
    enabled = [webhook for webhook in ours.webhooks if webhook.enabled]
    if not enabled:
        return [
            make_finding("webhook_disabled", webhook=_name(webhook)) for webhook in ours.webhooks
        ]
    faults = []
    if public_url and not any(webhook.leads_to(public_url) for webhook in enabled):
        shown = strip_url(public_url)
        faults += [
            make_finding(
                "webhook_elsewhere",
                webhook=_name(webhook),
                url=strip_url(webhook.url),
                public_url=shown,
            )
            for webhook in enabled
        ]
    for url in {webhook.url.rstrip("/") for webhook in enabled}:
        same = [webhook for webhook in webhooks if webhook.enabled and webhook.leads_to(url)]
        counts = Counter(event for webhook in same for event in set(webhook.events))
        twice = [_name(own) for own in same if any(counts[event] > 1 for event in own.events)]
        if twice:
            faults.append(make_finding("webhook_twice", url=strip_url(url), webhooks=twice))
    if ours.by_path:
        faults += [make_finding("webhook_unproven", webhook=_name(webhook)) for webhook in enabled]
    return faults or [make_ok(f"{_name(enabled[0])} leads to {strip_url(enabled[0].url)}.")]


async def check_address(context: CheckContext) -> list[Finding]:
    """Check that the webhook's URL leads to this service and answers in time."""
    public_url, local_url = (
        context.settings.public_url,
        context.settings.url_at(context.settings.port),
    )
    ours = await context.our_webhooks()
    urls = {webhook.url for webhook in ours if webhook.enabled}
    urls = urls or ({public_url} if public_url else {webhook.url for webhook in ours})
    if not urls:
        return [_judge_local_url(local_url, await probe_url(local_url, context.target.limit_s))]
    results = await asyncio.gather(*(_check_url(context, url) for url in sorted(urls)))
    return [finding for findings in results for finding in findings]


def _judge_local_url(url: str, result: ProbeResult) -> Finding:
    unknown = "To check the URL that Logto uses, set LOGTO_WEBHOOKS_PUBLIC_URL."
    if (result.status, result.error) == _UNSIGNED:
        return make_ok(f"{strip_url(url)} answers. {unknown}")
    what = "Nothing listens" if result.problem == "address_refused" else "Another program answers"
    return make_skipped(f"{what} at {strip_url(url)}, where `serve` would listen. {unknown}")


async def _check_url(context: CheckContext, url: str) -> list[Finding]:
    """Post without a signature: our own 401 is the correct response."""
    limit_s = context.target.limit_s
    result = await probe_url(url, limit_s)
    shown, status = strip_url(url), result.status
    if result.problem is not None:
        return [make_finding(result.problem, url=shown, seconds=round(limit_s, 1))]
    if 300 <= status < 400:
        code = "address_lost" if status in _LOSING else "address_moved"
        location = strip_url(result.location)
        return [make_finding(code, url=shown, status=status, location=location)]
    if (status, result.error) == _UNSIGNED:
        if result.took_ms > _SLOW * limit_s * 1000:
            return [make_finding("address_slow", url=shown, took_ms=result.took_ms)]
        return [make_ok(f"{shown} answers in {result.took_ms} ms, and refuses unsigned requests.")]
    if status >= 500:
        code = "address_failing"
    elif status < 300:
        code = "address_open"
    else:
        code = _BY_STATUS.get(status, "address_guarded")
    return [make_finding(code, url=shown, status=status)]


async def check_events(context: CheckContext) -> list[Finding]:
    """Check that our webhooks send all events that the sync and the handlers need."""
    ours = await context.our_webhooks()
    if not ours:
        return [_no_webhook()]
    handlers = {handler.name: handler for handler in context.target.handlers or ()}
    if "database" in context.passed:
        handlers = {row.name: row for row in await context.registered_handlers()} | handlers
    sending = [webhook for webhook in ours if webhook.enabled] or ours
    sent = {event for webhook in sending for event in webhook.events}
    synced = subscription()
    needed = subscription([name for handler in handlers.values() for name in handler.patterns])
    missing = [event for event in needed if event not in sent]
    for_sync = [event for event in missing if event in synced]
    for_handlers = [event for event in missing if event not in synced]
    faults = [make_finding("events_missing", events=for_sync)] if for_sync else []
    if for_handlers:
        names = [row.name for row in handlers.values() if _wants_any(row, for_handlers)]
        faults.append(make_finding("events_missing_handlers", handlers=names, events=for_handlers))
    return faults or [make_ok("The webhook sends all required events.")]


def _wants_any(handler: RegisteredHandler, events: Sequence[str]) -> bool:
    return any(handler.wants(event) for event in events)


async def check_log(context: CheckContext) -> list[Finding]:
    """Look for failed deliveries of the last day in Logto's log."""
    summary = await context.log_summary()
    if not await context.our_webhooks():
        return [_no_webhook()]
    counts: dict[str, int] = {}
    for cause, count in summary.causes.items():
        code = _CAUSES.get(cause, "log_other")
        counts[code] = counts.get(code, 0) + count
    faults = [make_finding(code, count=count) for code, count in sorted(counts.items())]
    if faults:
        return faults
    if summary.recovered:
        failed = f"{Count(summary.recovered):delivery|deliveries}"
        return [make_ok(f"{failed} failed, none within the last hour, and all were recovered.")]
    return [make_ok(f"None of the newest {summary.entries} of {summary.total} deliveries failed.")]


async def check_gap(context: CheckContext) -> list[Finding]:
    """Compare Logto's log with the inbox."""
    summary = await context.log_summary()
    if not await context.our_webhooks():
        return [_no_webhook()]
    faults = []
    if summary.answered:
        faults.append(make_finding("gap_answered", count=summary.answered))
    if summary.late:
        faults.append(make_finding("gap", count=summary.late, entries=summary.entries))
    if summary.recent:
        faults.append(make_finding("gap_recent", count=summary.recent, entries=summary.entries))
    return faults or [
        make_ok(
            f"All of the newest {summary.entries} of {summary.total} deliveries are in the inbox."
        )
    ]


async def check_recovery(context: CheckContext) -> list[Finding]:
    """Check that Logto's log is read regularly."""
    now, read_at = SystemClock().now(), (await context.status()).complete_up_to
    if read_at is None:
        return [make_finding("log_unread", when="never compared with the inbox")]
    # In the future, it was noted by a wrong clock, and hides that nothing is read.
    if abs(now - read_at) > _UNREAD * context.settings.recover_every_s * 1000:
        when = f"last compared with the inbox at {to_iso(read_at)}"
        return [make_finding("log_unread", when=when)]
    return [make_ok("Logto's log is read regularly.")]


async def check_inbox(context: CheckContext) -> list[Finding]:
    """Check that deliveries arrive and are applied."""
    status = await context.status()
    counts, oldest = status.deliveries, status.oldest_pending_s or 0
    faults = []
    if oldest > _PENDING_S:
        pending = counts[DeliveryState.PENDING]
        faults.append(make_finding("pending_old", count=pending, seconds=round(oldest)))
    if dead := counts[DeliveryState.DEAD]:
        faults.append(make_finding("deliveries_dead", count=dead))
    if status.silent_since is not None:
        faults.append(make_finding("silent", since=to_iso(status.silent_since)))
    done = Count(counts[DeliveryState.DONE])
    return faults or [make_ok(f"{done:delivery is|deliveries are} applied.")]


async def check_spool(context: CheckContext) -> list[Finding]:
    """Check that no deliveries are left in the spool directory, and that others can't add any."""
    faults = []
    if context.target.spool_problem:
        faults.append(make_finding("spool_open", problem=context.target.spool_problem))
    if context.target.spooled:
        faults.append(make_finding("spool_waiting", count=context.target.spooled))
    if not faults and not context.settings.spool_dir:
        return [make_skipped("No spool directory is set.")]
    return faults or [make_ok("No deliveries wait in the spool directory.")]


async def check_jobs(context: CheckContext) -> list[Finding]:
    """Check that jobs run, and that their handlers exist."""
    counts = await context.read(lambda store: store.jobs.counts())
    registered = {handler.name for handler in await context.registered_handlers()}
    handlers = context.target.handlers  # None without an application
    here = None if handlers is None else {handler.name for handler in handlers}
    dead = [row for row in counts if row.state == JobState.DEAD]
    waiting = [row for row in counts if row.state == JobState.WAITING]
    orphans = [row for row in waiting if here is not None and row.handler not in here]
    late = [row for row in waiting if row.oldest_s > _WAITING_S and row not in orphans]
    faults = [make_finding("jobs_dead", **_summarize(dead))] if dead else []
    if unknown := sorted(set(here or ()).difference(registered)):
        faults.append(make_finding("handlers_unregistered", handlers=unknown))
    if orphans:
        faults.append(make_finding("jobs_without_code", **_summarize(orphans)))
    if late:
        seconds = round(max(row.oldest_s for row in late))
        faults.append(make_finding("jobs_waiting", seconds=seconds, **_summarize(late)))
    return faults or [make_ok("No jobs are dead, and none has waited long.")]


def _summarize(counts: Sequence[JobCount]) -> dict[str, object]:
    handlers = sorted(row.handler for row in counts)
    return {"count": sum(row.count for row in counts), "handlers": handlers}


async def check_records(context: CheckContext) -> list[Finding]:
    """Check that records are refetched if only Logto's API has their current values."""
    count = (await context.status()).refetch
    unsettled_s = (await context.database_info()).unsettled_s
    if count and "api" not in context.passed:
        return [make_finding("records_unsettled", count=count)]
    if count and unsettled_s is not None and unsettled_s > _UNSETTLED_S:
        return [make_finding("records_waiting", count=count, seconds=round(unsettled_s))]
    return [make_ok(f"{Count(count):record waits|records wait} for a refetch, none for long.")]


async def check_mappings(context: CheckContext) -> list[Finding]:
    """Check that the rows of mapped tables are written, and quickly found."""
    mappings = (await context.status()).mappings
    own_schema = await context.target.inspect_own_schema()
    options = context.settings.repeat_options("app", "map_file")
    if context.settings.app is None and not options:
        options = _MAYBE_APP
    faults = []
    if own_schema.file_problem:
        faults.append(make_finding("mapping_file_invalid", problem=own_schema.file_problem))
    if own_schema.incomplete:
        faults.append(make_finding("mapping_incomplete", problem=own_schema.incomplete))
    if missing := own_schema.missing:
        problems = ". ".join(dict.fromkeys(missing.values()))
        faults.append(
            make_finding("mapping_not_migrated", problems=problems, mappings=list(missing))
        )
    if conflicts := {each.mapping: each.conflict for each in mappings if each.conflict}:
        first = await context.read(lambda store: store.mappings.find_oldest("conflict"))
        shown = f"{first.logto_id} in {first.mapping}: {first.reason}" if first else "unknown"
        counts = {"count": sum(conflicts.values()), "mappings": list(conflicts)}
        faults.append(make_finding("mapping_conflicts", options, first=shown, **counts))
    owed = {each.mapping: each.owed for each in mappings if each.owed}
    faults += await _check_owed(context, {m: n for m, n in owed.items() if m not in missing})
    if held := {each.mapping: each.held for each in mappings if each.held}:
        first = await context.read(lambda store: store.mappings.find_oldest("held"))
        shown = f"{first.logto_id} in {first.mapping}" if first else "unknown"
        counts = {"count": sum(held.values()), "mappings": list(held)}
        found = make_finding("mapping_deletions_held", options, first=shown, **counts)
        faults.append(found)
    faults += await _check_excluded(context, mappings)
    if cascades := own_schema.cascades:
        faults.append(make_finding("mapping_cascades", problems=". ".join(cascades)))
    if columns := own_schema.unindexed:
        faults.append(make_finding("mapping_key_without_index", columns=columns))
    if faults:
        return faults
    if unapplied := [each.mapping for each in mappings if not each.is_applied]:
        return [make_ok(f"{', '.join(unapplied)}: not applied to all records yet.")]
    if waiting := sum(each.waiting for each in mappings):
        groups = await context.read(lambda store: store.mappings.list_unwritten(["waiting"]))
        return [make_ok(_describe_waiting(len(mappings), waiting, groups))]
    return [make_ok(f"{Count(len(mappings)):table is|tables are} mapped, without problems.")]


async def _check_owed(context: CheckContext, owed: Mapping[str, int]) -> list[Finding]:
    oldest = await context.read(lambda store: store.mappings.find_oldest("owed", owed))
    if oldest is None or oldest.since_s <= _OWED_S:
        return []
    code = "mapping_owed" if oldest.reason == NOT_WRITTEN else "mapping_blocked"
    counts = {"count": sum(owed.values()), "mappings": list(owed)}
    seconds, reason = round(oldest.since_s), oldest.reason or "unknown"
    return [make_finding(code, seconds=seconds, reason=reason, **counts)]


async def _check_excluded(
    context: CheckContext, mappings: Sequence[MappingStatus]
) -> list[Finding]:
    names = [each.mapping for each in mappings if each.excluded and each.is_applied]
    excluding = [name for name in names if await context.read(partial(_excludes_all, name=name))]
    return [make_finding("mapping_excludes_all", mappings=excluding)] if excluding else []


def _excludes_all(store: Store, name: str) -> bool:
    return store.mappings.excludes_all(name)


def _describe_waiting(mapped: int, waiting: int, groups: Sequence[UnwrittenRows]) -> str:
    shown = [f"{row.count} in {row.mapping}, because {row.reason}" for row in groups[:_GROUPS]]
    more = ["…"] if len(groups) > _GROUPS else []
    return (
        f"{Count(mapped):table is|tables are} mapped. {Count(waiting):row waits|rows wait}: "
        f"{'; '.join([*shown, *more])}."
    )


async def check_rejected(context: CheckContext) -> list[Finding]:
    """Look for requests that were signed with an unknown key."""
    yesterday = SystemClock().now() - DAY_MS

    def count_rejected(store: Store) -> tuple[int, int]:
        return store.webhook_keys.count_rejected(), store.webhook_keys.count_rejected(yesterday)

    count, recent = await context.read(count_rejected)
    if recent:
        return [make_finding("rejected", count=count, fresh=recent)]
    return [make_ok(f"{Count(count):request is|requests are} quarantined, none in the last day.")]


async def check_application(context: CheckContext) -> list[Finding]:
    """Check that the application can start, and uses this database and Logto's API."""
    if context.target.databases is None:
        return [make_skipped("No application is set. Use --app module:name.")]
    faults = []
    ours, theirs = context.target.databases()
    if ours != theirs:
        setting = context.target.database_setting
        finding = make_finding("application_database", ours=ours, theirs=theirs, setting=setting)
        faults.append(finding)
    if problem := context.target.find_handler_problem():
        faults.append(make_finding("application_handler", problem=problem))
    if context.settings.uses_api and not context.target.uses_api():
        faults.append(make_finding("application_without_api"))
    return faults or [make_ok("The application uses this database.")]


def _no_webhook() -> Finding:
    return make_skipped("No webhook leads here.")


def _name(webhook: Webhook) -> str:
    return webhook.name or webhook.id


CHECKS: Final = (
    Check("database", check_database),
    Check("durability", check_durability, needs=("database",)),
    Check("vacuum", check_vacuum, needs=("database",)),
    Check("disk", check_disk, needs=("database",)),
    Check("files", check_files),
    Check("api", check_api),
    Check("clock", check_clock, needs=("api",), uses=("database",)),
    Check("key", check_key, uses=("database", "api")),
    Check("webhook", check_webhook, needs=("api",), uses=("database",)),
    Check("address", check_address, uses=("database", "api")),
    Check("events", check_events, needs=("api",), uses=("database",)),
    Check("log", check_log, needs=("database", "api")),
    Check("gap", check_gap, needs=("database", "api")),
    Check("recovery", check_recovery, needs=("database", "api")),
    Check("inbox", check_inbox, needs=("database",)),
    Check("spool", check_spool),
    Check("jobs", check_jobs, needs=("database",)),
    Check("records", check_records, needs=("database",), uses=("api",)),
    Check("mappings", check_mappings, needs=("database",)),
    Check("rejected", check_rejected, needs=("database",)),
    Check("application", check_application),
)
