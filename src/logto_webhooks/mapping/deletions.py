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
from msgspec.structs import replace

from logto_webhooks.database.dialect import among
from logto_webhooks.database.mapped_rows import (
    ALONE_ALLOWED,
    ALONE_HELD,
    PERMISSION,
    SECOND_ANSWER,
    UNCONFIRMED,
    RowState,
    StateStore,
)
from logto_webhooks.database.records import OTHER_END
from logto_webhooks.database.schema import records
from logto_webhooks.database.store import Store
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import MappedKind
from logto_webhooks.records.record import (
    CONFIRMED_MS,
    NEVER,
    RESTORED,
    RESTORED_MS,
    Key,
    Kind,
)

FREE: Final = 20  # rows of one mapping that may always be deleted at once
SHARE: Final = 20  # beyond these, one row of so many: 5%
WINDOW_MS: Final = 3_600_000  # what is "at once"
TOO_MANY: Final = (
    "more than 20 rows and 5% of the table would be deleted within an hour: see "
    "`logto-webhooks doctor`"
)
UNREADABLE: Final = "its row can't be read now"
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
        self._permitted: set[str] = set()  # those that somebody has allowed

    def decide(
        self, ids: Collection[str], stored: Mapping[str, RowState], unconfirmed: Collection[str]
    ) -> dict[str, Stop]:
        """Return which of the deletions are stopped. All that are new are decided together:
        if they are too many, all are held. What is held stays so until it is allowed, and what was
        allowed is never held again."""
        new = [id_ for id_ in ids if id_ not in self._decided]
        if new:
            permitted = {id_ for id_ in new if self._is_permitted(stored.get(id_))}
            self._permitted |= permitted
            self._counted.update(id_ for id_ in new if id_ not in permitted)
            waiting = {
                id_: Stop("waiting", UNCONFIRMED, SECOND_ANSWER)
                for id_ in new
                if id_ in unconfirmed
            }
            asked = [id_ for id_ in new if id_ not in permitted and id_ not in waiting]
            held = {id_ for id_ in asked if id_ in stored and stored[id_].is_held}
            if len(held) < len(asked) and self._is_too_many():
                held = set(asked)
            self._decided |= dict.fromkeys(new) | waiting
            self._decided |= dict.fromkeys(held, Stop("held", TOO_MANY, PERMISSION))
        return {id_: stop for id_ in ids if (stop := self._decided[id_]) is not None}

    def _is_permitted(self, stored: RowState | None) -> bool:
        return self._allowed or (stored is not None and stored.is_allowed)

    def _is_too_many(self) -> bool:
        """Whether too many rows would be deleted at once: with those that were deleted lately, and
        those that are held, or wait for Logto's second answer."""
        count = len(self._counted) + self._states.count_deletions(self._counted, WINDOW_MS)
        return count > FREE and not self._states.has_rows(count * SHARE, WINDOW_MS)

    def has_let(self, id_: str) -> bool:
        """Whether a deletion was decided on, and not stopped. If its row can't be deleted now, that
        is done later: the rows of its memberships are gone."""
        return id_ in self._decided and self._decided[id_] is None

    def note(self, ids: Collection[str]) -> None:
        """Note which rows were deleted, or unlinked. What was allowed doesn't count."""
        permitted = self._permitted.intersection(ids)
        if counted := set(ids) - permitted:
            self._states.note_deletions(counted, count=True)
        if permitted:
            self._states.note_deletions(permitted, count=False)

    def keep(self, state: RowState, stored: RowState | None) -> RowState:
        """Return the state of a row as it is stored: an owed deletion stays held, or allowed. It is
        tried alone, as it may be owed because it takes long."""
        if state.state != "owed":
            return state
        was_held = stored is not None and stored.is_held
        was_allowed = stored is not None and stored.is_allowed
        was_allowed |= self.has_let(state.logto_id) or (was_held and self._allowed)
        if state.logto_id in self._permitted or was_allowed:
            return replace(state, blocked_by=ALONE_ALLOWED)
        return replace(state, blocked_by=ALONE_HELD) if was_held else state


def find_unconfirmed(connection: sa.Connection, kind: MappedKind, ids: Collection[str]) -> set[str]:
    """Return those of the deleted records of which neither a delivery nor two answers of Logto say
    that they are gone."""
    query = sa.select(records.c.logto_id).where(
        records.c.kind == kind, among(records.c.logto_id, "ids"), ~is_confirmed
    )
    return set(connection.scalars(query, {"ids": sorted(ids)}))


