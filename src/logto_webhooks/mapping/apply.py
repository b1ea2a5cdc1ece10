"""Write the rows of all records, for a new or changed mapping, and try again what was refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database.mapped_rows import (
    CHANGING,
    LINKING,
    RegisteredMapping,
    RowState,
    State,
    UnsettledRow,
)
from logto_webhooks.database.runner import (
    TransactionRunner,
    await_open_transactions,
    run_or_rehearse,
)
from logto_webhooks.database.schema import members
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping, StoreUnavailable
from logto_webhooks.event_loop import forever
from logto_webhooks.mapping import PAGE, Mappings
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.links import COMPARING
from logto_webhooks.mapping.memberships import find_other_end, list_memberships
from logto_webhooks.mapping.mirror import TABLES, read_pairs
from logto_webhooks.mapping.row_limits import ONE_RECORD_S, SHORT_STATEMENT_MS
from logto_webhooks.mapping.table_writer import PlannedRow
from logto_webhooks.mapping.tally import AppliedMapping, Page, Result, Tally
from logto_webhooks.records.record import Key, Kind, membership

T = TypeVar("T")
LOOK_S: Final = 2.0
PAGES: Final = 10  # of what is tried again in one look
MOST_SLOW: Final = 5_000
LOOKS: Final = 30  # after so many, everything that was refused is tried again
FIRST_PAUSE_S: Final = 5.0  # until a row that took too long even alone is tried again
LONGEST_PAUSE_S: Final = 600.0
RESTS: Final = 9  # times as long as the row took
LONGEST_REST_S: Final = 120.0
_OUTDATED: Final = (
    "a newer release of your application maps it differently: use that release. If you have undone "
    "its change, wait until five minutes after the end of its last process"
)
OWED: Final[tuple[State, ...]] = ("owed",)
REFUSED: Final[tuple[State, ...]] = ("waiting", "conflict")
UNSETTLED: Final = (*OWED, *REFUSED)


async def apply_step(host: TransactionRunner, mappings: Mappings) -> int | None:
    """Write the rows of the next records of a mapping that isn't applied to all of them, or of the
    next memberships of a user or an organization that has a row now. Return how many these were;
    None if nothing is left, or others do it now.

    Raises StoreUnavailable.
    """
    beginning = await host.read(partial(_find_beginning, mappings=mappings))
    mappings.may_begin &= beginning
    if beginning - mappings.may_begin:
        await await_open_transactions(host)
        mappings.may_begin |= beginning
    step = host.run_large(partial(_apply_step, mappings=mappings))
    return await run_page(mappings, step, lambda count: count or 0)


async def run_page(mappings: Mappings, page: Awaitable[T], count: Callable[[T], int]) -> T:
    """Await the transaction of a page, and fit the size of the next ones to the time that it took.
    `count` returns from its result how many records were written."""
    started = time.perf_counter()
    try:
        result = await page
    except StoreUnavailable:
        mappings.page_sizer.halve()
        raise
    if written := count(result):
        mappings.page_sizer.adjust(written, time.perf_counter() - started)
    return result


class Sweep:
    """Tries again what has one of some states: one mapping after the other, page by page, in any
    number of steps. Lists are read beside a writer."""

    def __init__(
        self, host: TransactionRunner, mappings: Mappings, states: Sequence[State]
    ) -> None:
        """It is over until it begins."""
        self._host = host
        self._mappings = mappings
        self._states = tuple(states)
        self._left: list[str] = []  # mappings
        self._after = ""

    def begin(self) -> None:
        """Begin anew, if it is over."""
        if not self._left:
            self._left = [mapping.name for mapping in self._mappings.registered]
            self._after = ""

    async def step(self) -> int | None:
        """Try the next page again. Return how many records these were; None if it is over.

        Raises StoreUnavailable. The next step then goes on behind that page.
        """
        while self._left:
            rows = await self._host.read(
                partial(
                    _list_unsettled,
                    mappings=self._mappings,
                    name=self._left[0],
                    after=self._after,
                    limit=self._mappings.page_sizer.weight,
                    only_owed=self._states == OWED,
                )
            )
            if not rows:
                del self._left[0]
                self._after = ""
                continue
            self._after = rows[-1].place
            keys = {row.record for row in rows if row.state in self._states}
            if keys:
                work = partial(_write_again, mappings=self._mappings, keys=keys)
                page = self._host.run_large(work)
                return await run_page(self._mappings, page, lambda count: count)
        return None


class SlowRows:
    """Writes the rows that take too long: one record after the other, each in a transaction of its
    own. What can't be written even then is tried again after a pause that grows.

    On SQLite, everybody waits for each try. So there is a rest after a slow one, which is longer
    the more rows are slow.
    """

    def __init__(self, host: TransactionRunner, mappings: Mappings) -> None:
        self._host = host
        self._mappings = mappings
        self._pauses: dict[Key, tuple[float, float]] = {}  # after a try: how long, and until when
        self._rests_until = 0.0

    async def write_due(self) -> None:
        """Write the rows of all records that are due, each once: first those that were tried least.

        Raises StoreUnavailable.
        """
        tried: set[Key] = set()
        while True:
            # Those that are tried again later hide no others.
            limit = min(PAGE + len(self._pauses), MOST_SLOW)
            list_slow = partial(_list_slow, mappings=self._mappings, limit=limit)
            keys, has_one_writer = await self._host.read(list_slow)
            self._pauses = {key: self._pauses[key] for key in keys if key in self._pauses}
            now = time.monotonic()
            if now < self._rests_until:
                break
            due = {key: self._pauses.get(key, (0.0, 0.0)) for key in keys}
            due = {k: pause for k, pause in due.items() if pause[1] <= now and k not in tried}
            if not due:
                break
            key = min(due, key=due.__getitem__)
            tried.add(key)
            pause_s, _ = due[key]
            work = partial(_write_alone, mappings=self._mappings, key=key)
            try:
                await self._host.run_slow(work, ONE_RECORD_S)
            finally:
                ended = time.monotonic()
                pause_s = min(max(FIRST_PAUSE_S, 2 * pause_s), LONGEST_PAUSE_S)
                self._pauses[key] = pause_s, ended + pause_s
                if ended - now > SHORT_STATEMENT_MS / 1000:
                    self._mappings.caution.renew()
                    rest_s = RESTS * (ended - now) * len(self._pauses) if has_one_writer else 0
                    self._rests_until = ended + min(rest_s, LONGEST_REST_S)


async def retry_unsettled(
    host: TransactionRunner, mappings: Mappings, states: Sequence[State] = UNSETTLED
) -> int:
    """Try again what has one of these states; return how many. Raises StoreUnavailable."""
    sweep, total = Sweep(host, mappings, states), 0
    sweep.begin()
    while (count := await sweep.step()) is not None:
        total += count
    return total


async def apply_all(
    host: TransactionRunner,
    mappings: Mappings,
    dry_run: bool = False,
    progressed: Callable[[int], None] = lambda count: None,
    allow_deletes: bool = False,
) -> list[AppliedMapping]:
    """Write the rows of all records, in short transactions, and count what was done. With
    `dry_run`, roll each of them back. With `allow_deletes`, delete any number of rows. Raises
    StoreUnavailable."""
    run = ApplyRun(rehearses=dry_run, allows_deletions=allow_deletes)
    if not dry_run:
        await host.run(partial(_register, mappings=mappings))
        await await_open_transactions(host)
        await SlowRows(host, mappings).write_due()
    tally = Tally(mappings, run)
    for mapping in mappings.registered:
        while not dry_run and await host.run(partial(_forget_unlinked, name=mapping.name)):
            pass
        tally.begin(mapping)
        async for page in run_over_all(host, mappings, mapping, run):
            tally.add_page(page)
            progressed(tally.records)
        if allow_deletes and not dry_run:
            # They have been looked at, so the next ones are counted anew.
            while await host.run(partial(_reset_deletion_count, mapping=mapping)):
                pass
        if not dry_run:
            await host.run(partial(_finish, mapping=mapping))
    return tally.finish()


async def run_over_all(
    host: TransactionRunner, mappings: Mappings, mapping: RegisteredMapping, run: ApplyRun
) -> AsyncIterator[Page]:
    """Write the rows of all records of a mapping, page by page; yield each page. If existing rows
    are linked, all records are compared first, and then those are linked that can be: else who gets
    a row would depend on the page."""
    for linking in (False, True) if mapping.links else (False,):
        phase = replace(mapping, applied_to=LINKING) if linking else mapping
        after, place = "", 0
        keys: Sequence[Key] = ()
        while True:
            listed = run.find_rows(mapping.name).records if run.rehearses else None
            end = place + mappings.page_sizer.weight
            some = listed[place:end] if linking and listed is not None else None
            work = partial(
                _apply_page, mappings=mappings, mapping=phase, after=after, run=run, ids=some
            )
            written = run_or_rehearse(host, work, run.rehearses)
            page = await run_page(mappings, written, lambda page: len(page.keys))
            if not page.keys or page.keys == keys:
                break
            yield page
            keys = page.keys
            after, place = page.keys[-1].id, place + len(page.keys)
    if mapping.kind == "membership":
        async for page in _run_over_ended(host, mappings, mapping, run):
            yield page


async def _run_over_ended(
    host: TransactionRunner, mappings: Mappings, mapping: RegisteredMapping, run: ApplyRun
) -> AsyncIterator[Page]:
    """Delete the rows of memberships that are over, and of their roles, whose deletion was held or
    refused: the mirror doesn't have these any more."""
    after: str | None = ""
    while after is not None:
        work = partial(_apply_ended, mappings=mappings, mapping=mapping, after=after, run=run)
        written = run_or_rehearse(host, work, run.rehearses)
        page, after = await run_page(mappings, written, lambda result: len(result[0].keys))
        yield page


