"""Records and mirror rows: lock, save, find."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.database import bulk, codec, deliveries
from logto_webhooks.database.codec import local_ids
from logto_webhooks.database.dialect import INSERT, among, now
from logto_webhooks.database.schema import (
    Millis,
    endings,
    member_roles,
    members,
    organizations,
    records,
    user_identities,
    user_roles,
    users,
)
from logto_webhooks.records.projection import Part, child_rows, project
from logto_webhooks.records.record import (
    MEMBERS,
    NEVER,
    RESTORED_MS,
    Ending,
    Key,
    Kind,
    Record,
    membership,
)

Row = dict[str, Any]
_MIRRORED: tuple[tuple[sa.Table, Kind, sa.Column[str]], ...] = (
    (users, "user", users.c.logto_user_id),
    (organizations, "organization", organizations.c.logto_organization_id),
)
_TABLES: dict[Part, sa.Table] = {
    "identities": user_identities,
    "roles": user_roles,
    "member_roles": member_roles,
}
_HAVE = {
    part: sa.select(table).where(among(table.c.logto_user_id, "users"))
    for part, table in _TABLES.items()
}


class RefetchNeed(Struct, frozen=True, kw_only=True):
    """A record that needs a refetch, and why."""

    key: Key
    reason: str
    doubtful: bool


class FoundRow(Struct, frozen=True, kw_only=True):
    """A user's or an organization's row, why it needs a refetch, and its memberships.

    Memberships in doubt are listed separately, whether they exist or not. `roles` are the names of
    a user's roles.
    """

    row: dict[str, Any]
    waiting_for: str | None
    memberships: list[str]
    memberships_in_doubt: list[str]
    roles: list[str] = []


def save_children(connection: sa.Connection, changed: Sequence[Record]) -> None:
    """Make the rows of changed records those that follow from them."""
    wanted: dict[Part, dict[Key, list[Row]]] = {}
    for record in changed:
        for part, rows in child_rows(record).items():
            wanted.setdefault(part, {})[record.key] = rows
    for part, by_record in wanted.items():
        _replace(connection, part, by_record)


def drop_children(connection: sa.Connection, end: Key, others: Sequence[str] | None = None) -> None:
    """Take the rows of a user's or an organization's memberships out, or of those with `others`,
    but of those that stay."""
    user, organization = member_roles.c.logto_user_id, member_roles.c.logto_organization_id
    mine, theirs = (user, organization) if end.kind == "user" else (organization, user)
    stays = sa.exists().where(
        members.c.logto_organization_id == organization, members.c.logto_user_id == user
    )
    delete = sa.delete(member_roles).where(mine == end.id, sa.not_(stays))
    if others is None:
        connection.execute(delete)
    else:
        connection.execute(delete.where(among(theirs, "others")), {"others": list(others)})


def holders(
    connection: sa.Connection, limit: int, after: str, unread_since: int | None
) -> list[Key]:
    """List users who have a role, by id, from `after` on; those with one not read since."""
    user = user_roles.c.logto_user_id
    query = sa.select(user).where(user > after).distinct()
    if unread_since is not None:
        query = query.where(user_roles.c.read_at < unread_since)
    return [Key("user", each) for each in connection.scalars(query.order_by(user).limit(limit))]


def role_names(connection: sa.Connection, user_id: str) -> list[str]:
    """The names of a user's roles."""
    name = user_roles.c.name
    query = sa.select(name).where(user_roles.c.logto_user_id == user_id).order_by(name)
    return list(connection.scalars(query))


def _replace(connection: sa.Connection, part: Part, by_record: dict[Key, list[Row]]) -> None:
    table = _TABLES[part]
    users = sorted({_user(key) for key in by_record})
    rows = connection.execute(_HAVE[part], {"users": users}).mappings()
    have = {_key(table, row): dict(row) for row in rows if _owner(row) in by_record}
    want = {_key(table, row): row for rows in by_record.values() for row in rows}
    old = [key for key, row in have.items() if want.get(key) != row]
    new = [row for key, row in want.items() if have.get(key) != row]
    if old:
        names = [column.name for column in table.primary_key]
        mine = [table.c[name] == sa.bindparam(f"of_{name}") for name in names]
        given = [{f"of_{name}": each for name, each in zip(names, key, strict=True)} for key in old]
        connection.execute(sa.delete(table).where(*mine), given)
    if new:
        connection.execute(sa.insert(table), new)


