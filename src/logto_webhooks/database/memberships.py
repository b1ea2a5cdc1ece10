"""End the memberships of deleted users and organizations, and announce those of new ones."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, Final, Literal

import sqlalchemy as sa

from logto_webhooks.database.dialect import Row, among, insert_into, now
from logto_webhooks.database.records import (
    LOCK_MEMBERSHIPS,
    OTHER_END,
    RecordStore,
    from_row,
    is_among_memberships,
)
from logto_webhooks.database.schema import Millis, member_roles, members, membership_steps, records
from logto_webhooks.records.local_events import is_here
from logto_webhooks.records.record import (
    NEVER,
    RESTORED_MS,
    Arrival,
    Ending,
    Key,
    Kind,
    Record,
    membership,
)

NEWEST: Final = 50_000  # memberships that a query looks through
Which = Literal["all", "known", "unannounced"]
_WHICH: Final[dict[Which, sa.ColumnElement[bool]]] = {
    "all": sa.true(),
    "known": records.c.announced | records.c.deleted_at.is_(None),
    "unannounced": sa.not_(records.c.announced) & records.c.deleted_at.is_(None),
}
_STEPS_KEY: Final = ["change", "kind", "logto_id"]
_IS_ENDING: Final = membership_steps.c.change == "ending"
_IS_ARRIVAL: Final = membership_steps.c.change == "arrival"
_MEMBER: Final = (members.c.logto_organization_id, members.c.logto_user_id)
# Each uses one index. With an OR in one statement, a planner may use none.
_COUNT_OF: Final[dict[Kind, sa.Select[Any]]] = {
    kind: sa.select(sa.func.count()).select_from(
        sa.select(sa.literal_column("1").label("one"))
        .where(among(records.c[f"{kind}_id"], "ids"))
        .limit(sa.bindparam("most", type_=sa.Integer) + 1)
        .subquery()
    )
    for kind in OTHER_END
}


# For each note, those of one user or organization are looked up. A join may read all members.
_COUNT_TO_END: Final = [
    sa.select(
        sa.func.sum(
            sa.select(sa.func.count())
            .where(members.c[f"logto_{kind}_id"] == membership_steps.c.logto_id)
            .scalar_subquery()
        )
    ).where(_IS_ENDING, membership_steps.c.kind == kind)
    for kind in OTHER_END
]
_FINISH_ARRIVAL: Final = sa.delete(membership_steps).where(
    _IS_ARRIVAL,
    *(membership_steps.c[name] == sa.bindparam(f"of_{name}") for name in ("kind", "logto_id")),
    membership_steps.c.noted_at == sa.bindparam("of_noted_at"),
)


class MembershipStore(RecordStore):
    """The part of a Store that ends the memberships of deleted users and organizations, and lists
    those to announce."""

    def drop_memberships(self, ends: Sequence[Record]) -> list[Key]:
        """End the memberships that aren't newer than the deletion of their user or organization.
        Return those that were announced and aren't here any more."""
        left: list[Key] = []
        deleted = [end for end in ends if end.key.kind != "membership" and end.ended_at != NEVER]
        with_any = self._find_ends_of_memberships([end.key for end in deleted])
        for end in deleted:
            if end.key in with_any:
                left += self._drop(end)
        return left

    def lock_memberships(self, ends: Sequence[Key], which: Which) -> dict[Key, Record]:
        """Lock memberships of users and organizations: all, those that exist or were announced
        ("known"), or those that exist and weren't."""
        pairs: set[Key] = set()
        for kind in OTHER_END:
            if ids := [end.id for end in ends if end.kind == kind]:
                query = sa.select(records.c.logto_id).where(
                    among(records.c[f"{kind}_id"], "ids"), _WHICH[which]
                )
                found = self._connection.scalars(query, {"ids": ids})
                pairs.update(Key("membership", id_) for id_ in found)
        return self.lock(sorted(pairs)) if pairs else {}

    def newest_membership(self, end: Key, after: str = "") -> tuple[int, str | None]:
        """Look through the next NEWEST memberships of a user or an organization after the id
        `after`. Return the greatest stamp of any evidence of them, NEVER if there is none, and the
        last id; None at the end."""
        page = (
            sa.select(records.c.told_at, records.c.logto_id)
            .where(records.c[f"{end.kind}_id"] == end.id, records.c.logto_id > after)
            .order_by(records.c.logto_id)
            .limit(NEWEST)
            .subquery()
        )
        query = sa.select(
            sa.func.max(page.c.told_at), sa.func.max(page.c.logto_id), sa.func.count()
        )
        newest, last, count = self._connection.execute(query.select_from(page)).one()
        return NEVER if newest is None else newest, last if count == NEWEST else None

    def end_memberships(self, end: Record, pairs: Sequence[Key]) -> tuple[list[Key], int]:
        """End those of `pairs` that aren't newer than the deletion of their user or organization.

        Return the keys of those that were announced and aren't here any more, and the greatest
        stamp of any evidence of them.
        """
        ids = {"ids": [pair.id for pair in pairs]}
        if self._connection.dialect.name != "postgresql":
            return self._drop(end, pairs), self._read_newest(is_among_memberships, ids)
        # Else the statement could change rows that differ from those in its snapshot.
        self._connection.execute(LOCK_MEMBERSHIPS, ids).close()
        values = ids | {"ended_at": end.ended_at, "end_is_here": is_here(end)}
        newest, left = self._connection.execute(_end_statement(), values).one()
        if newest is not None and newest > end.ended_at:
            self._save_newer(end, is_among_memberships, ids)
        self._changed.update(pairs)
        return [Key("membership", id_) for id_ in left], NEVER if newest is None else newest

    def with_few_memberships(self, ends: Sequence[Key], most: int) -> list[Key]:
        """List users and organizations that together have at most `most` memberships, including
        ended ones."""

        def count(kind: Kind, ids: list[str]) -> int:
            return self._connection.scalar(_COUNT_OF[kind], {"ids": ids, "most": most}) or 0

        by_kind = {kind: [end.id for end in ends if end.kind == kind] for kind in OTHER_END}
        if sum(count(kind, ids) for kind, ids in by_kind.items() if ids) <= most:  # the usual case
            return list(ends)
        few = []
        for end in ends:
            memberships = count(end.kind, [end.id])
            if memberships <= most:
                most -= memberships
                few.append(end)
        return few

    def note_ending(self, ending: Ending) -> None:
        """Note that the memberships of a user or an organization are to be ended step by step."""
        insert = insert_into(membership_steps, self._connection.dialect.name).values(
            change="ending",
            kind=ending.key.kind,
            logto_id=ending.key.id,
            ended_at=ending.ended_at,
            source=ending.source,
            delivery_id=ending.delivery_id,
            noted_at=now(),
        )
        new, old = insert.excluded, membership_steps.c
        newest = sa.case((old.ended_at > new.ended_at, old.ended_at), else_=new.ended_at)
        changed = {
            name: sa.func.coalesce(new[name], old[name]) for name in ("source", "delivery_id")
        }
        self._connection.execute(
            insert.on_conflict_do_update(
                index_elements=_STEPS_KEY, set_={"ended_at": newest, **changed}
            )
        )

    def note_arrival(self, end: Key, source: str | None, delivery_id: int | None) -> None:
        """Note that the memberships of a user or an organization are to be announced step by
        step."""
        insert = insert_into(membership_steps, self._connection.dialect.name).values(
            change="arrival",
            kind=end.kind,
            logto_id=end.id,
            source=source,
            delivery_id=delivery_id,
            noted_at=now(),
        )
        self._connection.execute(
            insert.on_conflict_do_update(index_elements=_STEPS_KEY, set_={"noted_at": now()})
        )

    def arrivals(self, limit: int, without: Collection[Key] = ()) -> list[Arrival]:
        """List the oldest noted arrivals, except some."""
        return [
            Arrival(
                key=Key(row["kind"], row["logto_id"]),
                noted_at=row["noted_at"],
                source=row["source"],
                delivery_id=row["delivery_id"],
            )
            for row in self._list_noted(_IS_ARRIVAL, limit, without)
        ]

    def arriving(self, ends: Collection[Key]) -> set[Key]:
        """Find those of some users and organizations that are noted as arrivals, and of whose
        members handlers will be told."""
        steps = membership_steps.c
        query = sa.select(steps.kind, steps.logto_id).where(
            _IS_ARRIVAL, among(steps.logto_id, "ids"), steps.source.is_not(None)
        )
        found = self._connection.execute(query, {"ids": [end.id for end in ends]})
        return {Key(*row) for row in found}.intersection(ends)

    def finish_arrivals(self, arrivals: Sequence[Arrival]) -> None:
        """Delete the notes, except of a user or an organization that came again meanwhile."""
        rows = [
            {
                "of_kind": arrival.key.kind,
                "of_logto_id": arrival.key.id,
                "of_noted_at": arrival.noted_at,
            }
            for arrival in arrivals
        ]
        self._connection.execute(_FINISH_ARRIVAL, rows)

    def unannounced(self, end: Key, after: str, limit: int) -> list[Key]:
        """List memberships of a user or an organization that exist and weren't announced, by ID."""
        query = (
            sa.select(records.c.logto_id)
            .where(records.c[f"{end.kind}_id"] == end.id, records.c.logto_id > after)
            .where(sa.not_(records.c.announced), records.c.deleted_at.is_(None))
            .order_by(records.c.logto_id)
            .limit(limit)
        )
        return [Key("membership", id_) for id_ in self._connection.scalars(query)]

    def endings(self, limit: int, without: Collection[Key] = ()) -> list[Ending]:
        """List the oldest noted endings, except some."""
        return [_to_ending(row) for row in self._list_noted(_IS_ENDING, limit, without)]

    def take_endings(self, ends: Collection[Key]) -> list[Ending]:
        """Delete the notes of locked users and organizations, and return them."""
        steps, taken = membership_steps.c, list[Ending]()
        for kind in OTHER_END:
            if ids := [end.id for end in ends if end.kind == kind]:
                mine = steps.kind == kind, among(steps.logto_id, "ids")
                delete = sa.delete(membership_steps).where(_IS_ENDING, *mine)
                rows = self._connection.execute(delete.returning(membership_steps), {"ids": ids})
                taken += map(_to_ending, rows.mappings())
        return taken

    def _list_noted(
        self, is_change: sa.ColumnElement[bool], limit: int, without: Collection[Key]
    ) -> Sequence[sa.RowMapping]:
        steps = membership_steps.c
        query = sa.select(membership_steps).where(is_change)
        query = query.order_by(steps.change, steps.noted_at, steps.kind, steps.logto_id)
        if without:  # a few, because they are tried again soon
            query = query.where(sa.not_(among(steps.logto_id, "ids")))
        values = {"ids": [key.id for key in without]} if without else {}
        return self._connection.execute(query.limit(limit), values).mappings().all()

    def memberships_to_end(self, ending: Ending, limit: int) -> list[Key]:
        """List memberships that have yet to be ended."""
        query = (
            sa.select(records.c.logto_id)
            .where(records.c[f"{ending.key.kind}_id"] == ending.key.id)
            .where(sa.func.coalesce(records.c.gone_at, NEVER) < ending.ended_at)
            .limit(limit)
        )
        return sorted(Key("membership", id_) for id_ in self._connection.scalars(query))

    def finish_ending(self, ending: Ending) -> None:
        """Delete the note, unless the user or organization was deleted again meanwhile."""
        self._connection.execute(
            sa.delete(membership_steps).where(
                _IS_ENDING,
                membership_steps.c.kind == ending.key.kind,
                membership_steps.c.logto_id == ending.key.id,
                membership_steps.c.ended_at == ending.ended_at,
            )
        )

    def count_memberships_to_end(self) -> int:
        """Count the member rows whose user or organization was deleted."""
        return sum(self._connection.scalar(count) or 0 for count in _COUNT_TO_END)

    def _find_ends_of_memberships(self, ends: Sequence[Key]) -> set[Key]:
        """Find those of a few users and organizations that have memberships, also ended ones."""
        found: set[Key] = set()
        for kind in OTHER_END:
            if ids := [end.id for end in ends if end.kind == kind]:
                column = records.c[f"{kind}_id"]
                query = sa.select(column).where(among(column, "ids")).distinct()
                found.update(
                    Key(kind, id_) for id_ in self._connection.scalars(query, {"ids": ids})
                )
        return found

    def _drop(self, end: Record, pairs: Sequence[Key] | None = None) -> list[Key]:
        """End those of its memberships, or of the `pairs`, that aren't newer than its deletion."""
        kind, other = end.key.kind, OTHER_END[end.key.kind]
        own_record = records.c[f"{kind}_id"] == end.key.id
        is_own = [table.c[f"logto_{kind}_id"] == end.key.id for table in (members, member_roles)]
        values: Row = {}
        if pairs is not None:
            own_record = is_among_memberships
            values = {
                "ids": [pair.id for pair in pairs],
                "others": [
                    key.id
                    for pair in pairs
                    for key in pair.organization_and_user
                    if key.kind == other
                ],
            }
            is_own = [
                condition & among(table.c[f"logto_{other}_id"], "others")
                for condition, table in zip(is_own, (members, member_roles), strict=True)
            ]
        announced = sa.select(records.c.logto_id).where(own_record, records.c.announced)
        before = self._connection.scalars(announced, values).all()
        changes = _make_ended_values(end.ended_at, sa.literal(is_here(end)))
        self._connection.execute(sa.update(records).where(own_record).values(changes), values)
        newer = sa.exists().where(
            records.c.kind == "membership",
            records.c.logto_id == _MEMBER[0] + ":" + _MEMBER[1],
            sa.not_(_is_over(end.ended_at)),
        )
        dropped = sa.delete(members).where(is_own[0], sa.not_(newer)).returning(*_MEMBER)
        rows = self._connection.execute(dropped, values)
        self._changed.update(membership(*pair) for pair in rows)
        stays = sa.exists().where(*(column == member_roles.c[column.name] for column in _MEMBER))
        self._connection.execute(sa.delete(member_roles).where(is_own[1], sa.not_(stays)), values)
        self._save_newer(end, own_record, values)
        after = set(self._connection.scalars(announced, values)) if before else set()
        return [Key("membership", id_) for id_ in before if id_ not in after]

    def _read_newest(self, condition: sa.ColumnElement[bool], values: Row) -> int:
        newest = sa.select(sa.func.max(records.c.told_at)).where(condition)
        return self._connection.scalar(newest, values) or NEVER

    def _save_newer(self, end: Record, own_record: sa.ColumnElement[bool], values: Row) -> None:
        """Save memberships with evidence from soon after the deletion: they are in doubt now."""
        soon_after = records.c.stamp.between(end.ended_at + 1, end.ended_at + RESTORED_MS)
        query = sa.select(records).where(own_record, soon_after)
        rows = self._connection.execute(query, values).mappings().all()
        self.save([from_row(row) for row in rows])