def _register(store: Store, mappings: Mappings) -> None:
    """Register the mappings. Raises InvalidMapping if a newer release's are in use."""
    store.mappings.register(mappings.registered)
    for mapping in mappings.registered:
        _check_current(store, mapping)


def _check_current(store: Store, mapping: RegisteredMapping) -> None:
    """Raise InvalidMapping if a newer release has registered another definition. It can't do so
    until the transaction ends."""
    if not store.mappings.hold(mapping):
        raise InvalidMapping(table=mapping.name, problem=_OUTDATED)


def check_not_replaced(store: Store, mapping: RegisteredMapping) -> None:
    """Raise InvalidMapping if a newer release, which is running, has replaced the definition. One
    that is newer than the registered one may be tried."""
    if store.mappings.is_replaced(mapping):
        raise InvalidMapping(table=mapping.name, problem=_OUTDATED)


def _forget_unlinked(store: Store, name: str) -> bool:
    return store.mappings.forget_unlinked(name)


def _reset_deletion_count(store: Store, mapping: RegisteredMapping) -> int:
    _check_current(store, mapping)
    return store.mappings.reset_deletion_count(mapping.name)


def _finish(store: Store, mapping: RegisteredMapping) -> None:
    _check_current(store, mapping)
    store.mappings.set_applied(mapping.name, None)


