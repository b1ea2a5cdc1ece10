"""Learned signing keys, and requests that no key verified."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa
from msgspec import structs

from logto_webhooks.database.dialect import among, now, put_rows
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
_OF_WEBHOOKS = among(keys.c.webhook_id, "webhook_ids")
_RELATED = (
    sa.select(keys.c.fingerprint, *_LEARNT)
    .where(keys.c.webhook_id.is_not(None))
    .where(sa.or_(_OF_WEBHOOKS, among(keys.c.fingerprint, "marks")))
    .order_by(keys.c.fingerprint)
    .with_for_update()  # a rotation must not be undone by an answer that came just before it
)
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
        What is stored already, usually all, isn't written again.
        """
        told = {fingerprint(key.key): key for key in new if is_key(key.key)}
        stored = self._read_related(told)
        current = stored.copy()
        marks: dict[str, set[str]] = {}  # by webhook
        for mark, key in stored.items():
            marks.setdefault(key.webhook_id, set()).add(mark)
        for mark, key in told.items():
            others = marks.setdefault(key.webhook_id, set()) - {mark}
            newest = max((current[other].learnt_at for other in others), default=0)
            if key.until is None and newest > key.learnt_at:
                continue
            end = key.learnt_at + (OVERLAP_MS if overlap_ms is None else overlap_ms)
            for other in others:
                until = current[other].until
                if until is None or (overlap_ms is not None and until > end):
                    current[other] = structs.replace(current[other], until=end)
            if mark in current:  # perhaps another webhook had it
                marks[current[mark].webhook_id].discard(mark)
            marks[key.webhook_id].add(mark)
            current[mark] = key
        changed = {mark: key for mark, key in current.items() if _is_new(key, stored.get(mark))}
        rows = [structs.asdict(key) | {"fingerprint": mark} for mark, key in changed.items()]
        put_rows(self._connection, keys, rows)

    def _read_related(self, told: Mapping[str, WebhookKey]) -> dict[str, WebhookKey]:
        """Return what is stored of these keys, and of others of their webhooks, by fingerprint."""
        webhook_ids = sorted({key.webhook_id for key in told.values()})
        values = {"webhook_ids": webhook_ids, "marks": sorted(told)}
        rows = self._connection.execute(_RELATED, values)
        return {
            mark: WebhookKey(webhook_id=webhook_id, key=key, learnt_at=learnt_at, until=until)
            for mark, webhook_id, key, learnt_at, until in rows
        }

    def forget(self, webhook_ids: Collection[str]) -> None:
        """Delete the keys of webhooks, but not those that expire: these aren't accepted even if
        they are in the settings."""
        delete = sa.delete(keys).where(_OF_WEBHOOKS, keys.c.until.is_(None))
        self._connection.execute(delete, {"webhook_ids": sorted(webhook_ids)})

    def used(self, marks: dict[str, int]) -> dict[str, int]:
        """Store when keys were last used (ms), by fingerprint. Return this for all keys."""
        rows = [{"fingerprint": mark, "last_used_at": at} for mark, at in marks.items()]
        put_rows(self._connection, keys, rows)
        query = sa.select(keys.c.fingerprint, keys.c.last_used_at)
        used = self._connection.execute(query.where(keys.c.last_used_at.is_not(None)))
        return {row.fingerprint: row.last_used_at for row in used}

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


def _is_new(key: WebhookKey, stored: WebhookKey | None) -> bool:
    """Whether to store a key. It isn't new only because Logto was asked again."""
    return stored is None or structs.replace(key, learnt_at=stored.learnt_at) != stored
