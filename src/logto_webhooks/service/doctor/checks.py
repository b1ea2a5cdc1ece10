"""The checks: what each asks for, and who decides about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from logto_webhooks.core.doctor import address as by_address
from logto_webhooks.core.doctor import here, there
from logto_webhooks.core.doctor.findings import Finding, fine, found, skipped
from logto_webhooks.core.hooks import Hook
from logto_webhooks.core.inbox import DeliveryFilter
from logto_webhooks.core.ports import Store
from logto_webhooks.errors import LogtoRefused, LogtoUnreachable, SettingInvalid, StoreUnavailable
from logto_webhooks.service.doctor.facts import DAY_MS, Facts

_CREDENTIALS: Final = 3


class Check(NamedTuple):
    """A check; it is left out unless those that it `needs` went well, not those that it `uses`."""

    name: str
    run: Callable[[Facts], Awaitable[list[Finding]]]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


async def database(facts: Facts) -> list[Finding]:
    """It can be reached, and has our tables."""
    try:
        return here.of_schema(await facts.premises())
    except SettingInvalid as error:
        setting = facts.patient.database_setting
        return [found("database_setting", problem=str(error), setting=setting)]
    except StoreUnavailable as error:
        setting = facts.patient.database_setting
        return [found("database_unusable", problem=error.problem, setting=setting)]


async def durability(facts: Facts) -> list[Finding]:
    """A commit is on disk."""
    return here.of_durability(await facts.premises(), facts.patient.database_setting)


async def disk(facts: Facts) -> list[Finding]:
    """There is room for more."""
    premises = await facts.premises()
    if premises.free is None:
        return [skipped("The disk of a server can't be seen from here.")]
    return here.of_disk(premises, premises.free, facts.patient.least_free_mb)


async def files(facts: Facts) -> list[Finding]:
    """Nobody else can read the files with people and keys."""
    return here.of_files(facts.patient.open_files())


async def api(facts: Facts) -> list[Finding]:
    """Logto can be asked."""
    missing = list(facts.patient.missing)
    if missing:
        whole = len(missing) == _CREDENTIALS
        return [found("api_missing") if whole else found("api_partial", missing=missing)]
    signs = facts.patient.signs_of_admin
    try:
        hooks = await facts.hooks()
    except LogtoUnreachable as error:
        named = [found("api_admin", signs=signs)] if signs else []
        return [*named, found("api_unreachable", endpoint=error.endpoint, problem=error.problem)]
    except LogtoRefused as error:
        if signs:
            return [found("api_admin", signs=f"{signs}; it refuses: {error.problem}")]
        told = {"endpoint": error.endpoint, "problem": error.problem, "hint": error.hint}
        return [found("api_refused", **told)]
    if signs:
        return [found("api_admin_answers", signs=signs)]
    return [fine(f"Logto answers. Its webhooks: {len(hooks)}. It doesn't tell its version.")]


async def clock(facts: Facts) -> list[Finding]:
    """Both clocks tell the same."""
    return there.of_clock((await facts.listed())[-1])


async def key(facts: Facts) -> list[Finding]:
    """It is set, and the webhook's."""
    keys = facts.patient.keys
    faults = here.of_keys(keys)
    if not keys:
        return faults
    ours = [each for each in await facts.ours() if each.enabled]
    learnt = await facts.learnt()
    faults += [fault for hook in ours for fault in here.of_key_of(hook, keys, learnt)]
    if not ours and "database" in facts.well:
        return faults + await facts.read(lambda store: _of_key_use(keys, store))
    return faults or [fine("It is the webhook's." if ours else "It is set.")]


async def hook(facts: Facts) -> list[Finding]:
    """A webhook leads here, and only one."""
    return there.of_hooks(await facts.hooks(), await facts.leading(), facts.patient.public_url)


async def address(facts: Facts) -> list[Finding]:
    """Its URL answers as ours does, and in time."""
    public_url, local_url = facts.patient.public_url, facts.patient.local_url
    ours = await facts.ours()
    urls = {each.url for each in ours if each.enabled}
    urls = urls or ({public_url} if public_url else {each.url for each in ours})
    if not urls:
        return [by_address.of_home(local_url, await facts.patient.post(local_url))]
    told = await asyncio.gather(*(_probed(facts, url) for url in sorted(urls)))
    return [finding for each in told for finding in each]


async def events(facts: Facts) -> list[Finding]:
    """All events that are needed are sent."""
    handlers = {each.name: each for each in facts.patient.handlers or ()}
    if "database" in facts.well:
        handlers = {each.name: each for each in await facts.registered()} | handlers
    return await _of_ours(facts, lambda ours: there.of_events(ours, list(handlers.values())))


async def failures(facts: Facts) -> list[Finding]:
    """None of the last day failed, by Logto's log."""
    looked = await facts.log()
    return await _of_ours(facts, lambda ours: there.of_log(looked))


async def gap(facts: Facts) -> list[Finding]:
    """All that Logto's log has is here."""
    looked = await facts.log()
    return await _of_ours(facts, lambda ours: there.of_gap(looked))


async def recovery(facts: Facts) -> list[Finding]:
    """Somebody reads Logto's log."""
    now, every_s = facts.patient.clock.now(), facts.patient.recover_every_s
    return there.of_recovery(await facts.status(), now, every_s)


async def inbox(facts: Facts) -> list[Finding]:
    """Deliveries are applied."""
    return here.of_inbox(await facts.status())


async def spool(facts: Facts) -> list[Finding]:
    """What was spooled is stored."""
    return here.of_spool(facts.patient.spooled)


async def jobs(facts: Facts) -> list[Finding]:
    """Handlers run."""
    counts = await facts.read(lambda store: store.jobs.counts())
    known = {each.name for each in await facts.registered()}
    handlers = facts.patient.handlers
    ours = None if handlers is None else {each.name for each in handlers}
    return here.of_jobs(counts, known, ours)


async def records(facts: Facts) -> list[Finding]:
    """What only Logto can settle is settled."""
    unsettled_s = (await facts.premises()).unsettled_s
    return here.of_records(await facts.status(), unsettled_s, "api" in facts.well)


async def rejected(facts: Facts) -> list[Finding]:
    """All that came was signed with a known key."""
    yesterday = facts.patient.clock.now() - DAY_MS

    def count(store: Store) -> tuple[int, int]:
        return store.keys_of_hooks.aside(), store.keys_of_hooks.aside(yesterday)

    return here.of_rejected(*await facts.read(count))


async def application(facts: Facts) -> list[Finding]:
    """Handlers run on the application's database."""
    databases = facts.patient.databases
    if databases is None:
        return [skipped("No application is named: --app module:name.")]
    return here.of_application(*databases(), setting=facts.patient.database_setting)


def _of_key_use(keys: Sequence[str], store: Store) -> list[Finding]:
    newest = store.inbox.search(DeliveryFilter())
    return here.of_key_use(keys, store.keys_of_hooks.used({}), newest, store.keys_of_hooks.aside())


async def _probed(facts: Facts, url: str) -> list[Finding]:
    return by_address.of_answer(url, await facts.patient.post(url))


async def _of_ours(facts: Facts, judge: Callable[[list[Hook]], list[Finding]]) -> list[Finding]:
    ours = await facts.ours()
    return judge(ours) if ours else [skipped("No webhook leads here.")]


CHECKS: Final = (
    Check("database", database),
    Check("durability", durability, needs=("database",)),
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