def _apply_page(
    store: Store,
    mappings: Mappings,
    mapping: RegisteredMapping,
    after: str,
    run: ApplyRun,
    ids: Sequence[str] | None,
) -> Page:
    """Write the rows of the next records, by the command. Return the records, and what was done."""
    if run.rehearses:
        check_not_replaced(store, mapping)
    else:
        _check_current(store, mapping)
    limit = mappings.page_sizer.weight
    keys = [Key(mapping.kind, i) for i in ids or ()]
    if ids is None:
        keys = _list_page(store, mapping, after, limit)
    mappings.write_parents(store.connection, mapping.name, keys, run)
    results = _write_for_command(store, mappings, mapping, keys, run)
    return Page(keys, results, mapping.applied_to == LINKING)


def _apply_ended(
    store: Store, mappings: Mappings, mapping: RegisteredMapping, after: str, run: ApplyRun
) -> tuple[Page, str | None]:
    """Try the next unsettled rows of memberships that are over. Return the last row, too; None at
    the end."""
    if not run.rehearses:
        _check_current(store, mapping)
    rows = store.mappings.list_unsettled(mapping.name, mappings.page_sizer.weight, after)
    records = {row.record for row in rows}
    members = read_pairs(store.connection, "member", [record.id for record in records])
    present = {pair.record_id for pair in members}
    keys = sorted(record for record in records if record.id not in present)
    results = _write_for_command(store, mappings, mapping, keys, run)
    return Page(keys, results, is_again=True), rows[-1].place if rows else None


