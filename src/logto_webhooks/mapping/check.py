"""Compare the application's rows with the mirror, without changing them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from msgspec import Struct

from logto_webhooks.database.mapped_rows import LINKING
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import PAGE, list_keys
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.links import COMPARING
from logto_webhooks.mapping.table_writer import PlannedRow


class Difference(Struct, frozen=True, kw_only=True):
    """A difference between a record and the application's row.

    A row is "missing", "extra" (Logto has no such record), "different" in `columns`, or "refused"
    for a `reason`.
    """

    mapping: str
    problem: Literal["missing", "extra", "different", "refused"]
    logto_id: str
    columns: tuple[str, ...] = ()
    reason: str | None = None


async def find_differences(
    host: TransactionRunner, mappings: Mappings
) -> AsyncIterator[Sequence[Difference]]:
    """Compare all rows of all mappings, in short transactions; yield the differences page by page.
    Raises StoreUnavailable."""
    run = ApplyRun(rehearses=True)
    for mapping in mappings.all:
        after = ""
        compare = partial(_compare_page, mappings=mappings, mapping=mapping, run=run)
        while True:
            page = await run_or_rehearse(host, partial(compare, after=after), dry=True)
            yield page.differences
            if page.last is None:
                break
            after = page.last
        # Only now is it known which rows several records want.
        put_off = run.find_rows(mapping.name).records
        for place in range(0, len(put_off), PAGE):
            ids = put_off[place : place + PAGE]
            page = await run_or_rehearse(host, partial(compare, after="", ids=ids), dry=True)
            yield page.differences
        place_of: tuple[Any, ...] | None = ()
        find = partial(_find_extra, mappings=mappings, mapping=mapping)
        while place_of is not None:
            extra, place_of = await run_or_rehearse(host, partial(find, after=place_of), dry=True)
            yield extra


class _Page(Struct, frozen=True):
    differences: list[Difference]
    last: str | None


def _compare_page(
    store: Store,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    run: ApplyRun,
    after: str,
    ids: Sequence[str] | None = None,
) -> _Page:
    keys = list_keys(store, mapping.kind, after) if ids is None else []
    ids = [key.id for key in keys] if ids is None else ids
    if not ids:
        return _Page([], None)
    is_new = bool(keys)
    writer = mappings.make_writer(store.connection, mapping, run, "" if is_new else LINKING)
    plans = writer.plan(ids)
    if is_new:
        put_off = [plan for plan in plans if plan.state.reason == COMPARING]
        run.find_rows(mapping.name).records += [plan.logto_id for plan in put_off]
        plans = [plan for plan in plans if plan.state.reason != COMPARING]
    return _Page(list(_to_differences(mapping.name, plans)), ids[-1])


def _to_differences(mapping: str, plans: Sequence[PlannedRow]) -> Iterator[Difference]:
    for plan in plans:
        if plan.action == "insert" or plan.waits_for_end:
            yield Difference(mapping=mapping, problem="missing", logto_id=plan.logto_id)
        elif plan.action == "update":
            columns = tuple(sorted(map(str, plan.values)))
            yield Difference(
                mapping=mapping, problem="different", logto_id=plan.logto_id, columns=columns
            )
        elif plan.action == "delete":
            yield Difference(mapping=mapping, problem="extra", logto_id=plan.logto_id)
        elif plan.state.state != "ok":
            yield Difference(
                mapping=mapping,
                problem="refused",
                logto_id=plan.logto_id,
                reason=plan.state.reason,
            )


def _find_extra(
    store: Store,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    after: tuple[Any, ...],
) -> tuple[list[Difference], tuple[Any, ...] | None]:
    """Find rows, after a primary key, whose records the mirror doesn't have; return the last
    primary key, too."""
    writer = mappings.make_writer(store.connection, mapping)
    ids, last = writer.find_extra(after, PAGE)
    extra = [Difference(mapping=mapping.name, problem="extra", logto_id=id_) for id_ in ids]
    return extra, last
