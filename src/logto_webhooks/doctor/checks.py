"""The checks: what each asks for, and who decides about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.doctor import local, remote
from logto_webhooks.doctor import url_probe as by_address
from logto_webhooks.doctor.context import DAY_MS, CheckContext
from logto_webhooks.doctor.findings import Finding, fine, make_finding, skipped
from logto_webhooks.errors import LogtoApiError, LogtoUnreachable, SettingInvalid, StoreUnavailable
from logto_webhooks.interfaces import Store
from logto_webhooks.logto.webhooks import Webhook

_CREDENTIALS: Final = 3


class Check(NamedTuple):
    """A check; it is left out unless those that it `needs` went well, not those that it `uses`."""

    name: str
    run: Callable[[CheckContext], Awaitable[list[Finding]]]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


async def database(facts: CheckContext) -> list[Finding]:
    """It can be reached, and has our tables."""
    try:
        return local.judge_schema(await facts.premises())
    except SettingInvalid as error:
        setting = facts.patient.database_setting
        return [make_finding("database_setting", problem=str(error), setting=setting)]
    except StoreUnavailable as error:
        setting = facts.patient.database_setting
        return [make_finding("database_unusable", problem=error.problem, setting=setting)]


async def durability(facts: CheckContext) -> list[Finding]:
    """A commit is on disk."""
    return local.judge_durability(await facts.premises(), facts.patient.database_setting)


async def vacuum(facts: CheckContext) -> list[Finding]:
    """No dead rows pile up."""
    return local.judge_vacuum(await facts.premises())


async def disk(facts: CheckContext) -> list[Finding]:
    """There is room for more."""
    premises = await facts.premises()
    if premises.free is None:
        return [skipped("The disk of a server can't be seen from here.")]
    return local.judge_disk(premises, premises.free, facts.patient.least_free_mb)


async def files(facts: CheckContext) -> list[Finding]:
    """Nobody else can read the files with people and keys."""
    return local.of_files(facts.patient.open_files())


async def api(facts: CheckContext) -> list[Finding]:
    """Logto can be asked."""
    missing = list(facts.patient.missing)
    if missing:
        whole = len(missing) == _CREDENTIALS
        return [
            make_finding("api_missing") if whole else make_finding("api_partial", missing=missing)
        ]
    signs = facts.patient.signs_of_admin
    try:
        hooks = await facts.hooks()
    except LogtoUnreachable as error:
        named = [make_finding("api_admin", signs=signs)] if signs else []
        return [
            *named,
            make_finding("api_unreachable", endpoint=error.endpoint, problem=error.problem),
        ]
    except LogtoApiError as error:
        if signs:
            return [make_finding("api_admin", signs=f"{signs}; it refuses: {error.problem}")]
        told = {"endpoint": error.endpoint, "problem": error.problem, "hint": error.hint}
        return [make_finding("api_refused", **told)]
    if signs:
        return [make_finding("api_admin_answers", signs=signs)]
    return [fine(f"Logto answers. Its webhooks: {len(hooks)}. It doesn't tell its version.")]


async def clock(facts: CheckContext) -> list[Finding]:
    """Both clocks tell the same."""
    return remote.judge_clock((await facts.listed())[-1])


async def key(facts: CheckContext) -> list[Finding]:
    """It is set, and the webhook's."""
    keys = facts.patient.keys
    faults = local.judge_keys(keys)
    if not keys:
        return faults
    ours = [each for each in await facts.ours() if each.enabled]
    learnt = await facts.learnt()
    faults += [fault for hook in ours for fault in local.judge_key_of_webhook(hook, keys, learnt)]
    if not ours and "database" in facts.well:
        return faults + await facts.read(lambda store: _of_key_use(keys, store))
    return faults or [fine("It is the webhook's." if ours else "It is set.")]


async def hook(facts: CheckContext) -> list[Finding]:
    """A webhook leads here, and only one."""
    return remote.judge_webhooks(
        await facts.hooks(), await facts.leading(), facts.patient.public_url
    )


async def address(facts: CheckContext) -> list[Finding]:
    """Its URL answers as ours does, and in time."""
    public_url, local_url = facts.patient.public_url, facts.patient.local_url
    ours = await facts.ours()
    urls = {each.url for each in ours if each.enabled}
    urls = urls or ({public_url} if public_url else {each.url for each in ours})
    if not urls:
        return [by_address.judge_local(local_url, await facts.patient.post(local_url))]
    told = await asyncio.gather(*(_probed(facts, url) for url in sorted(urls)))
    return [finding for each in told for finding in each]


