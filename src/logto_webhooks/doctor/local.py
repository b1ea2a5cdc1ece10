"""Decide what is wrong here: settings, keys, the database, what waits."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from logto_webhooks.database.inspect import DatabaseInfo
from logto_webhooks.deliveries import StoredDelivery
from logto_webhooks.doctor.findings import Finding, fine, make_finding, moment
from logto_webhooks.interfaces import Status
from logto_webhooks.jobs import JobCount
from logto_webhooks.logto.webhooks import Webhook
from logto_webhooks.plural import Count
from logto_webhooks.signing_keys import (
    SHORTEST,
    WebhookKey,
    fingerprint,
    problem_of_key,
    problem_of_secret,
)
from logto_webhooks.states import DeliveryState, JobState

PENDING_S: Final = 60
WAITING_S: Final = 600  # a job that fails is tried again within that, at first
UNSETTLED_S: Final = 600
DEAD_ROWS: Final = 10_000  # that are nothing for a table
_MB: Final = 2**20
_FULL: Final = 16  # times less than there should be
_DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")


def judge_keys(keys: Sequence[str]) -> list[Finding]:
    """Judge the keys by themselves."""
    if not keys:
        return [make_finding("key_missing")]
    faults = []
    for key in keys:
        if (problem := problem_of_secret(key)) is not None:
            faults.append(make_finding("key_unusable", problem=problem))
        elif len(key) < SHORTEST:
            faults.append(make_finding("key_short", length=len(key)))
    return faults


def judge_key_use(
    keys: Sequence[str], used: dict[str, int], newest: Sequence[StoredDelivery], aside: int
) -> list[Finding]:
    """Judge by what came, where Logto can't be asked; a first use is noted only after a while.

    So many requests are set `aside`, because no key signed them.
    """
    came = any(each.origin == "webhook" for each in newest)
    if any(fingerprint(each) in used for each in keys) or (came and not used):
        return [fine("What came was signed with it.")]
    return [make_finding("key_doubted", count=aside) if aside else make_finding("key_unproven")]


def judge_key_of_webhook(
    hook: Webhook, keys: Collection[str], learnt: Sequence[WebhookKey]
) -> list[Finding]:
    """Compare the keys with the webhook's."""
    if (problem := problem_of_key(hook.signing_key)) is not None:
        return [make_finding("key_not_told", hook=hook.name or hook.id, problem=problem)]
    if hook.signing_key in keys:
        return []
    told = any(each.key == hook.signing_key for each in learnt)
    return [make_finding("key_outdated" if told else "key_differs", hook=hook.name or hook.id)]


def judge_schema(premises: DatabaseInfo) -> list[Finding]:
    """Judge the version of the tables."""
    there, needed = premises.schema, premises.needed
    if there is None:
        return [make_finding("schema_missing")]
    if there == needed:
        return [fine(f"{premises.place} is there, and its schema is of this release.")]
    return [
        make_finding("schema_old" if there < needed else "schema_newer", found=there, needed=needed)
    ]


def judge_durability(premises: DatabaseInfo, setting: str) -> list[Finding]:
    """Judge what a server does with a commit."""
    settings = premises.settings
    off = [f"{each} = off" for each in _DURABLE if settings.get(each) == "off"]
    faults = [make_finding("not_durable", settings=off)] if off else []
    if settings.get("transaction_read_only") == "on":
        faults.append(make_finding("database_read_only", setting=setting))
    if premises.unwritable is not None:
        faults.append(make_finding("database_unwritable", problem=premises.unwritable))
    return faults or [fine("What is answered 200 is on disk.")]