def _to_ending(row: sa.RowMapping) -> Ending:
    return Ending(
        key=Key(row["kind"], row["logto_id"]),
        ended_at=row["ended_at"],
        source=row["source"],
        delivery_id=row["delivery_id"],
    )


def _is_over(ended_at: int | sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Whether a membership isn't newer than the deletion of its user or organization."""
    return sa.func.coalesce(records.c.stamp, NEVER) <= ended_at


def _make_ended_values(
    ended_at: int | sa.ColumnElement[int], end_is_here: sa.ColumnElement[bool]
) -> dict[str, sa.ColumnElement[Any]]:
    """Return the columns of a membership that the deletion of its user or organization changes. A
    newer membership stays, but isn't here until its end is."""
    newest = sa.case((records.c.gone_at > ended_at, records.c.gone_at), else_=ended_at)
    is_over = _is_over(newest)
    return {
        "gone_at": newest,
        "deleted_at": sa.case((is_over, newest)),
        "doubtful": sa.and_(sa.not_(is_over), records.c.doubtful),
        "announced": sa.and_(sa.not_(is_over), end_is_here, records.c.announced),
        "refetch_since": sa.case((sa.not_(is_over), records.c.refetch_since)),
        "waiting_reason": sa.case((sa.not_(is_over), records.c.waiting_reason)),
    }


@functools.cache
def _end_statement() -> sa.Select[Any]:
    """Return a statement that ends locked memberships, and deletes their rows and roles."""
    ended_at = sa.bindparam("ended_at", type_=Millis)
    end_is_here = sa.bindparam("end_is_here", type_=sa.Boolean)
    # Reads the rows as they were before this statement.
    before = sa.select(records.c.logto_id).where(is_among_memberships, records.c.announced)
    announced = before.cte("announced")
    ended = (
        sa.update(records)
        .where(is_among_memberships)
        .values(_make_ended_values(ended_at, end_is_here))
        .returning(
            records.c.logto_id,
            records.c.organization_id,
            records.c.user_id,
            records.c.told_at,
            records.c.announced,
            _is_over(ended_at).label("is_over"),
        )
        .cte("over")
    )

    def delete_ended(table: sa.Table) -> sa.Delete:
        return sa.delete(table).where(
            ended.c.is_over,
            table.c.logto_organization_id == ended.c.organization_id,
            table.c.logto_user_id == ended.c.user_id,
        )

    left = (
        sa.select(sa.func.array_agg(ended.c.logto_id))
        .join(announced, announced.c.logto_id == ended.c.logto_id)
        .where(sa.not_(ended.c.announced))
    )
    return sa.select(
        sa.select(sa.func.max(ended.c.told_at)).scalar_subquery(),
        sa.func.coalesce(left.scalar_subquery(), sa.text("ARRAY[]::text[]")),
    ).add_cte(
        delete_ended(members).cte("membership_left"), delete_ended(member_roles).cte("roles_left")
    )