def _user(key: Key) -> str:
    return key.organization_and_user[1].id if key.kind == "membership" else key.id


def _owner(row: Any) -> Key:
    organization = row.get("logto_organization_id")
    user = row["logto_user_id"]
    return Key("membership", f"{organization}:{user}") if organization else Key("user", user)


def _key(table: sa.Table, row: Any) -> tuple[Any, ...]:
    return tuple(row[column.name] for column in table.primary_key)


_OTHERS: dict[Kind, sa.Column[Any]] = {
    "user": members.c.logto_organization_id,
    "organization": members.c.logto_user_id,
}
_EndedAt = int | sa.ColumnElement[int]
_ByKind = dict[Kind, dict[str, Any]]
_SIDES: dict[Kind, tuple[sa.Column[Any], sa.Column[Any]]] = {
    "user": (records.c.user_id, members.c.logto_user_id),
    "organization": (records.c.organization_id, members.c.logto_organization_id),
}


def lock_records(
    connection: sa.Connection, keys: Sequence[Key], share: bool, ends: Sequence[Key]
) -> dict[Key, Record]:
    """Hold records until the transaction ends; of unknown ones there are empty stubs.

    All memberships of `ends` are held, too: in one pass with the others, or two transactions that
    end memberships of one another's could wait for each other.
    """
    by_kind = {
        kind: {"of_kind": kind, "ids": [key.id for key in group]}
        for kind, group in itertools.groupby(keys, key=lambda key: key.kind)
    }
    if connection.dialect.name == "postgresql":  # only what is there can be locked
        _keep(connection, _unknown(connection, keys, by_kind))
    if ends and connection.dialect.name == "postgresql":
        _hold(connection, keys, ends)
    if share and not _have_ended(connection, by_kind):
        shared = _locked(connection, deliveries.SHARE, keys, by_kind)
        if all(record.ended_at == NEVER for record in shared.values()):
            return shared
    # What a membership tells of an end that was deleted before is written to that end's record.
    return _locked(connection, deliveries.LOCK, keys, by_kind)


def _locked(
    connection: sa.Connection, statement: Any, keys: Sequence[Key], by_kind: _ByKind
) -> dict[Key, Record]:
    found = {
        record.key: record
        for wanted in by_kind.values()
        for record in map(codec.from_record_row, connection.execute(statement, wanted).mappings())
    }
    return {key: found.get(key) or Record(key) for key in keys}


def _have_ended(connection: sa.Connection, by_kind: _ByKind) -> bool:
    """Whether any was deleted once: then it is locked for writing at once, since two that share
    it, and then write, would wait for each other."""
    if connection.dialect.name != "postgresql":  # where one transaction writes at a time
        return False
    return any(connection.execute(deliveries.ENDED, wanted).first() for wanted in by_kind.values())


def save_records(connection: sa.Connection, changed: Sequence[Record]) -> list[Record]:
    """Write locked records, and the rows of the mirror that follow from them; return them as they
    are kept, with their local ids."""
    ids = local_ids(sum(not each.kept for each in changed))
    kept = [each if each.kept else replace(each, local_id=next(ids)) for each in changed]
    bulk.upsert(connection, records, [codec.to_record_row(each) for each in kept])
    for kind in bulk.MIRROR:
        _project(connection, kind, [each for each in kept if each.key.kind == kind])
    save_children(connection, kept)
    return kept


def with_few_memberships(connection: sa.Connection, ends: Sequence[Key], most: int) -> list[Key]:
    """List those users and organizations that have no more than `most` memberships in all."""
    found = {kind: [end.id for end in ends if end.kind == kind] for kind in _SIDES}
    total = 0
    for kind, ids in found.items():
        if ids:
            total += connection.scalar(deliveries.COUNT_OF[kind], {"ids": ids, "most": most}) or 0
    if total <= most:  # most often
        return list(ends)
    few = []
    for end in ends:
        one = {"ids": [end.id], "most": most}
        count = connection.scalar(deliveries.COUNT_OF[end.kind], one) or 0
        if count <= most:
            most -= count
            few.append(end)
    return few


