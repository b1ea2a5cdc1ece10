"""Compare the application's rows with the mirror, without changing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from msgspec import Struct

from logto_webhooks.database.mapped_rows import LINKING, RowState
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping, StoreUnavailable
from logto_webhooks.mapping import PAGE, Mappings
from logto_webhooks.mapping.apply import check_not_replaced, list_keys, run_page
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.links import COMPARING
from logto_webhooks.mapping.own_schema import find_missing
from logto_webhooks.mapping.table_writer import PlannedRow, is_hindered
from logto_webhooks.mapping.tally import Outcome, Unwritten, find_outcome, note_parent
from logto_webhooks.records.record import Key

Problem = Literal["missing", "unlinked", "different", "extra", "unchecked"] | Unwritten


class Difference(Struct, frozen=True, kw_only=True):
    """A difference between a record and the application's row.

    A row is "missing", "unlinked" (an existing row is to be linked), "different" in `columns`, or
    "extra" (Logto has no such record). If `mapping apply` wouldn't write it, `state` and `reason`
    say why, and `blocked_by` is what is in the way: the primary key of a row, as JSON, or a record.
    If nothing else is known of a row, its state is the `problem`, too.

    A mapping is "unchecked" for the `reason`; the `logto_id` then is None.
    """

    mapping: str
    problem: Problem
    logto_id: str | None = None
    columns: tuple[str, ...] = ()
    state: Unwritten | None = None
    reason: str | None = None
    blocked_by: str | None = None


async def find_differences(
    host: TransactionRunner, mappings: Mappings, excluded: Counter[str] | None = None
) -> AsyncIterator[Sequence[Difference]]:
    """Compare all rows of all mappings, in short transactions; yield the differences page by page.
    Add to `excluded` how many records of each mapping get no row, because of `where` or
    `create=False`.

    Whether the database takes a row is tried in transactions that are rolled back. A mapping that
    can't be checked is a difference. Raises StoreUnavailable.
    """
    run = ApplyRun(rehearses=True, excluded=Counter() if excluded is None else excluded)
    for mapping in mappings.all:
        if problem := await host.read(partial(_find_problem, mapping=mapping, mappings=mappings)):
            yield [_uncheck(mapping, problem)]
            continue
        try:
            async for page in _compare(host, mappings, mapping, run):
                yield page
        except StoreUnavailable as error:
            yield [_uncheck(mapping, error.problem)]


def _uncheck(mapping: EntityMapping | PairMapping, problem: str) -> Difference:
    return Difference(mapping=mapping.name, problem="unchecked", reason=problem)


def _find_problem(
    store: Store,
    mapping: EntityMapping | PairMapping,
    mappings: Mappings,
) -> str:
    """Say why a mapping can't be checked, and what to do; "" if it can."""
    registered = mappings.registered
    try:
        check_not_replaced(store, next(own for own in registered if own.name == mapping.name))
    except InvalidMapping as error:
        return error.problem
    if missing := find_missing(store, mapping):
        return f"{missing}. Run your migrations"
    # Without the rows of its users, say, nobody knows what its rows should be.
    for parent in mappings.find_parents(mapping):
        if missing := find_missing(store, parent):
            return f"Its rows refer to {parent.name}. {missing}. Run your migrations"
    return ""


async def _compare(
    host: TransactionRunner,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    run: ApplyRun,
) -> AsyncIterator[Sequence[Difference]]:
    async for page in _compare_records(host, mappings, mapping, run, linking=False):
        yield page
    # Only now is it known which rows several records want.
    async for page in _compare_records(host, mappings, mapping, run, linking=True):
        yield page
    place_of: tuple[Any, ...] | None = ()
    find = partial(_find_extra, mappings=mappings, mapping=mapping)
    while place_of is not None:
        extra, place_of = await run_or_rehearse(host, partial(find, after=place_of), dry=True)
        yield extra


async def _compare_records(
    host: TransactionRunner,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    run: ApplyRun,
    *,
    linking: bool,
) -> AsyncIterator[Sequence[Difference]]:
    """Compare all records with their rows, or if `linking`, those that were put off. Those that are
    hindered by others on their page are compared again, and one by one those that seem slow."""
    after: str | None = None if linking else ""
    left = list(run.find_rows(mapping.name).records) if linking else []
    alone: list[str] = []
    while alone or left or after is not None:
        limit = mappings.page_sizer.weight
        some = alone[:1] or left[:limit]
        work = partial(
            _compare_page,
            mappings=mappings,
            mapping=mapping,
            run=run,
            after=after or "",
            ids=some,
            limit=limit,
            linking=linking,
        )
        rehearsal = run_or_rehearse(host, work, dry=True)
        page = await run_page(mappings, rehearsal, lambda page: len(page.ids))
        yield page.differences
        if alone:
            alone = alone[1:]
        elif left:
            left = left[limit:]
        else:
            after = page.ids[-1] if page.ids else None
        left = [*page.hindered, *left]
        alone += page.slow