# The conditions are never NULL.
_gone_at = sa.func.coalesce(records.c.gone_at, NEVER)
_is_told = sa.and_(  # by a delivery
    _gone_at == sa.func.coalesce(records.c.deleted_at, NEVER),
    _gone_at != NEVER,
    sa.func.coalesce(records.c.stamp, NEVER) <= _gone_at + RESTORED_MS,
)
is_confirmed = sa.or_(
    _is_told,
    sa.func.coalesce(records.c.absent_at - records.c.absent_since, NEVER) >= CONFIRMED_MS,
)


def find_unready_ends(connection: sa.Connection, ends: Collection[Key]) -> dict[Key, Stop]:
    """Return the users and organizations whose memberships' and roles' rows aren't deleted yet:
    only one answer of Logto says that they are gone."""
    is_unconfirmed = sa.and_(records.c.deleted_at.is_not(None), ~is_confirmed)
    return {
        end: Stop("waiting", _END_STAYS.format(end.kind), name_departure(end))
        for end in _select_ends(connection, ends, is_unconfirmed)
    }


def find_unread(connection: sa.Connection, pairs: Collection[Key]) -> dict[Key, Stop]:
    """Return which of the memberships that are over may exist: only the deletion of a user or an
    organization ended them, but that was restored, and Logto hasn't been asked about them since.
    """
    is_back = records.c.waiting_reason.contains(RESTORED)
    back = _select_ends(connection, {end for pair in pairs for end in pair.ends}, is_back)
    concerned = [pair for pair in pairs if not back.isdisjoint(pair.ends)]
    if not concerned:  # the usual case
        return {}
    store = Store(connection)
    ends = store.read_heads({end for pair in concerned for end in pair.ends})
    stops = {}
    for pair, record in store.read_unlocked(concerned).items():
        if any(ends[end].deleted_at is not None for end in pair.ends):
            continue
        unread = [end for end in pair.ends if end in back and not record.is_told_since(ends[end])]
        if unread:
            reason = _END_IS_BACK.format(unread[0].kind)
            stops[pair] = Stop("waiting", reason, name_departure(unread[0]))
    return stops


def _select_ends(
    connection: sa.Connection, ends: Collection[Key], condition: sa.ColumnElement[bool]
) -> set[Key]:
    """Return those of the users and organizations that meet a condition."""
    found = set()
    for kind in OTHER_END:
        if ids := sorted(end.id for end in ends if end.kind == kind):
            query = sa.select(records.c.logto_id).where(
                records.c.kind == kind, among(records.c.logto_id, "ids"), condition
            )
            found |= {Key(kind, id_) for id_ in connection.scalars(query, {"ids": ids})}
    return found


def stop_for_end(end: Key, stop: Stop) -> Stop:
    """Return why the row of a membership or a role isn't deleted either."""
    return Stop(stop.state, _END_STAYS.format(end.kind), name_departure(end))


def name_departure(end: Key) -> str:
    """How a state names the user or the organization that has to be deleted first."""
    return f"deleted {end.kind}:{end.id}"


def find_read_away(
    connection: sa.Connection, pairs: Collection[str], kinds: Collection[Kind]
) -> set[str]:
    """Return those of the memberships that are over because Logto's API no longer lists them, or
    no longer has their users or organizations, of these `kinds`.

    A delivery can end thousands of memberships at once, but Logto's lists may be of another state.
    """
    ends_of = {
        id_: {end for end in Key("membership", id_).ends if end.kind in kinds} for id_ in pairs
    }
    ends = set().union(*ends_of.values())
    is_only_answered = sa.and_(records.c.deleted_at.is_not(None), ~_is_told)
    gone = _select_ends(connection, ends, is_only_answered) if ends else set()
    query = sa.select(records.c.logto_id, records.c.groups, records.c.gone_at).where(
        records.c.kind == "membership", among(records.c.logto_id, "ids")
    )
    away = {id_ for id_, its_ends in ends_of.items() if not gone.isdisjoint(its_ends)}
    for id_, groups, gone_at in connection.execute(query, {"ids": sorted(pairs)}):
        present = groups.get("present")
        if present is None or (gone_at is not None and present["stamp"] <= gone_at):
            continue
        if present["read_at"] != NEVER and present["stamp"] == present["read_at"] + 1:
            away.add(id_)
    return away
