"""Write the application's rows of users and organizations that follow from the mirror."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database.dialect import among
from logto_webhooks.database.mapped_rows import (
    BY_WHERE,
    CHANGING,
    FORGETTING,
    LINKING,
    NOT_CREATED,
    RowState,
    decode_ids,
    encode_id,
    lock_free_records,
)
from logto_webhooks.errors import RowRejected, StoreUnavailable
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping, OwnValues, UniqueColumn
from logto_webhooks.mapping.deletions import (
    TOO_MANY,
    UNREADABLE,
    Stop,
    find_unconfirmed,
)
from logto_webhooks.mapping.ends import Former
from logto_webhooks.mapping.former_rows import find_texts, has_texts, is_told_by
from logto_webhooks.mapping.json_keys import change_document, find_key, make_change
from logto_webhooks.mapping.links import COMPARING, LOCKED, UNCOMPARED, LinkFinder, Links, NoLink
from logto_webhooks.mapping.mirror import find_partial, find_present, has_unknown, read_rows
from logto_webhooks.mapping.primary_keys import describe_null, describe_several, make_conditions
from logto_webhooks.mapping.references import follows_updates
from logto_webhooks.mapping.row_limits import RowLimits
from logto_webhooks.mapping.table_writer import (
    NOT_KEPT,
    SKIPPED,
    WRITING_LONG,
    Action,
    PlannedRow,
    TableWriter,
    block,
    find_new_rows,
    refuse,
    translate_row_errors,
)
from logto_webhooks.mapping.unique_values import UniqueValues, make_null, make_placeholder
from logto_webhooks.records.record import Key

MOST_COMPARED: Final = 50  # records that aren't written, but may want the rows of those that are
MOST_SWAPPED: Final = 50  # rows whose unique values go round, which are written together
# Not names that an application gives its columns.
KEY: Final = "logto_webhooks_key"
_REFERRED: Final = "logto_webhooks_referred"
# What the reasons begin with why records are owed of which it is known which rows they want.
_COMPARED: Final = (WRITING_LONG, LOCKED)
# A link is for good, and no row is deleted because `where` becomes false.
_IN_PART: Final = (
    "Logto hasn't sent the whole {kind} yet, which `{option}` needs: usually, its webhook follows "
    "in a moment"
)
_KEPT: Final = "Logto hasn't sent the whole {kind} yet, so its row stays as it is"
TAKEN: Final = "another row has the value of {}"


class EntityWriter(TableWriter):
    """Writes the rows of one mapping of users or organizations."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: EntityMapping,
        schemas: Any,
        run: ApplyRun | None = None,
        applied_to: str | None = None,
        limits: RowLimits | None = None,
    ) -> None:
        """`applied_to` is that of the registered mapping."""
        super().__init__(connection, mapping, schemas, run, limits)
        self._is_over_all = run is not None
        self._rehearsal = run if run is not None and run.rehearses else None
        self._is_compared = applied_to in (None, LINKING)
        self._is_forgetting = applied_to == FORGETTING
        self.kind = mapping.kind
        self._mapping = mapping
        self._unique = UniqueValues(mapping, connection.dialect.name, self._run)
        self._repeated: set[str] = set()  # the keys that several rows have
        self.came: set[str] = set()  # records that have a row, or another one, since now

    def write(self, ids: Collection[str]) -> None:
        """Write the rows of records, and of those that waited for what they had.

        Raises StoreUnavailable if the database can't be used.
        """
        seen: set[str] = set()
        waiting = set(ids)
        while waiting:
            seen |= waiting
            freed = self._write(sorted(waiting))
            blocked = set(self._states.find_blocked(freed)) - seen if freed else set()
            waiting = self.lock_more(blocked)
            seen |= blocked

    def lock_more(self, ids: Collection[str]) -> set[str]:
        """Lock more records, so that nobody writes them meanwhile. Return those that could be
        locked; the others are owed."""
        if not ids:
            return set()
        kind = self._mapping.kind
        locked = {
            key.id for key in lock_free_records(self._connection, [Key(kind, i) for i in ids])
        }
        if busy := set(ids) - locked:
            stored = self._states.find(busy)
            owed = [block(state, "owed", CHANGING) for state in stored.values()]
            self._save(owed, stored)
        return locked

    def _write(self, ids: Sequence[str]) -> set[str]:
        """Write rows; return the primary keys of those that gave up a value."""
        stored = self._states.find(ids)
        plans = self._plan(ids, stored)
        self._planned = {plan.logto_id: plan for plan in plans}
        self._settle_unknown([state for i, state in stored.items() if i not in self._planned])
        to_write = [plan for plan in plans if plan.action != "nothing"]
        claimed = self._find_claimed(to_write)
        to_write = [plan for plan in to_write if plan.logto_id not in claimed]
        taken = self._unique.find_taken(to_write)
        written = self._write_in_time([plan for plan in to_write if plan.logto_id not in taken])
        written |= self._write_taken([plan for plan in to_write if plan.logto_id in taken], taken)
        refused = [p for p in to_write if written[p.logto_id].state == "conflict"]
        reduced = [_reduce(plan) for plan in refused if plan.at_least is not None]
        written |= self._write_in_time(reduced)
        states = {plan.logto_id: plan.state for plan in plans if plan.action == "nothing"} | written
        states |= claimed
        for id_, state in states.items():
            states[id_] = self._name_row(self._planned[id_], state, stored.get(id_))
        self._save(states.values(), stored)
        self.results += [(self._planned[i], state) for i, state in states.items()]
        done = [self._planned[i] for i, state in states.items() if state.state == "ok"]
        if back := [p.logto_id for p in done if _has_former(p, stored.get(p.logto_id))]:
            self._states.forget_deletions(back)
        self.came |= find_new_rows(states, stored, self._planned)
        if self._rehearsal is not None:
            self._claim(done, self._rehearsal)
        put_off = [i for i, s in states.items() if s.state == "owed" and self._guard.has_let(i)]
        self._guard.note([*(plan.logto_id for plan in done if plan.deletes), *put_off])
        return {encode_id(p.primary_key) for p in done if p.action in ("update", "delete")}

    def _settle_unknown(self, states: Sequence[RowState]) -> None:
        """Settle the states of records that the mirror doesn't have, such as those that only a
        membership has told of."""
        self._states.forget([state.logto_id for state in states if state.row_id is None])
        with_row = {state.logto_id: state for state in states if state.row_id is not None}
        settled = [RowState(logto_id=i, row_id=state.row_id) for i, state in with_row.items()]
        self._states.save(settled, with_row)

    def _plan(self, ids: Sequence[str], states: Mapping[str, RowState]) -> list[PlannedRow]:
        put_off = self._put_off(ids, states)
        later = {plan.logto_id for plan in put_off}
        ids = [id_ for id_ in ids if id_ not in later]
        rows = read_rows(self._connection, self._mapping.kind, ids)
        own_rows, locked = self._lock_own(ids)
        present = {i: row for i, row in rows.items() if row.deleted_at is None and i not in locked}
        values = self._call(self._mapping.evaluate, present)
        wanted = {i: own for i, own in values.items() if isinstance(own, OwnValues)}
        without = [i for i in present if i not in own_rows]
        new = [i for i in present if i in own_rows and not _is_written(states.get(i))]
        in_part = self._find_partial(without, new)
        # If a function fails, no row is linked, and nobody else is linked to that row.
        has_none = [i for i in without if values[i] is not None and i not in in_part]
        unlinked = {i: rows[i] for i in has_none}
        uncompared = {plan.logto_id for plan in put_off if not is_compared(plan.state)}
        linked = self._find_links(unlinked, uncompared)
        had_one = [i for i in has_none if i in wanted and i not in linked and i in states]
        linked |= self._find_former({i: wanted[i] for i in had_one}, rows, states)
        deleted = [i for i, row in rows.items() if row.deleted_at is not None]
        gone = [i for i in deleted if i in own_rows and i not in self._repeated]
        stopped = self._stop_deletions(gone, states)
        last = self._find_last_values({i: rows[i] for i in gone if i not in stopped})
        plans = put_off
        for logto_id, row in rows.items():
            state = states.get(logto_id) or RowState(logto_id=logto_id)
            if logto_id in self._repeated:
                plans.append(refuse(state, "conflict", self._describe_several()))
                continue
            if logto_id in locked:
                plans.append(refuse(state, "owed", SKIPPED))
                continue
            if stop := stopped.get(logto_id):
                plans.append(refuse(state, stop.state, stop.reason, stop.blocked_by))
                continue
            own = own_rows.get(logto_id)
            if own is not None and None in self._key_of(own):
                plans.append(refuse(state, "conflict", describe_null(self._primary_key)))
                continue
            if row.deleted_at is not None:
                plans.append(self._plan_deletion(state, own, last.get(logto_id, {})))
                continue
            if logto_id in in_part:
                plans.append(self._wait_for_whole(state, own))
                continue
            plans.append(self._plan_row(state, values[logto_id], own, linked.get(logto_id)))
        return plans

    def _find_partial(self, without: Collection[str], new: Collection[str]) -> set[str]:
        """Return of which records Logto hasn't sent all yet. Those `without` a row get none,
        because what is unknown can decide whether they get a row, and which one. Rows that are
        `new` to us, to which the application has given the ID, would be emptied."""
        ids = [*new, *without] if self._mapping.needs_whole is not None else new
        return find_partial(self._connection, self._mapping.kind, ids) if ids else set()

    def _wait_for_whole(self, state: RowState, own: sa.RowMapping | None) -> PlannedRow:
        kind, option = self._mapping.kind, self._mapping.needs_whole
        if own is None:
            return refuse(state, "waiting", _IN_PART.format(kind=kind, option=option))
        known = replace(state, row_id=encode_id(self._key_of(own)))
        return refuse(known, "waiting", _KEPT.format(kind=kind))

    def find_stopped(self, ids: Collection[str]) -> dict[str, Stop]:
        """Return which of the records were deleted, but have rows that are not to be deleted now,
        or perhaps have some: the table can't be read."""
        rows = read_rows(self._connection, self._mapping.kind, ids) if ids else {}
        gone = [id_ for id_, row in rows.items() if row.deleted_at is not None]
        if not gone or self._mapping.when_deleted not in ("delete", "unlink"):
            return {}
        try:
            with (
                translate_row_errors(self._connection),
                self._connection.begin_nested(),
                self._limits.applied(),
            ):
                there = self._find_own(gone)
        except Exception as error:  # `write` will tell of it
            if self._limits.is_transaction_lost(error):
                raise
            return dict.fromkeys(gone, Stop("waiting", UNREADABLE))
        return self._stop_deletions(there, self._states.find(there))

    def find_held(self, ids: Collection[str]) -> dict[str, Stop]:
        """Return which of the records have rows whose deletion is held."""
        states = self._states.find(ids) if ids else {}
        held = [id_ for id_, state in states.items() if state.is_held]
        return dict.fromkeys(held, Stop("held", TOO_MANY))

    def _stop_deletions(
        self, gone: Collection[str], stored: Mapping[str, RowState]
    ) -> dict[str, Stop]:
        if not gone or self._mapping.when_deleted not in ("delete", "unlink"):
            return {}
        unconfirmed = find_unconfirmed(self._connection, self._mapping.kind, gone)
        return self._guard.decide(sorted(gone), stored, unconfirmed)

    def _plan_nothing(
        self, state: RowState, own: sa.RowMapping | None, excluded: str | None = None
    ) -> PlannedRow:
        """Nothing is to be written, so nothing is waited for. If the record is excluded, say by
        what."""
        row_id = state.row_id if own is None else encode_id(self._key_of(own))
        settled = RowState(logto_id=state.logto_id, row_id=row_id)
        if excluded is not None:
            settled = replace(settled, state="excluded", reason=excluded)
        return PlannedRow(logto_id=state.logto_id, action="nothing", state=settled)

    def _plan_row(
        self,
        state: RowState,
        evaluated: OwnValues | Exception | None,
        own: sa.RowMapping | None,
        link: sa.RowMapping | NoLink | Exception | None,
    ) -> PlannedRow:
        mapping, logto_id = self._mapping, state.logto_id
        if evaluated is None:
            return self._plan_nothing(state, own, BY_WHERE)
        if isinstance(evaluated, Exception):
            return self._refuse_unevaluated(state, evaluated, self._name_wanted(link))
        if isinstance(link, Exception):
            return self._refuse_unevaluated(state, link)
        values, fill = evaluated.columns, evaluated.fill
        if isinstance(link, NoLink):
            return refuse(state, link.state, link.reason, link.blocked_by)
        if own is None and link is not None:
            own = link
            values |= self._key_values(logto_id, own)
        if own is not None:
            fill = {name: value for name, value in fill.items() if own[name] is None}
            differing = self._find_differing(values | fill, own)
            key = self._key_of(own)
            now_ok = RowState(logto_id=logto_id, row_id=self._id_after(own, differing))
            action: Action = "update" if differing else "nothing"
            return PlannedRow(
                logto_id=logto_id,
                action=action,
                links=link is not None,
                primary_key=key,
                values=differing,
                state=now_ok,
            )
        if not mapping.create:
            return self._plan_nothing(state, own, NOT_CREATED)
        values = {**mapping.create_defaults, **fill, **values, **self._key_values(logto_id, None)}
        missing = [
            name
            for name, value in values.items()
            if value is None and not self.table.c[name].nullable
        ]
        if missing:
            problem = f"{missing[0]} is NOT NULL, but Logto has no value"
            return refuse(state, "waiting", problem)
        ok = RowState(logto_id=logto_id)
        return PlannedRow(logto_id=logto_id, action="insert", values=values, state=ok)

    def _name_wanted(self, link: sa.RowMapping | NoLink | Exception | None) -> str | None:
        """Return the primary key of the row that a record wants to be linked to."""
        if isinstance(link, sa.RowMapping):
            return encode_id(self._key_of(link))
        return link.blocked_by if isinstance(link, NoLink) else None

    def _find_last_values(self, deleted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the values that deleted records had last. If a record changed shortly before, or
        that is known only now, the row would keep former values, such as an email that others can
        have. A command doesn't write them: by then, the application may have emptied the row."""
        if self._is_over_all or self._mapping.when_deleted == "delete":
            return {}
        evaluated = self._call(self._mapping.evaluate, deleted)
        return {i: own.columns for i, own in evaluated.items() if isinstance(own, OwnValues)}

    def _plan_deletion(
        self, state: RowState, own: sa.RowMapping | None, last: Mapping[str, Any]
    ) -> PlannedRow:
        if own is None:
            return self._plan_nothing(state, None)
        logto_id, action, key = state.logto_id, self._mapping.when_deleted, self._key_of(own)
        if action == "delete":  # its primary key may be used again
            gone = RowState(logto_id=logto_id)
            return PlannedRow(
                logto_id=logto_id, action="delete", deletes=True, primary_key=key, state=gone
            )
        values: dict[str, Any] = {}
        if action == "unlink":
            values = self._key_values(None, own)
        elif action != "keep":
            values = dict(action)
        differing = self._find_differing({**last, **values}, own)
        if not differing:
            return self._plan_nothing(state, own)
        return PlannedRow(
            logto_id=logto_id,
            action="update",
            deletes=action == "unlink",
            primary_key=key,
            values=differing,
            at_least={name: value for name, value in differing.items() if name in values},
            state=RowState(logto_id=logto_id, row_id=self._id_after(own, differing)),
        )

    def _lock_own(self, ids: Sequence[str]) -> tuple[dict[str, sa.RowMapping], set[str]]:
        """Lock the rows that have the keys of records. Return them by key, and the keys of those
        that somebody else has locked."""
        if self._connection.dialect.name == "sqlite":  # has one writer
            return self._find_own(ids), set()
        self._find_own(ids)  # of several rows with a key, some may be locked
        query = self._own.with_for_update(skip_locked=True, key_share=True)
        rows = self._by_key(self._run(query, {"ids": list(ids)}).mappings())
        missing = [id_ for id_ in ids if id_ not in rows]
        return rows, set(self._find_own(missing)) if missing else set()

    def _find_own(self, ids: Sequence[str]) -> dict[str, sa.RowMapping]:
        return self._by_key(self._run(self._own, {"ids": list(ids)}).mappings())

    def _by_key(self, rows: Iterable[sa.RowMapping]) -> dict[str, sa.RowMapping]:
        by_key: dict[str, sa.RowMapping] = {}
        for row in rows:
            if row[KEY] in by_key:
                self._repeated.add(row[KEY])
            by_key[row[KEY]] = row
        return by_key

    @property
    def _own(self) -> sa.Select[Any]:
        """Select the rows that have the keys `ids`."""
        text = self._mapping.key.text
        is_text = isinstance(text.type, sa.String)  # not a type of the application's own
        is_one = among(text, "ids") if is_text else text.in_(sa.bindparam("ids", expanding=True))
        return sa.select(*self._read_columns(), text.label(KEY)).where(is_one)

    def _find_links(self, rows: dict[str, Any], uncompared: Collection[str]) -> Links:
        """Find the rows to be linked to records. `uncompared` ones, and those that are owed a row,
        aren't written now, but may want the same rows: so they are compared, if they are few."""
        link = self._mapping.link
        if link is None or not rows:
            return {}
        run = self._rehearsal
        others = set(uncompared)
        if run is None:
            known = {*rows, *others}
            others.update(self._states.list_first_owed(known, _COMPARED, MOST_COMPARED + 1))
        are_few = len(others) <= MOST_COMPARED
        own = read_rows(self._connection, self.kind, others) if others and are_few else {}
        compared = {i: row for i, row in own.items() if row.deleted_at is None}
        finder = LinkFinder(
            self._connection,
            self._mapping,
            link,
            self._read_columns(),
            self._run,
            self._call,
            None if run is None else run.find_rows(self.name),
            partial(self._find_obstacle, {*rows, *others}, are_compared=are_few),
        )
        links = finder.find({**compared, **rows})
        return {id_: link for id_, link in links.items() if id_ in rows}

    def _find_former(
        self,
        values: Mapping[str, OwnValues],
        rows: Mapping[str, Any],
        states: Mapping[str, RowState],
    ) -> Links:
        """Find the rows that records had before they were unlinked, and lock them. The application
        may have given such a row to somebody else, or emptied it, and a database can use its
        primary key again: so it must have no key, no other record, and the same texts."""
        before = {i: row_id for i in values if (row_id := states[i].row_id) is not None}
        if self._mapping.when_deleted != "unlink" or not before:
            return {}
        # The application may have emptied a key itself, because the link was wrong.
        unlinked = self._states.find_deleted(before)
        before = {id_: row_id for id_, row_id in before.items() if id_ in unlinked}
        owners = self._states.find_owners(before.values())
        ids = {row_id: id_ for id_, row_id in before.items() if owners.get(row_id) == {id_}}
        decoded = decode_ids(ids, self._primary_key, self._connection.dialect)
        keys = {key: ids[row_id] for row_id, key in decoded.items()}
        query = sa.select(*self._read_columns()).where(self._mapping.key.text.is_(None))
        found = self._find_by_keys(query, keys)
        same = {
            key: i
            for key, i in keys.items()
            if i in found and self._is_still_its_row(values[i], found[i], rows[i])
        }
        locking = query.with_for_update(skip_locked=True, key_share=True)
        locked = self._find_by_keys(locking, same)
        return {
            id_: row
            if (row := locked.get(id_)) is not None
            and self._is_still_its_row(values[id_], row, rows[id_])
            else NoLink(SKIPPED, "owed", before[id_])
            for id_ in same.values()
        }

    def _find_by_keys(
        self, query: sa.Select[Any], keys: Mapping[tuple[Any, ...], str]
    ) -> dict[str, sa.RowMapping]:
        """Return the rows with these primary keys, by the record of each."""
        records = {encode_id(key): id_ for key, id_ in keys.items()}
        return {
            records[row_id]: row
            for are_some in make_conditions(self._primary_key, keys)
            for row in self._run(query.where(are_some)).mappings()
            if (row_id := encode_id(self._key_of(row))) in records
        }

    def _is_still_its_row(self, values: OwnValues, own: sa.RowMapping, record: Any) -> bool:
        texts = find_texts(self._mapping, values)
        return has_texts(own, texts) and is_told_by(texts, self._mapping.kind, record)

    def _find_obstacle(self, ids: Collection[str], *, are_compared: bool) -> str | None:
        """Return why no row is linked yet: others may want it, but haven't been compared."""
        if not self._is_compared and (
            self._is_over_all  # which links in a second pass
            or self._is_forgetting  # what was compared before doesn't count
            or has_unknown(self._connection, self.name, self._mapping.kind, ids)
        ):
            return COMPARING
        if self._rehearsal is not None:
            return None
        return None if are_compared else UNCOMPARED

    def _settle_refusal(self, plan: PlannedRow, error: Exception) -> dict[str, RowState]:
        """Try once more together with the rows that have the values it wants."""
        if not isinstance(error, RowRejected):
            return super()._settle_refusal(plan, error)
        holder = self._unique.find_holder(plan)
        ring = self._find_ring(plan) if holder is not None else []
        if len(ring) > 1 and not self._refuse_referred(ring):
            try:
                self._swap(ring)
            except (RowRejected, StoreUnavailable):
                if not self._limits.can_go_on:
                    raise
            else:
                self._planned |= {swapped.logto_id: swapped for swapped in ring}
                return {swapped.logto_id: swapped.state for swapped in ring}
        problem = self._explain(error, plan)
        row_id = None if holder is None else holder.row_id
        return {plan.logto_id: block(plan.state, "conflict", problem, row_id)}

    def _find_claimed(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        """Refuse rows whose unique value another row would have, if this weren't a rehearsal."""
        if self._rehearsal is None:
            return {}
        return {
            plan.logto_id: block(plan.state, "conflict", TAKEN.format(column.name))
            for column in self._unique.surely_unique
            for plan in plans
            if column.key in plan.values
            and self._rehearsal.is_claimed(
                f"{self.name}.{column.key}", plan.values[column.key], plan.logto_id
            )
        }

    def _claim(self, plans: Sequence[PlannedRow], run: ApplyRun) -> None:
        for column in self._unique.surely_unique:
            for plan in plans:
                if column.key in plan.values:
                    name = f"{self.name}.{column.key}"
                    run.claim(name, plan.values[column.key], plan.logto_id)

    def _write_taken(
        self, plans: Sequence[PlannedRow], taken: Mapping[str, tuple[str, UniqueColumn]]
    ) -> dict[str, RowState]:
        """Write rows whose unique value another row had, one by one, because that may give it up. A
        row that isn't a record's won't, so that is a conflict at once if the value is surely
        unique."""
        holders = {taken[plan.logto_id][0] for plan in plans}
        owners = self._states.find_owners(holders) if holders else {}
        states: dict[str, RowState] = {}
        for plan in plans:
            holder, unique = taken[plan.logto_id]
            if owners.get(holder) or not unique.is_sure:
                states |= self._write_in_time([plan])
            else:
                problem = TAKEN.format(unique.column.name)
                states[plan.logto_id] = block(plan.state, "conflict", problem, holder)
        return states

    def _find_ring(self, plan: PlannedRow) -> list[PlannedRow]:
        """Follow who has what the other wants: several that swap unique values are only right
        together."""
        ring = [plan]
        while len(ring) < MOST_SWAPPED:
            holder = self._unique.find_holder(ring[-1])
            if holder is None or holder.row_id in map(_id_of, ring):
                return ring
            owners = set() if holder.logto_id is None else {holder.logto_id}
            locked = sorted(self.lock_more(owners))
            plans = self._plan(locked, self._states.find(locked))
            plans = [changing for changing in plans if changing.action != "nothing"]
            if len(plans) != 1:
                return [plan]
            ring += plans
        return [plan]

    def _swap(self, ring: Sequence[PlannedRow]) -> None:
        """Write rows that swap unique values. Raises RowRejected, StoreUnavailable."""
        try:
            self._write_ring(ring, make_placeholder)
        except RowRejected:
            # Other rows would lose what they refer to.
            is_followed = follows_updates(self._connection, self.table)
            if is_followed or not self._limits.can_go_on:
                raise
            self._write_ring(ring, make_null)

    def _write_ring(
        self, ring: Sequence[PlannedRow], make_value: Callable[[sa.Column[Any], str], Any]
    ) -> None:
        """Free the unique values first, then set them."""
        with self._savepoint(ring):
            for plan in ring:
                freed = self._unique.replace_values(plan, make_value)
                if freed:
                    self._update([replace(plan, values=freed)])
            self._execute(ring)

    def _note_inserted(self, plans: Sequence[PlannedRow]) -> None:
        rows = self._find_own([plan.logto_id for plan in plans])
        if len(rows) < len(plans):
            raise RowRejected(problem=NOT_KEPT)
        if not self._repeated.isdisjoint(rows):
            raise RowRejected(problem=self._describe_several())
        self._note_keys({id_: self._key_of(row) for id_, row in rows.items()})

    def _name_row(self, plan: PlannedRow, state: RowState, stored: RowState | None) -> RowState:
        """Return the state of a row with the primary key that the row has now."""
        if state.state == "ok" and plan.action == "insert":
            return replace(state, row_id=self._inserted[plan.logto_id])
        if state.state == "ok" or plan.action == "nothing":
            return state
        # It is as it was, so one that was to be linked is free.
        if plan.primary_key and not plan.links:
            return replace(state, row_id=encode_id(plan.primary_key))
        return replace(state, row_id=None if stored is None else stored.row_id)

    def _read_columns(self) -> list[sa.Column[Any]]:
        mapping = self._mapping
        names = {*mapping.columns, *mapping.fill, mapping.key.column.key}
        if isinstance(mapping.when_deleted, dict):
            names |= mapping.when_deleted.keys()
        names |= {column.key for column in self._primary_key}
        return [column for column in self.table.c if column.key in names]

    def _describe_several(self) -> str:
        return describe_several(f"ID in {self._mapping.key.column.name}")

    def _key_values(self, logto_id: str | None, own: sa.RowMapping | None) -> dict[str, Any]:
        """The value of the key's column; of a JSON document, only the key's path changes."""
        key = self._mapping.key
        if not key.path:
            return {key.column.key: logto_id}
        default = self._mapping.create_defaults.get(key.column.key)
        document = default if own is None else own[key.column]
        return {key.column.key: change_document(document, key.path, logto_id)}

    def _make_expressions(self, names: Collection[str]) -> dict[str, sa.ColumnElement[Any]]:
        key = self._mapping.key
        if not key.path or key.column.key not in names:
            return {}
        change = make_change(key.column, key.path, KEY, self._connection.dialect)
        return {key.column.key: change}

    def _make_parameter(self, name: str, value: Any) -> tuple[str, Any]:
        key = self._mapping.key
        if key.path and name == key.column.key:
            return KEY, find_key(value, key.path)
        return super()._make_parameter(name, value)

    def find_extra(
        self, after: tuple[Any, ...], limit: int
    ) -> tuple[list[str], tuple[Any, ...] | None]:
        """Find rows, after a primary key, whose records the mirror doesn't have; return the last
        primary key, too."""
        rows = self._list_after(after, limit, self._mapping.key.text)
        ids = {row[-1] for row in rows if row[-1] is not None}
        extra = sorted(ids - find_present(self._connection, self.kind, ids))
        return extra, tuple(rows[-1][:-1]) if rows else None

    def find_logto_ids(self, keys: Sequence[Any], column: sa.Column[Any]) -> dict[Any, str]:
        """Return the ids of the records of rows by what a column has in them."""
        query = sa.select(column.label(_REFERRED), self._mapping.key.text.label(KEY))
        return {
            row[_REFERRED]: row[KEY]
            for are_some in make_conditions([column], [(key,) for key in keys])
            for row in self._run(query.where(are_some)).mappings()
            if row[KEY] is not None
        }

    def find_keys(self, ids: Sequence[str], column: sa.Column[Any]) -> dict[str, Any]:
        """Return what a column has in records' rows. A record with several rows has nothing."""
        query = self._own.add_columns(column.label(_REFERRED))
        own_rows = self._by_key(self._run(query, {"ids": list(ids)}).mappings())
        return {
            id_: row[_REFERRED]
            for id_, row in own_rows.items()
            if id_ not in self._repeated and row[_REFERRED] is not None
        }

    def find_former(self, ends: Collection[Former], column: sa.Column[Any]) -> set[Former]:
        """Return which values of the column still mean these records: no row has them, or one that
        was unlinked."""
        there = self._find_values_there(column, ends)
        gone = {end for end in ends if end[0] not in there}
        if self._mapping.when_deleted != "unlink":
            return gone
        unlinked = self._states.find_deleted({id_ for _, id_ in ends})
        return gone | {end for end in ends if end[1] in unlinked}

    def find_excluded(self, ids: Sequence[str]) -> set[str]:
        """Return those of the records without a row that get none: `where` excludes them, or no
        rows are created. One for which `where` fails isn't excluded by it."""
        rows = read_rows(self._connection, self.kind, ids)
        if not self._mapping.create:
            return set(rows)
        is_wanted = self._call(self._mapping.where, rows)
        return {id_ for id_ in rows if not is_wanted[id_]}

    def find_unsettled(self, ids: Collection[str]) -> list[str]:
        """List those of the records whose rows wait, conflict or are owed."""
        return [id_ for id_, state in self._states.find(ids).items() if not state.is_settled]


def _is_written(state: RowState | None) -> bool:
    return state is not None and state.row_id is not None and state.state != "waiting"


def _has_former(plan: PlannedRow, stored: RowState | None) -> bool:
    """Whether a record gets the row back from which it was unlinked."""
    return plan.links and stored is not None and stored.row_id == _id_of(plan)


def is_compared(state: RowState) -> bool:
    """Whether it is known which existing row an owed record wants, if any."""
    return state.row_id is not None or (state.reason or "").startswith(_COMPARED)


def _id_of(plan: PlannedRow) -> str:
    return encode_id(plan.primary_key)


def _reduce(plan: PlannedRow) -> PlannedRow:
    """Leave out the values that needn't be written."""
    return replace(plan, values=plan.at_least or {}, at_least=None)
