"""Compare the application's rows with the mirror, without changing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from msgspec import Struct

from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import PAGE, list_keys
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.deletions import Deletions
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


async def find_differences(host: TransactionRunner, mappings: Mappings) -> list[Difference]:
    """Compare all rows of all mappings, in short transactions. Raises StoreUnavailable."""
    differences: list[Difference] = []
    deletions = Deletions()
    for mapping in mappings.all:
        after = ""
        compare = partial(_compare_page, mappings=mappings, mapping=mapping, deletions=deletions)
        while True:
            page = await run_or_rehearse(host, partial(compare, after=after), dry=True)
            differences += page.differences
            if page.last is None:
                break
            after = page.last
        place: tuple[Any, ...] | None = ()
        find = partial(_find_extra, mappings=mappings, mapping=mapping)
        while place is not None:
            extra, place = await run_or_rehearse(host, partial(find, after=place), dry=True)
            differences += extra
    return differences


class _Page(Struct, frozen=True):
    differences: list[Difference]
    last: str | None


def _compare_page(
    store: Store,
    mappings: Mappings,
    mapping: EntityMapping | PairMapping,
    after: str,
    deletions: Deletions,
) -> _Page:
    keys = list_keys(store, mapping.kind, after)
    if not keys:
        return _Page([], None)
    writer = mappings.make_writer(store.connection, mapping, deletions)
    plans = writer.plan([key.id for key in keys])
    return _Page(list(_to_differences(mapping.name, plans)), keys[-1].id)


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


def count_problems(differences: Sequence[Difference]) -> dict[str, int]:
    """Count differences by problem."""
    counts: dict[str, int] = {}
    for difference in differences:
        counts[difference.problem] = counts.get(difference.problem, 0) + 1
    return counts
