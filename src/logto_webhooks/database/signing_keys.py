"""Learned signing keys, and requests that no key verified."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
_LEARNT = (keys.c.webhook_id, keys.c.key, keys.c.learnt_at, keys.c.until)
_REJECTED = sa.select(
    *(rejected.c[name] for name in ("id", "body", "signature", "received_at", "known")),
    rejected.c.hook.label("webhook_id"),
)


class KeyStore:
    """Stored keys and rejected requests, in the transaction of a Connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def learnt(self) -> list[WebhookKey]:
        """Return the keys that Logto's API returned, without those that can't be a key."""
        query = sa.select(*_LEARNT).where(keys.c.key.is_not(None))
        rows = self._connection.execute(query.order_by(keys.c.learnt_at)).mappings()
        return [WebhookKey(**row) for row in rows if is_key(row["key"])]

    def learn(self, new: Sequence[WebhookKey], overlap_ms: int | None = None) -> None:
        """Store keys, except what can't be a key. Other keys of the same webhooks expire after
        OVERLAP_MS, unless they have an end; or after `overlap_ms`, unless they end before that.

        A key is skipped if another one of its webhook was learnt later: Logto's answer is late.
        """
        for key in new:
            if not is_key(key.key):
                continue
            mark = fingerprint(key.key)
            others = (keys.c.webhook_id == key.webhook_id, keys.c.fingerprint != mark)
            newest = self._connection.scalar(
                sa.select(sa.func.max(keys.c.learnt_at)).where(*others)
            )
            if key.until is None and newest is not None and newest > key.learnt_at:
                continue
            end = key.learnt_at + (OVERLAP_MS if overlap_ms is None else overlap_ms)
            has_end = keys.c.until.is_not(None) if overlap_ms is None else keys.c.until < end
            until = sa.case((has_end, keys.c.until), else_=end)
            self._connection.execute(sa.update(keys).where(*others).values(until=until))
            put_row(self._connection, keys, structs.asdict(key) | {"fingerprint": mark})

    def forget(self, webhook_ids: Collection[str]) -> None:
        """Delete the keys of webhooks, but not those that expire: these aren't accepted even if
        they are in the settings."""
        of_webhooks = keys.c.webhook_id.in_(sorted(webhook_ids))
        self._connection.execute(sa.delete(keys).where(of_webhooks, keys.c.until.is_(None)))

    def used(self, marks: dict[str, int]) -> dict[str, int]:
        """Store when keys were last used (ms), by fingerprint. Return this for all keys."""
        for mark, at in marks.items():
            put_row(self._connection, keys, {"fingerprint": mark, "last_used_at": at})
        query = sa.select(keys.c.fingerprint, keys.c.last_used_at)
        rows = self._connection.execute(query.where(keys.c.last_used_at.is_not(None)))
        return {row.fingerprint: row.last_used_at for row in rows}

    def add_rejected(self, new: Sequence[RejectedRequest]) -> None:
        """Store requests, and delete stored ones beyond the bounds."""
        rows = [structs.asdict(request) | {"size": len(request.body)} for request in new]
        for row in rows:
            del row["id"]
            row["hook"] = row.pop("webhook_id")
        if rows:
            self._connection.execute(sa.insert(rejected), rows)
        for known, bounds in BOUNDS.items():
            self._prune(known, bounds)

    def list_rejected(self, after: int, limit: int) -> list[RejectedRequest]:
        """List rejected requests, the oldest first."""
        query = _REJECTED.where(rejected.c.id > after).order_by(rejected.c.id).limit(limit)
        rows = self._connection.execute(query).mappings()
        return [RejectedRequest(**row) for row in rows]

    def delete_rejected(self, ids: Sequence[int]) -> None:
        """Delete rejected requests."""
        self._connection.execute(sa.delete(rejected).where(_BY_ID), {"ids": list(ids)})

    def count_rejected(self, since: int = 0, *, known: bool = False) -> int:
        """Count the rejected requests that were received after a moment (ms): those of `known`
        webhooks, or all."""
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
