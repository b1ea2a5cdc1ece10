"""Learned signing keys, and requests that no key verified."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from msgspec import structs

from logto_webhooks.database.dialect import among, now, put_row
from logto_webhooks.database.schema import keys, rejected
from logto_webhooks.signing_keys import (
    BOUNDS,
    OVERLAP_MS,
    QuarantineLimits,
    RejectedRequest,
    WebhookKey,
    fingerprint,
    is_key,
)

_BY_ID = among(rejected.c.id, "ids")
_COLUMNS = ("id", "body", "signature", "received_at", "hook", "known")


class KeyStore:
    """What a database knows of keys, and what is set aside, in the transaction of a Connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def learnt(self) -> list[WebhookKey]:
        """The keys that Logto told; what can't be a key is left out."""
        names = ("hook", "key", "learnt_at", "until")
        query = sa.select(*(keys.c[name] for name in names)).where(keys.c.key.is_not(None))
        rows = self._connection.execute(query.order_by(keys.c.learnt_at)).mappings()
        return [WebhookKey(**row) for row in rows if is_key(row["key"])]

    def learn(self, new: Sequence[WebhookKey]) -> None:
        """Keep keys; the others of the same hooks end after the overlap, unless they do before.
        What can't be a key isn't kept."""
        for key in new:
            if not is_key(key.key):
                continue
            mark = fingerprint(key.key)
            others = (keys.c.hook == key.hook, keys.c.fingerprint != mark)
            sooner = sa.func.coalesce(keys.c.until, key.learnt_at + OVERLAP_MS)
            self._connection.execute(sa.update(keys).where(*others).values(until=sooner))
            put_row(self._connection, keys, {"fingerprint": mark} | structs.asdict(key))

    def used(self, marks: dict[str, int]) -> dict[str, int]:
        """Note when keys were last used (ms), by their fingerprints; return that of all."""
        for mark, at in marks.items():
            put_row(self._connection, keys, {"fingerprint": mark, "last_used_at": at})
        query = sa.select(keys.c.fingerprint, keys.c.last_used_at)
        rows = self._connection.execute(query.where(keys.c.last_used_at.is_not(None)))
        return {row.fingerprint: row.last_used_at for row in rows}

    def set_aside(self, strangers: Sequence[RejectedRequest]) -> None:
        """Keep requests, and of all that are kept what is within the bounds."""
        rows = [structs.asdict(request) | {"size": len(request.body)} for request in strangers]
        for row in rows:
            del row["id"]
        if rows:
            self._connection.execute(sa.insert(rejected), rows)
        for known, bounds in BOUNDS.items():
            self._prune(known, bounds)

    def strangers(self, after: int, limit: int) -> list[RejectedRequest]:
        """List what is set aside, the oldest first."""
        query = sa.select(*(rejected.c[name] for name in _COLUMNS)).where(rejected.c.id > after)
        rows = self._connection.execute(query.order_by(rejected.c.id).limit(limit)).mappings()
        return [RejectedRequest(**row) for row in rows]

    def release(self, ids: Sequence[int]) -> None:
        """Forget what was set aside."""
        self._connection.execute(sa.delete(rejected).where(_BY_ID), {"ids": list(ids)})

    def aside(self, since: int = 0, *, known: bool = False) -> int:
        """Count what is set aside, received after a moment (ms); of `known` hooks, or of any."""
        counted = sa.select(sa.func.count()).where(rejected.c.received_at > since)
        if known:
            counted = counted.where(rejected.c.known == sa.true())
        return self._connection.scalar(counted) or 0

    def _prune(self, known: bool, bounds: QuarantineLimits) -> None:
        newest = rejected.c.id.desc()
        ranked = (
            sa.select(
                rejected.c.id,
                rejected.c.received_at,
                sa.func.row_number().over(order_by=newest).label("place"),
                sa.func.sum(rejected.c.size).over(order_by=newest).label("total"),
            )
            .where(rejected.c.known == known)
            .subquery()
        )
        outside = sa.select(ranked.c.id).where(
            (ranked.c.place > bounds.rows)
            | (ranked.c.total > bounds.bytes)
            | (ranked.c.received_at < now() - bounds.age_ms)
        )
        self._connection.execute(sa.delete(rejected).where(rejected.c.id.in_(outside)))