def note_ending(connection: sa.Connection, ending: Ending) -> None:
    """Keep what is to be done."""
    insert = INSERT[connection.dialect.name](endings).values(
        kind=ending.key.kind,
        logto_id=ending.key.id,
        ended_at=ending.ended_at,
        source=ending.source,
        delivery_id=ending.delivery_id,
        noted_at=now(),
    )
    new = insert.excluded
    newest = sa.case((endings.c.ended_at > new.ended_at, endings.c.ended_at), else_=new.ended_at)
    origin = {
        name: sa.func.coalesce(new[name], endings.c[name]) for name in ("source", "delivery_id")
    }
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["kind", "logto_id"], set_={"ended_at": newest, **origin}
        )
    )


def list_endings(connection: sa.Connection) -> list[Ending]:
    """All that is to be done, the oldest first."""
    query = sa.select(endings).order_by(endings.c.noted_at, endings.c.kind, endings.c.logto_id)
    return [
        Ending(
            key=Key(row["kind"], row["logto_id"]),
            ended_at=row["ended_at"],
            source=row["source"],
            delivery_id=row["delivery_id"],
        )
        for row in connection.execute(query).mappings()
    ]


def finish_ending(connection: sa.Connection, ending: Ending) -> None:
    """All of it is done, unless it was deleted once more meanwhile."""
    connection.execute(
        sa.delete(endings).where(
            endings.c.kind == ending.key.kind,
            endings.c.logto_id == ending.key.id,
            endings.c.ended_at == ending.ended_at,
        )
    )


def memberships_left(connection: sa.Connection) -> int:
    """Count the rows of members whose user or organization was deleted."""
    left = 0
    for ending in list_endings(connection):
        column = members.c[f"logto_{ending.key.kind}_id"]
        count = sa.select(sa.func.count()).select_from(members).where(column == ending.key.id)
        left += connection.scalar(count) or 0
    return left


def to_end(connection: sa.Connection, ending: Ending, limit: int) -> list[Key]:
    """List memberships of a deleted user or organization that aren't ended yet."""
    query = (
        sa.select(records.c.logto_id)
        .where(_SIDES[ending.key.kind][0] == ending.key.id)
        .where(sa.func.coalesce(records.c.gone_at, NEVER) < ending.ended_at)
        .limit(limit)
    )
    return sorted(Key("membership", each) for each in connection.scalars(query))


def drop_memberships(
    connection: sa.Connection, ends: Sequence[Record], pairs: Sequence[Key] | None = None
) -> list[Key]:
    """End the memberships that are no newer than the end of their user or organization, or of
    them only the `pairs`; return those that were present."""
    present: list[Key] = []
    for end in ends:
        known, row = _SIDES.get(end.key.kind, (None, None))
        if known is None or row is None or end.ended_at == NEVER:
            continue
        mine, theirs = known == end.key.id, row == end.key.id
        given: dict[str, Any] = {}
        others: list[str] | None = None
        if pairs is not None:
            others = [_other_end(end.key, pair).id for pair in pairs]
            given = {"ids": [pair.id for pair in pairs], "others": others}
            mine = (records.c.kind == "membership") & among(records.c.logto_id, "ids")
            theirs = sa.and_(theirs, among(_OTHERS[end.key.kind], "others"))
        connection.execute(sa.update(records).where(mine).values(_over(end.ended_at)), given)
        both = (members.c.logto_organization_id, members.c.logto_user_id)
        newer = sa.exists().where(
            records.c.kind == "membership",
            records.c.logto_id == both[0] + ":" + both[1],
            sa.not_(_is_over(end.ended_at)),
        )
        left = sa.delete(members).where(theirs, sa.not_(newer)).returning(*both)
        present += [membership(*pair) for pair in connection.execute(left, given)]
        drop_children(connection, end.key, others)
        _save_newer(connection, end, mine, given)
    return present


