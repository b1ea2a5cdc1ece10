"""The statements of the steps that run for every batch, each built once.

To build one costs SQLAlchemy several times what running it costs the database.
"""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks.adapters.stores.dialect import among, now
from logto_webhooks.adapters.stores.schema import deliveries, is_pending, members, records

# Until the transaction ends: the connection may be the application's.
LIMIT_WAITS = sa.select(
    sa.func.set_config("lock_timeout", sa.bindparam("lock", type_=sa.Text), sa.true()),
    sa.func.set_config("statement_timeout", sa.bindparam("statement", type_=sa.Text), sa.true()),
)
DUE = (
    sa.select(deliveries.c.id, sa.func.length(deliveries.c.body))
    .where(is_pending, deliveries.c.due_at <= now())
    .order_by(deliveries.c.due_at, deliveries.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
LEASE = (
    sa.update(deliveries)
    .where(among(deliveries.c.id, "ids"))
    .values(
        token=sa.bindparam("by"),
        due_at=now() + sa.bindparam("lease_ms"),
        attempts=deliveries.c.attempts + 1,
    )
    .returning(
        deliveries.c.id,
        deliveries.c.body,
        deliveries.c.event,
        deliveries.c.subject,
        deliveries.c.received_at,
        deliveries.c.digest,
        deliveries.c.occurred_at,
        deliveries.c.origin,
        deliveries.c.attempts.label("attempt"),
    )
)
RENEW = (
    sa.update(deliveries)
    .where(among(deliveries.c.id, "ids"), deliveries.c.token == sa.bindparam("by"))
    .values(due_at=now() + sa.bindparam("lease_ms"))
)
FINISH = (
    sa.update(deliveries)
    # Only what is pending has a token; to ask for the state would lead a planner astray.
    .where(among(deliveries.c.id, "ids"), deliveries.c.token == sa.bindparam("by"))
    .values(
        token=None,
        due_at=now() + sa.bindparam("wait_ms"),
        **{name: sa.bindparam(name) for name in ("state", "result", "last_error")},
    )
)
KNOWN = sa.select(records.c.logto_id).where(
    records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids")
)
_RECORDS = (
    sa.select(records)
    .where(records.c.kind == sa.bindparam("of_kind"), among(records.c.logto_id, "ids"))
    .order_by(records.c.kind, records.c.logto_id)
)
LOCK = _RECORDS.with_for_update()
SHARE = _RECORDS.with_for_update(read=True)
HOLD = (
    sa.select(records.c.doubtful)
    .where(records.c.kind == sa.literal_column("'membership'"), among(records.c.logto_id, "ids"))
    .order_by(records.c.logto_id)
    .with_for_update()
)
# One index serves each of them; an OR in one statement would lead a planner astray.
MEMBERSHIPS_OF = {
    kind: sa.select(records.c.logto_id).where(among(column, "ids"))
    for kind, column in (("user", records.c.user_id), ("organization", records.c.organization_id))
}
COUNT_OF = {
    kind: sa.select(sa.func.count()).select_from(
        sa.select(sa.literal_column("1").label("one"))
        .where(among(column, "ids"))
        .limit(sa.bindparam("most", type_=sa.Integer) + 1)
        .subquery()
    )
    for kind, column in (("user", records.c.user_id), ("organization", records.c.organization_id))
}
LEAVE = sa.delete(members).where(
    members.c.logto_organization_id == sa.bindparam("organization"),
    members.c.logto_user_id == sa.bindparam("user"),
)
