"""Decide which rows may be deleted, or unlinked, now. Such a row can't be restored from Logto.

- Logto must surely have no such record: a delivery says so, or two answers of its API that are a
  minute apart.
- Not too many rows of a table may be affected at once: a Logto that was restored from an old dump,
  or a mistake there, must not empty the application. What is held goes on only when allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.dialect import among
from logto_webhooks.database.mapped_rows import (
    PERMISSION,
    SECOND_ANSWER,
    UNCONFIRMED,
    RowState,
    StateStore,
)
from logto_webhooks.database.schema import records
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import MappedKind
from logto_webhooks.records.record import CONFIRMED_MS, NEVER, RESTORED, RESTORED_MS, Key

FREE: Final = 20  # rows of one mapping that may always be deleted at once
SHARE: Final = 20  # beyond these, one row of so many: 5%
WINDOW_MS: Final = 3_600_000  # what is "at once"
TOO_MANY: Final = (
    "more than 20 rows and 5% of the table would be deleted within an hour: see "
    "`logto-webhooks doctor`"
)
_END_STAYS: Final = "the row of its {} isn't deleted yet"
_END_IS_BACK: Final = "its {} was restored, and its memberships and roles aren't refetched yet"


class Stop(Struct, frozen=True):
    """Why a row isn't deleted now. `blocked_by` is what must change first (see `RowState`)."""

    state: Literal["waiting", "held"]
    reason: str
    blocked_by: str | None = None


class DeletionGuard:
    """Decides for the records of one mapping, in one transaction."""

    def __init__(self, name: str, states: StateStore, run: ApplyRun | None) -> None:
        self._states = states
        self._allowed = run is not None and run.allows_deletions
        self._counted: set[str] = set() if run is None else run.deletions.setdefault(name, set())
        self._decided: dict[str, Stop | None] = {}

    def decide(
        self, ids: Collection[str], stored: Mapping[str, RowState], unconfirmed: Collection[str]
    ) -> dict[str, Stop]:
        """Return which of the deletions are stopped. All that are new are decided together:
        if they are too many, all are held. What is held stays so until it is allowed."""
        new = [id_ for id_ in ids if id_ not in self._decided]
        if new:
            self._counted.update(new)
            waiting = {
                id_: Stop("waiting", UNCONFIRMED, SECOND_ANSWER)
                for id_ in new
                if id_ in unconfirmed
            }
            sure = [id_ for id_ in new if id_ not in waiting]
            held = {
                id_
                for id_ in sure
                if not self._allowed and id_ in stored and stored[id_].blocked_by == PERMISSION
            }
            if len(held) < len(sure) and not self._allowed and self._is_too_many():
                held = set(sure)
            self._decided |= dict.fromkeys(sure) | waiting
            self._decided |= dict.fromkeys(held, Stop("held", TOO_MANY, PERMISSION))
        return {id_: stop for id_ in ids if (stop := self._decided[id_]) is not None}

    def _is_too_many(self) -> bool:
        """Whether too many rows would be deleted at once: with those that were deleted lately, and
        those that are held, or wait for Logto's second answer."""
        count = len(self._counted) + self._states.count_deletions(self._counted, WINDOW_MS)
        return count > FREE and not self._states.has_rows(count * SHARE, WINDOW_MS)

    def note(self, ids: Collection[str]) -> None:
        """Note which rows were deleted. What was allowed doesn't count."""
        if ids and not self._allowed:
            self._states.note_deletions(ids)


def find_unconfirmed(connection: sa.Connection, kind: MappedKind, ids: Collection[str]) -> set[str]:
    """Return those of the deleted records of which neither a delivery nor two answers of Logto say
    that they are gone."""
    query = sa.select(records.c.logto_id).where(
        records.c.kind == kind, among(records.c.logto_id, "ids"), ~is_confirmed
    )
    return set(connection.scalars(query, {"ids": sorted(ids)}))


# The conditions are never NULL.
_gone_at = sa.func.coalesce(records.c.gone_at, NEVER)
is_confirmed = sa.or_(
    sa.and_(
        _gone_at == sa.func.coalesce(records.c.deleted_at, NEVER),
        _gone_at != NEVER,
        sa.func.coalesce(records.c.stamp, NEVER) <= _gone_at + RESTORED_MS,
    ),
    sa.func.coalesce(records.c.absent_at - records.c.absent_since, NEVER) >= CONFIRMED_MS,
)


def find_unready_ends(connection: sa.Connection, ends: Collection[Key]) -> dict[Key, Stop]:
    """Return the users and organizations whose memberships' and roles' rows aren't deleted yet:
    only one answer of Logto says that they are gone, or they were restored just now."""
    stops: dict[Key, Stop] = {}
    is_back = records.c.waiting_reason.contains(RESTORED)
    for kind in ("organization", "user"):
        ids = sorted(end.id for end in ends if end.kind == kind)
        query = sa.select(records.c.logto_id, records.c.deleted_at).where(
            records.c.kind == kind,
            among(records.c.logto_id, "ids"),
            sa.or_(sa.and_(records.c.deleted_at.is_not(None), ~is_confirmed), is_back),
        )
        for id_, deleted_at in connection.execute(query, {"ids": ids}) if ids else ():
            reason = _END_IS_BACK if deleted_at is None else _END_STAYS
            end = Key("organization" if kind == "organization" else "user", id_)
            stops[end] = Stop("waiting", reason.format(kind), name_departure(end))
    return stops


def stop_for_end(end: Key, stop: Stop) -> Stop:
    """Return why the row of a membership or a role isn't deleted either."""
    return Stop(stop.state, _END_STAYS.format(end.kind), name_departure(end))


def name_departure(end: Key) -> str:
    """How a state names the user or the organization that has to be deleted first."""
    return f"deleted {end.kind}:{end.id}"


def find_read_away(connection: sa.Connection, pairs: Collection[str]) -> set[str]:
    """Return those of the memberships that are over because Logto's API no longer lists them.

    A delivery can end thousands of memberships at once, but Logto's lists may be of another state.
    """
    query = sa.select(records.c.logto_id, records.c.groups, records.c.gone_at).where(
        records.c.kind == "membership", among(records.c.logto_id, "ids")
    )
    away = set()
    for id_, groups, gone_at in connection.execute(query, {"ids": sorted(pairs)}):
        present = groups.get("present")
        if present is None or (gone_at is not None and present["stamp"] <= gone_at):
            continue
        if present["read_at"] != NEVER and present["stamp"] == present["read_at"] + 1:
            away.add(id_)
    return away