def end_memberships(
    connection: sa.Connection, end: Record, pairs: Sequence[Key]
) -> tuple[list[Key], int]:
    """End those of the `pairs` that are no newer than the end of their user or organization.

    Return the keys of those that were present, and the greatest stamp at which any was told of.
    """
    if connection.dialect.name != "postgresql":
        return drop_memberships(connection, [end], pairs), newest_membership(
            connection, end.key, pairs
        )
    parameters = {"ids": [pair.id for pair in pairs], "ended_at": end.ended_at}
    newest, *present = connection.execute(_END, parameters).one()
    if newest is not None and newest > end.ended_at:
        mine = (records.c.kind == "membership") & among(records.c.logto_id, "ids")
        _save_newer(connection, end, mine, {"ids": parameters["ids"]})
    return list(map(membership, *present)), NEVER if newest is None else newest


def _save_newer(
    connection: sa.Connection,
    end: Record,
    mine: sa.ColumnElement[bool],
    given: dict[str, Any],
) -> None:
    """Save those that were told of soon after the end, since they are in doubt now."""
    soon_after = records.c.stamp.between(end.ended_at + 1, end.ended_at + RESTORED_MS)
    newer = connection.execute(sa.select(records).where(mine, soon_after), given).mappings()
    save_records(connection, [codec.from_record_row(row) for row in newer.all()])


def present_memberships(connection: sa.Connection, ends: Sequence[Key]) -> list[Key]:
    """List the present memberships of users and organizations."""
    both = (members.c.logto_organization_id, members.c.logto_user_id)
    found: set[Key] = set()
    for kind, (_, mine) in _SIDES.items():
        if ids := [end.id for end in ends if end.kind == kind]:
            query = sa.select(*both).where(among(mine, "ids"))
            found.update(membership(*pair) for pair in connection.execute(query, {"ids": ids}))
    return sorted(found)


def find_here(connection: sa.Connection, keys: Sequence[Key]) -> set[Key]:
    """Find those users and organizations that have a row, and aren't deleted."""
    found: set[Key] = set()
    for table, kind, column in _MIRRORED:
        if ids := [key.id for key in keys if key.kind == kind]:
            query = sa.select(column).where(among(column, "ids"), table.c.deleted_at.is_(None))
            found.update(Key(kind, each) for each in connection.scalars(query, {"ids": ids}))
    return found


def newest_membership(
    connection: sa.Connection, end: Key, pairs: Sequence[Key] | None = None
) -> int:
    """Return the greatest stamp at which a membership of a user or an organization, or one of the
    `pairs`, was told of."""
    newest = sa.select(sa.func.max(records.c.told_at))
    if pairs is None:
        return connection.scalar(newest.where(_SIDES[end.kind][0] == end.id)) or NEVER
    mine = newest.where(records.c.kind == "membership", among(records.c.logto_id, "ids"))
    return connection.scalar(mine, {"ids": [pair.id for pair in pairs]}) or NEVER


def list_keys(
    connection: sa.Connection,
    kind: Kind,
    limit: int,
    after: str,
    of: Key | None,
    unread_since: int | None,
    with_roles: bool,
) -> list[Key]:
    """List known records by id, without users and organizations that are deleted for sure."""
    if with_roles:
        return holders(connection, limit, after, unread_since)
    query = (
        sa.select(records.c.logto_id)
        .where(records.c.kind == kind, records.c.logto_id > after)
        .order_by(records.c.logto_id)
        .limit(limit)
    )
    if kind != "membership":
        query = query.where(sa.or_(records.c.deleted_at.is_(None), records.c.doubtful))
    if of is not None:
        query = query.where(_SIDES[of.kind][0] == of.id)
    if unread_since is not None:
        query = query.where(sa.func.coalesce(records.c.read_at, -1) < unread_since)
    return [Key(kind, each) for each in connection.scalars(query)]