async def events(facts: CheckContext) -> list[Finding]:
    """All events that are needed are sent."""
    handlers = {each.name: each for each in facts.patient.handlers or ()}
    if "database" in facts.well:
        handlers = {each.name: each for each in await facts.registered()} | handlers
    return await _of_ours(facts, lambda ours: remote.judge_events(ours, list(handlers.values())))


async def failures(facts: CheckContext) -> list[Finding]:
    """None of the last day failed, by Logto's log."""
    looked = await facts.log()
    return await _of_ours(facts, lambda ours: remote.judge_log(looked))


async def gap(facts: CheckContext) -> list[Finding]:
    """All that Logto's log has is here."""
    looked = await facts.log()
    return await _of_ours(facts, lambda ours: remote.judge_gap(looked))


async def recovery(facts: CheckContext) -> list[Finding]:
    """Somebody reads Logto's log."""
    now, every_s = facts.patient.clock.now(), facts.patient.recover_every_s
    return remote.judge_recovery(await facts.status(), now, every_s)


async def inbox(facts: CheckContext) -> list[Finding]:
    """Deliveries are applied."""
    return local.judge_inbox(await facts.status())


async def spool(facts: CheckContext) -> list[Finding]:
    """What was spooled is stored."""
    return local.of_spool(facts.patient.spooled)


async def jobs(facts: CheckContext) -> list[Finding]:
    """Handlers run."""
    counts = await facts.read(lambda store: store.jobs.counts())
    known = {each.name for each in await facts.registered()}
    handlers = facts.patient.handlers
    ours = None if handlers is None else {each.name for each in handlers}
    return local.judge_jobs(counts, known, ours)


async def records(facts: CheckContext) -> list[Finding]:
    """What only Logto can settle is settled."""
    unsettled_s = (await facts.premises()).unsettled_s
    return local.judge_records(await facts.status(), unsettled_s, "api" in facts.well)


async def rejected(facts: CheckContext) -> list[Finding]:
    """All that came was signed with a known key."""
    yesterday = facts.patient.clock.now() - DAY_MS

    def count(store: Store) -> tuple[int, int]:
        return store.keys_of_hooks.aside(), store.keys_of_hooks.aside(yesterday)

    return local.judge_rejected(*await facts.read(count))


async def application(facts: CheckContext) -> list[Finding]:
    """Handlers run on the application's database."""
    databases = facts.patient.databases
    if databases is None:
        return [skipped("No application is named: --app module:name.")]
    return local.judge_application(*databases(), setting=facts.patient.database_setting)


def _of_key_use(keys: Sequence[str], store: Store) -> list[Finding]:
    newest = store.inbox.search(DeliveryFilter())
    return local.judge_key_use(
        keys, store.keys_of_hooks.used({}), newest, store.keys_of_hooks.aside()
    )


async def _probed(facts: CheckContext, url: str) -> list[Finding]:
    return by_address.judge_response(url, await facts.patient.post(url))


async def _of_ours(
    facts: CheckContext, judge: Callable[[list[Webhook]], list[Finding]]
) -> list[Finding]:
    ours = await facts.ours()
    return judge(ours) if ours else [skipped("No webhook leads here.")]


CHECKS: Final = (
    Check("database", database),
    Check("durability", durability, needs=("database",)),
    Check("vacuum", vacuum, needs=("database",)),
    Check("disk", disk, needs=("database",)),
    Check("files", files),
    Check("api", api),
    Check("clock", clock, needs=("api",)),
    Check("key", key, uses=("database", "api")),
    Check("hook", hook, needs=("api",), uses=("database",)),
    Check("address", address, uses=("database", "api")),
    Check("events", events, needs=("api",), uses=("database",)),
    Check("log", failures, needs=("database", "api")),
    Check("gap", gap, needs=("database", "api")),
    Check("recovery", recovery, needs=("database", "api")),
    Check("inbox", inbox, needs=("database",)),
    Check("spool", spool),
    Check("jobs", jobs, needs=("database",)),
    Check("records", records, needs=("database",), uses=("api",)),
    Check("rejected", rejected, needs=("database",)),
    Check("application", application),
)