def judge_vacuum(premises: DatabaseInfo) -> list[Finding]:
    """Judge the dead rows of tables that the server doesn't vacuum by itself."""
    piled_up = [
        table for table in premises.unvacuumed if table.dead > max(DEAD_ROWS, table.live // 5)
    ]
    if not piled_up:
        return [fine("No dead rows pile up.")]
    dead = sum(table.dead for table in piled_up)
    tables = [table.table for table in piled_up]
    return [make_finding("vacuum_off", dead=dead, tables=tables)]


def judge_disk(premises: DatabaseInfo, free: int, least_mb: int) -> list[Finding]:
    """Judge the space that is free."""
    mb = free // _MB
    if mb >= least_mb:
        return [fine(f"{mb} MB are free.")]
    code = "disk_full" if mb < least_mb // _FULL else "disk_low"
    return [make_finding(code, free_mb=mb, place=premises.place)]


def of_spool(count: int) -> list[Finding]:
    """Judge how many deliveries wait in the spool directory."""
    if count:
        return [make_finding("spool_waiting", count=count)]
    return [fine("No delivery waits in the spool directory.")]


def of_files(too_open: Mapping[str, str]) -> list[Finding]:
    """Judge the modes of files, by their paths: only those are given that are too open."""
    if not too_open:
        return [fine("Only their owner can read the files.")]
    listed = [f"{path} (mode {mode})" for path, mode in too_open.items()]
    return [make_finding("files_open", files=listed, paths=" ".join(map(shlex.quote, too_open)))]


def judge_inbox(status: Status) -> list[Finding]:
    """Judge how deliveries are applied."""
    faults = []
    pending, dead = status.deliveries[DeliveryState.PENDING], status.deliveries[DeliveryState.DEAD]
    oldest = status.oldest_pending_s or 0
    if oldest > PENDING_S:
        faults.append(make_finding("pending_old", count=pending, seconds=round(oldest)))
    if dead:
        faults.append(make_finding("deliveries_dead", count=dead))
    if status.silent_since is not None:
        faults.append(make_finding("silent", since=moment(status.silent_since)))
    return faults or [
        fine(f"{Count(status.deliveries[DeliveryState.DONE]):delivery is|deliveries are} applied.")
    ]


def judge_jobs(
    counts: Sequence[JobCount], known: Collection[str], here: Collection[str] | None
) -> list[Finding]:
    """Judge how jobs are run.

    For the `known` handlers jobs are made; `here` are those of the application, None if it isn't
    known.
    """
    dead = [each for each in counts if each.state == JobState.DEAD]
    waiting = [each for each in counts if each.state == JobState.WAITING]
    orphans = [each for each in waiting if here is not None and each.handler not in here]
    late = [each for each in waiting if each.oldest_s > WAITING_S and each not in orphans]
    faults = [make_finding("jobs_dead", **_named(dead))] if dead else []
    if unknown := sorted(set(here or ()).difference(known)):
        faults.append(make_finding("handlers_unregistered", handlers=unknown))
    if orphans:
        faults.append(make_finding("jobs_without_code", **_named(orphans)))
    if late:
        seconds = round(max(each.oldest_s for each in late))
        faults.append(make_finding("jobs_waiting", seconds=seconds, **_named(late)))
    return faults or [fine("No job is dead, and none waits for long.")]


def judge_records(status: Status, unsettled_s: float | None, asked: bool) -> list[Finding]:
    """Judge what only Logto can settle, which may be `asked`."""
    count = status.refetch
    if count and not asked:
        return [make_finding("records_unsettled", count=count)]
    if count and unsettled_s is not None and unsettled_s > UNSETTLED_S:
        return [make_finding("records_waiting", count=count, seconds=round(unsettled_s))]
    return [fine(f"{Count(count):record waits|records wait} for Logto, none for long.")]


def judge_rejected(count: int, fresh: int) -> list[Finding]:
    """Judge what no key signed; the `fresh` came within the last day."""
    if fresh:
        return [make_finding("rejected", count=count, fresh=fresh)]
    return [fine(f"{Count(count):request is|requests are} set aside, none of the last day.")]


def judge_application(ours: str, theirs: str, setting: str) -> list[Finding]:
    """Compare the application's database with the one on which its handlers run."""
    if ours != theirs:
        return [make_finding("application_database", ours=ours, theirs=theirs, setting=setting)]
    return [fine("The application's database is this one.")]


def _named(counts: Sequence[JobCount]) -> dict[str, object]:
    return {
        "count": sum(each.count for each in counts),
        "handlers": sorted(each.handler for each in counts),
    }