def list_refetches(connection: sa.Connection, limit: int) -> list[RefetchNeed]:
    """List the records about which Logto must be asked, the longest waiting first.

    If there are more, organizations whose members must be listed come before all others: one list
    tells what else is asked about one by one.
    """
    query = (
        sa.select(records)
        .where(records.c.refetch_since.is_not(None))
        .order_by(records.c.refetch_since, records.c.kind, records.c.logto_id)
        .limit(limit)
    )
    rows = connection.execute(query).mappings().all()
    if len(rows) == limit:
        of_members = records.c.kind == "organization", records.c.waiting_reason.contains(MEMBERS)
        lists = connection.execute(query.where(*of_members)).mappings().all()
        listed = {row["logto_id"] for row in lists}
        others = [
            row for row in rows if row["kind"] != "organization" or row["logto_id"] not in listed
        ]
        rows = [*lists, *others][:limit]
    return [
        RefetchNeed(
            key=Key(row["kind"], row["logto_id"]),
            reason=row["waiting_reason"],
            doubtful=row["doubtful"],
        )
        for row in rows
    ]


def count_doubtful(connection: sa.Connection) -> int:
    """Count the records in doubt."""
    return _count(connection, records.c.doubtful)


def count_refetches(connection: sa.Connection) -> int:
    """Count the records about which Logto must be asked."""
    return _count(connection, records.c.refetch_since.is_not(None))


def _other_end(end: Key, pair: Key) -> Key:
    organization, user = pair.organization_and_user
    return user if end.kind == "organization" else organization


def _hold(connection: sa.Connection, keys: Sequence[Key], ends: Sequence[Key]) -> None:
    """The ends are held already, so there come no more memberships of theirs meanwhile."""
    wanted = {key.id for key in keys}
    for kind, statement in deliveries.MEMBERSHIPS_OF.items():
        ids = [end.id for end in ends if end.kind == kind]
        if ids:
            wanted.update(connection.scalars(statement, {"ids": ids}))
    connection.execute(deliveries.HOLD, {"ids": list(wanted)}).close()


def _unknown(connection: sa.Connection, keys: Sequence[Key], by_kind: _ByKind) -> list[Key]:
    known = {
        Key(kind, logto_id)
        for kind, wanted in by_kind.items()
        for logto_id in connection.scalars(deliveries.KNOWN, wanted)
    }
    return [key for key in keys if key not in known]


def _keep(connection: sa.Connection, keys: Sequence[Key]) -> None:
    new = zip(keys, local_ids(len(keys)), strict=True)
    rows = [codec.to_record_row(Record(key, local_id=local_id)) for key, local_id in new]
    bulk.insert(connection, records, rows)


def _project(connection: sa.Connection, kind: str, changed: Sequence[Record]) -> None:
    present, absent = [], []
    for record in changed:
        row = project(record)
        if kind == "membership" and row is None:
            organization, user = record.key.organization_and_user
            absent.append({"organization": organization.id, "user": user.id})
        elif row is not None:
            present.append(row if kind == "membership" else row | {"id": record.local_id})
    bulk.upsert(connection, bulk.MIRROR[kind], present)
    if absent:
        connection.execute(deliveries.LEAVE, absent)


