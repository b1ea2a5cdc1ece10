"""Report what keeps the rows of mapped tables from being written."""

from __future__ import annotations

import logging
from functools import partial
from typing import Final

from logto_webhooks.database.mapped_rows import State
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.instrumentation import Observer, RowsNotWritten, TablesNotMigrated
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.own_schema import inspect_own_schema

_REPORTED: Final[tuple[State, ...]] = ("conflict", "owed", "held")
_OWED_S: Final = 10.0  # longer than the first tries take
REPORT_S: Final = 10.0
logger = logging.getLogger("logto_webhooks")
_KEPT: Final = (
    'The mapping of %s has when_deleted="keep", and %s is unique: a new record with the value of a '
    "deleted %s gets no row. It is a conflict."
)
_HARMFUL: Final = "%s: drop this action in the database."


def warn_about_kept(mapping: EntityMapping | PairMapping) -> None:
    """Warn if the rows of deleted users keep unique values that others may want."""
    if isinstance(mapping, EntityMapping) and mapping.when_deleted == "keep":
        for column in mapping.unique_columns:
            logger.warning(_KEPT, mapping.name, column.name, mapping.kind)


class UnwrittenReporter:
    """Reports each reason why rows of a mapping aren't written, once until there are none."""

    def __init__(self, host: TransactionRunner, observe: Observer) -> None:
        self._host = host
        self._observe = observe
        self._reported: set[tuple[str, str, str]] = set()

    async def report(self) -> None:
        """Report new reasons. Raises StoreUnavailable."""
        groups = await self._host.read_long(lambda store: store.mappings.list_unwritten(_REPORTED))
        reasons: set[tuple[str, str, str]] = set()
        for group in groups:
            if group.state == "owed" and group.since_s < _OWED_S:
                continue
            found = (group.mapping, group.state, group.reason or "unknown")
            reasons.add(found)
            if found not in self._reported:
                self._observe(RowsNotWritten(*found, group.count))
        self._reported = reasons


async def report_missing(host: TransactionRunner, mappings: Mappings, observe: Observer) -> None:
    """Report which tables and columns of the mappings don't exist, and warn about foreign keys that
    do harm. Raises StoreUnavailable."""
    if mappings:
        own_schema = await host.read(partial(inspect_own_schema, mappings=mappings))
        for mapping, problem in own_schema.missing.items():
            observe(TablesNotMigrated(mapping, problem))
        for harm in own_schema.cascades:
            logger.warning(_HARMFUL, harm)