def _write_for_command(
    store: Store,
    mappings: Mappings,
    mapping: RegisteredMapping,
    keys: Sequence[Key],
    run: ApplyRun,
) -> list[Result]:
    """Write the rows of records for the command. Return what became of them."""
    results: list[Result] = []
    # Nothing is registered in a rehearsal.
    instead = [*mappings.registered, mapping] if run.rehearses else [mapping]
    _write_page(
        store, mappings, mapping, keys, instead, lambda *result: results.append(result), run
    )
    return results


def _list_page(store: Store, mapping: RegisteredMapping, after: str, limit: int) -> list[Key]:
    """List the next records: all, and then those that can be linked."""
    if mapping.applied_to == LINKING:
        return store.mappings.list_put_off(mapping.name, COMPARING, limit)
    return list_keys(store, mapping.kind, after, limit)


def _write_page(
    store: Store,
    mappings: Mappings,
    mapping: RegisteredMapping,
    keys: Sequence[Key],
    instead: Sequence[RegisteredMapping] = (),
    tell: Callable[[str, PlannedRow, RowState], None] | None = None,
    run: ApplyRun | None = None,
) -> None:
    """Write the rows of records by the registered mappings, and by those that a command has
    `instead`. Records that somebody else has locked now are owed."""
    free = store.lock_free(keys)
    # Read after that: who registers another definition then waits before looking at records.
    registered = store.mappings.registered() | {own.name: own for own in instead}
    mappings.write(store.connection, free, registered, tell, run)
    store.mappings.mark_owed(mapping, set(keys) - free, CHANGING)


async def keep_applied(host: TransactionRunner, mappings: Mappings) -> None:
    """Apply new and changed mappings to all records, and try again what was refused, until
    cancelled. What is owed, such as a locked row, is tried most often. Any number of processes may
    do this."""
    if not mappings:
        return
    looks = 0
    owed, refused = (Sweep(host, mappings, states) for states in (OWED, REFUSED))

    slow = SlowRows(host, mappings)

    async def look() -> None:
        nonlocal looks
        failed: Exception | None = None
        try:
            await _apply_steps(host, mappings)
        except Exception as error:  # what is owed can be written all the same
            failed = error
        owed.begin()
        if looks % LOOKS == 0:
            refused.begin()
        looks += 1
        for sweep in (owed, refused):  # the rest of a long one waits for the next look
            for _ in range(PAGES):
                if await sweep.step() is None:
                    break
        if failed is not None:
            raise failed

    async with asyncio.TaskGroup() as loops:
        loops.create_task(forever(look, LOOK_S))
        loops.create_task(forever(slow.write_due, LOOK_S))


async def apply_due(host: TransactionRunner, mappings: Mappings) -> None:
    """Apply new and changed mappings to all records, and write what is owed, once."""
    if mappings:
        await _apply_steps(host, mappings)
        await retry_unsettled(host, mappings, OWED)
        await SlowRows(host, mappings).write_due()


async def _apply_steps(host: TransactionRunner, mappings: Mappings) -> None:
    while await apply_step(host, mappings) is not None:
        pass