def _count(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(records).where(condition)
    return connection.scalar(query) or 0


def _is_over(ended_at: _EndedAt) -> sa.ColumnElement[bool]:
    """Whether a membership is no newer than the end of its user or organization."""
    return sa.func.coalesce(records.c.stamp, NEVER) <= ended_at


def _over(ended_at: _EndedAt) -> dict[str, Any]:
    """What the end of its user or organization makes of a membership."""
    newest = sa.case((records.c.gone_at > ended_at, records.c.gone_at), else_=ended_at)
    is_over = _is_over(newest)
    return {
        "gone_at": newest,
        "deleted_at": sa.case((is_over, newest)),
        "doubtful": sa.and_(sa.not_(is_over), records.c.doubtful),
        "refetch_since": sa.case((sa.not_(is_over), records.c.refetch_since)),
        "waiting_reason": sa.case((sa.not_(is_over), records.c.waiting_reason)),
    }


def _end_statement() -> sa.Select[Any]:
    """End memberships, their rows and their roles, in one statement.

    It locks in no order: whoever runs it limits how long it waits for a lock, and tries again.
    """
    ended_at = sa.bindparam("ended_at", type_=Millis)
    over = (
        sa.update(records)
        .where(
            records.c.kind == sa.literal_column("'membership'"), among(records.c.logto_id, "ids")
        )
        .values(_over(ended_at))
        .returning(
            records.c.organization_id,
            records.c.user_id,
            records.c.told_at,
            _is_over(ended_at).label("is_over"),
        )
        .cte("over")
    )

    def of_over(table: sa.Table) -> sa.Delete:
        return sa.delete(table).where(
            over.c.is_over,
            table.c.logto_organization_id == over.c.organization_id,
            table.c.logto_user_id == over.c.user_id,
        )

    both = (members.c.logto_organization_id, members.c.logto_user_id)
    left = of_over(members).returning(*both).cte("membership_left")
    lists = [sa.func.array_agg(left.c[column.name]) for column in both]
    return sa.select(
        sa.select(sa.func.max(over.c.told_at)).scalar_subquery(),
        *(sa.func.coalesce(each, sa.text("ARRAY[]::text[]")) for each in lists),
    ).add_cte(of_over(member_roles).cte("roles_left"))


_END = _end_statement()


Column = sa.Column[Any]


class _Side(Struct, frozen=True):
    """How one end of memberships is found; `mine` and `other` in the mirror and in the records."""

    table: sa.Table
    kind: str
    exact: list[Column]
    any_case: list[Column]
    parts: list[Column]
    mine: tuple[Column, Column]
    other: tuple[Column, Column]


_USER = (members.c.logto_user_id, records.c.user_id)
_ORGANIZATION = (members.c.logto_organization_id, records.c.organization_id)

USERS = _Side(
    table=users,
    kind="user",
    exact=[users.c.logto_user_id, users.c.phone, users.c.username],
    any_case=[users.c.email],
    parts=[users.c.email, users.c.username, users.c.name, users.c.phone],
    mine=_USER,
    other=_ORGANIZATION,
)
ORGANIZATIONS = _Side(
    table=organizations,
    kind="organization",
    exact=[organizations.c.logto_organization_id],
    any_case=[organizations.c.name],
    parts=[organizations.c.name],
    mine=_ORGANIZATION,
    other=_USER,
)
SIDES = {"user": USERS, "organization": ORGANIZATIONS}


def find_rows(connection: sa.Connection, side: _Side, query: str, limit: int) -> list[FoundRow]:
    """Find rows by what names them; else by a part of it, those that are deleted last.

    An empty query finds all.
    """
    order = (side.table.c.deleted_at.is_not(None), side.table.c.id)
    same = [column == query for column in side.exact]
    same += [sa.func.lower(column) == query.lower() for column in side.any_case]
    same += [side.table.c.id == local_id for local_id in _uuids(query)]
    alike = [column.icontains(query, autoescape=True) for column in side.parts]
    if not query:
        alike.append(sa.true())
    for conditions in (same, alike):
        wanted = sa.select(side.table).where(sa.or_(*conditions))
        rows = connection.execute(wanted.order_by(*order).limit(limit)).mappings().all()
        if rows:
            return [_found(connection, side, dict(row)) for row in rows]
    return []


def _found(connection: sa.Connection, side: _Side, row: dict[str, Any]) -> FoundRow:
    logto_id = row[f"logto_{side.kind}_id"]
    (mine, mine_known), (other, other_known) = side.mine, side.other
    own = (records.c.kind == side.kind, records.c.logto_id == logto_id)
    memberships = sa.select(other).where(mine == logto_id).order_by(other)
    in_doubt = sa.select(other_known).where(mine_known == logto_id, records.c.doubtful)
    return FoundRow(
        row=row,
        waiting_for=connection.scalar(sa.select(records.c.waiting_reason).where(*own)),
        memberships=list(connection.scalars(memberships)),
        memberships_in_doubt=list(connection.scalars(in_doubt.order_by(other_known))),
        roles=role_names(connection, logto_id) if side is USERS else [],
    )


def _uuids(query: str) -> list[str]:
    try:
        return [str(uuid.UUID(query))]
    except ValueError:
        return []