class _Page(Struct, frozen=True):
    ids: Sequence[str]  # of the records
    differences: list[Difference]
    hindered: Sequence[str] = ()  # those that other records took the time of
    slow: Sequence[str] = ()  # those to compare alone


def _compare_page(
    store: Store,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    run: ApplyRun,
    after: str,
    ids: Sequence[str],
    limit: int,
    linking: bool,
) -> _Page:
    """Compare records with their rows: these, or else the next ones."""
    keys = [Key(mapping.kind, id_) for id_ in ids]
    if not ids:
        keys = list_keys(store, mapping.kind, after, limit)
        ids = [key.id for key in keys]
    if not ids:
        return _Page([], [])
    writer = mappings.make_writer(store.connection, mapping, run, LINKING if linking else "")
    mappings.write_parents(store.connection, mapping.name, keys, run)
    stored = writer.find_states(ids)
    writer.attempt(writer.write, ids)
    results = sorted(writer.results, key=lambda result: result[0].logto_id)
    if isinstance(mapping, EntityMapping):  # others are written with these, if they swap values
        of_page = set(ids)
        results = [(plan, state) for plan, state in results if plan.logto_id in of_page]
    hindered, slow = [], []
    if len(ids) > 1:  # or else nothing else took the time
        states = [state for _, state in results]
        slow = _list_records(ids, [state for state in states if _seems_slow(state, stored)])
        hindered = _list_records(ids, [state for state in states if is_hindered(state)])
        if hindered == ids:
            slow = hindered[:1]
        hindered = [id_ for id_ in hindered if id_ not in slow]
        again = {*hindered, *slow}
        results = [result for result in results if _name_record(result[1]) not in again]
    if not linking:
        put_off = [plan for plan, state in results if state.reason == COMPARING]
        run.find_rows(mapping.name).records += [plan.logto_id for plan in put_off]
        results = [result for result in results if result[1].reason != COMPARING]
    return _Page(ids, list(_to_differences(mapping, results, run)), hindered, slow)


def _list_records(ids: Sequence[str], states: Iterable[RowState]) -> list[str]:
    """List the records, out of these, that the states are of."""
    records = {_name_record(state) for state in states}
    return [id_ for id_ in ids if id_ in records]


def _name_record(state: RowState) -> str:
    return state.record_id or state.logto_id


def _seems_slow(state: RowState, stored: Mapping[str, RowState]) -> bool:
    """Whether a row seems to take too long only now."""
    before = stored.get(state.logto_id)
    return state.is_tried_alone and not (before and before.is_tried_alone)


def _to_differences(
    mapping: EntityMapping | PairMapping,
    results: Sequence[tuple[PlannedRow, RowState]],
    run: ApplyRun,
) -> Iterator[Difference]:
    kind = mapping.kind if isinstance(mapping, EntityMapping) else mapping.pair
    for plan, state in results:
        outcome = find_outcome(plan, state, run)
        note_parent(kind, plan, outcome, run)
        if outcome == "excluded":
            run.excluded[mapping.name] += 1
        if outcome in (None, "excluded"):
            continue
        unwritten: Unwritten | None = None
        if outcome in ("waiting", "held", "ambiguous", "refused"):
            unwritten = outcome
        columns = tuple(sorted(map(str, plan.values))) if plan.action == "update" else ()
        if plan.links and isinstance(mapping, EntityMapping):
            columns = tuple(name for name in columns if name != mapping.key.column.key)
        yield Difference(
            mapping=mapping.name,
            problem=_name_problem(plan, outcome),
            logto_id=plan.logto_id,
            columns=columns,
            state=unwritten,
            reason=state.reason if unwritten else None,
            blocked_by=state.blocked_by if unwritten else None,
        )


def _name_problem(plan: PlannedRow, outcome: Outcome) -> Problem:
    if plan.links:
        return "unlinked"
    if plan.action == "insert" or plan.waits_for_end:
        return "missing"
    if plan.action == "update":
        return "different"
    if plan.action == "delete":
        return "extra"
    if outcome in ("waiting", "held", "ambiguous"):
        return outcome
    return "refused"


def _find_extra(
    store: Store,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    after: tuple[Any, ...],
) -> tuple[list[Difference], tuple[Any, ...] | None]:
    """Find rows, after a primary key, whose records the mirror doesn't have; return the last
    primary key, too. What the last try to delete such a row met is stored."""
    writer = mappings.make_writer(store.connection, mapping)
    ids, last = writer.find_extra(after, PAGE)
    stored = writer.find_states(ids) if ids else {}
    return [_to_extra(mapping.name, id_, stored.get(id_)) for id_ in ids], last


def _to_extra(mapping: str, logto_id: str, stored: RowState | None) -> Difference:
    if stored is None or stored.is_settled:
        return Difference(mapping=mapping, problem="extra", logto_id=logto_id)
    return Difference(
        mapping=mapping,
        problem="extra",
        logto_id=logto_id,
        state=stored.state if stored.state in ("waiting", "held") else "refused",
        reason=stored.reason,
        blocked_by=stored.blocked_by,
    )