def _find_beginning(store: Store, mappings: Mappings) -> set[str]:
    """Return the mappings that have yet to be applied to the first record."""
    registered = store.mappings.registered()
    current = mappings.find_current(registered)
    return {name for name in current if registered[name].applied_to == ""}


def _apply_step(store: Store, mappings: Mappings) -> int | None:
    registered = store.mappings.registered()
    current = mappings.find_current(registered)
    wanted = [
        registered[name]
        for name in current
        if registered[name].applied_to != "" or name in mappings.may_begin
    ]
    mapping = store.mappings.lock_unapplied(wanted) if wanted else None
    if mapping is None:
        return _write_followers(store, mappings, registered) if current else None
    if store.mappings.forget_unlinked(mapping.name):
        return 0
    is_linking = mapping.applied_to == LINKING
    limit = mappings.page_sizer.weight
    keys = _list_page(store, mapping, "" if is_linking else mapping.applied_to or "", limit)
    _write_page(store, mappings, mapping, keys, run=ApplyRun())
    # What can't be settled now is tried again as all that waits.
    if not keys or (is_linking and _list_page(store, mapping, "", limit) == keys):
        links = any(own.links for own in mappings.registered if own.name == mapping.name)
        store.mappings.set_applied(mapping.name, LINKING if links and not is_linking else None)
    elif not is_linking:
        store.mappings.set_applied(mapping.name, keys[-1].id)
    return len(keys)


def _write_followers(
    store: Store, mappings: Mappings, registered: Mapping[str, RegisteredMapping]
) -> int | None:
    """Write the rows of the next memberships of a user or an organization that has a row now.
    Return how many these were; None if there is no such user or organization."""
    arrival = store.mappings.lock_arrival(mappings.find_current(registered))
    if arrival is None:
        return None
    limit = mappings.page_sizer.weight
    keys = list_memberships(store.connection, arrival.end, limit, arrival.after)
    _write_page(store, mappings, registered[arrival.mapping], keys)
    after = find_other_end(arrival.end, keys[-1]).id if len(keys) == limit else None
    store.mappings.move_arrival(arrival, after)
    return len(keys)


def _list_unsettled(
    store: Store, mappings: Mappings, name: str, after: str, limit: int, only_owed: bool
) -> list[UnsettledRow]:
    if name not in mappings.find_current(store.mappings.registered()):
        return []
    return store.mappings.list_unsettled(name, limit, after, only_owed=only_owed)


def _write_again(store: Store, mappings: Mappings, keys: Collection[Key]) -> int:
    # They haven't changed, so mappings that this process doesn't have are owed nothing.
    mappings.write(store.connection, store.lock_free(keys), store.mappings.registered())
    return len(keys)


def _list_slow(store: Store, mappings: Mappings, limit: int) -> tuple[list[Key], bool]:
    """List the records of rows that take too long. Return also whether there is one writer."""
    current = mappings.find_current(store.mappings.registered())
    has_one_writer = store.connection.dialect.name == "sqlite"
    return store.mappings.list_slow(current, limit), has_one_writer


def _write_alone(store: Store, mappings: Mappings, key: Key) -> None:
    free = store.lock_free([key])
    mappings.write(store.connection, free, store.mappings.registered(), is_alone=True)


def list_keys(store: Store, kind: Kind, after: str, limit: int) -> list[Key]:
    """List the next records that have a row in the mirror."""
    if kind == "membership":
        pair = (members.c.logto_organization_id, members.c.logto_user_id)
        query = sa.select(*pair).order_by(*pair).limit(limit)
        if after:
            organization, user = Key(kind, after).organization_and_user
            query = query.where(sa.tuple_(*pair) > sa.tuple_(organization.id, user.id))
        return [
            membership(row.logto_organization_id, row.logto_user_id) for row in store.execute(query)
        ]
    table, name = TABLES["user" if kind == "user" else "organization"]
    column = table.c[name]
    query = sa.select(column).where(column > after).order_by(column).limit(limit)
    return [Key(kind, row[0]) for row in store.execute(query)]
