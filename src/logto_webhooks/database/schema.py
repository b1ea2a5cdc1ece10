"""The tables. Applications may read those of the mirror. The inbox and the records are private."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from logto_webhooks import canonical_json
from logto_webhooks.database.dialect import folded
from logto_webhooks.events.base import to_millis
from logto_webhooks.records.projection import without_nul

VERSION_TABLE = "logto_schema_version"

metadata = sa.MetaData()


class Json(sa.types.TypeDecorator[Any]):
    """JSON as text, encoded and decoded by the package's one parser."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        """Encode."""
        return None if value is None else canonical_json.encode(value).decode()

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        """Decode."""
        return None if value is None else canonical_json.decode(value.encode())


class Document(Json):
    """JSON that applications can query: JSONB on PostgreSQL, which refuses NUL; text elsewhere."""

    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose by the database."""
        if dialect.name != "postgresql":
            return dialect.type_descriptor(sa.Text())
        from sqlalchemy.dialects.postgresql import JSONB  # slow to import

        return dialect.type_descriptor(JSONB())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        """Leave the encoding to JSONB, or encode."""
        if dialect.name == "postgresql":
            return without_nul(value)
        return super().process_bind_param(value, dialect)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """Leave the decoding to JSONB, or decode."""
        return (
            value if dialect.name == "postgresql" else super().process_result_value(value, dialect)
        )


class _Timestamp(sa.types.UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **options: Any) -> str:
        return "DATETIME"


class Moment(sa.types.TypeDecorator[int]):
    """Milliseconds since the epoch in Python, a timestamp with time zone (UTC) in the table.

    On SQLite, it is the same text that SQLAlchemy's DateTime writes, but made directly.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose by the database."""
        return _Timestamp() if dialect.name == "sqlite" else super().load_dialect_impl(dialect)

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> Any:
        """Make a timestamp."""
        if value is None:
            return None
        moment = datetime.fromtimestamp(value / 1000, UTC)
        if dialect.name == "sqlite":
            return moment.replace(tzinfo=None).isoformat(" ", "microseconds")
        return moment

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> int | None:
        """Make milliseconds. SQLite's timestamps have no time zone."""
        if value is None:
            return None
        return to_millis(datetime.fromisoformat(value) if isinstance(value, str) else value)


Millis = sa.BigInteger
# SQLite has no type for it: text with dashes.
Uuid = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
Identity = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite generates only INTEGER keys


def _id() -> sa.Column[int]:
    return sa.Column("id", Identity, primary_key=True, autoincrement=True)


def _keys(kind: Any, *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, primary_key=True) for name in names]


def _required(kind: Any, *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name in names]


def _optional(kind: Any, *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind) for name in names]


deliveries = sa.Table(
    "logto_deliveries",
    metadata,
    _id(),
    sa.Column("digest", sa.LargeBinary(24), nullable=False, unique=True),
    *_required(sa.LargeBinary, "body"),
    *_required(sa.Text, "event"),
    *_optional(sa.Text, "subject"),
    *_required(Millis, "occurred_at", "received_at"),
    *_required(sa.Text, "origin", "state"),
    *_optional(sa.Text, "result"),
    *_required(sa.Integer, "attempts"),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    *_optional(sa.Text, "last_error"),
    sa.Column("due_at", Millis, nullable=False),  # a lease is a later due time
    *_optional(sa.Text, "token"),
    sqlite_autoincrement=True,
)
# A literal instead of a parameter, so that a planner can use the partial index.
is_pending = deliveries.c.state == sa.literal_column("'pending'")
# Few rows are neither done nor pending.
is_odd = deliveries.c.state.in_([sa.literal_column("'dead'"), sa.literal_column("'ignored'")])

records = sa.Table(
    "logto_records",
    metadata,
    *_keys(sa.Text, "kind", "logto_id"),
    *_required(Uuid, "local_id"),
    *_optional(sa.Text, "organization_id", "user_id"),  # only of a membership
    *_required(Json, "data", "groups", "facts", "needs"),
    *_optional(Millis, "deleted_at", "read_at"),
    *_required(sa.Boolean, "doubtful"),
    # Of a membership: whether the last of its local events was LocalMemberAdded.
    sa.Column("announced", sa.Boolean, nullable=False, server_default=sa.false()),
    *_optional(Millis, "refetch_since"),
    *_optional(sa.Text, "waiting_reason"),
    # These decide whether it exists (see `Record`). Null without evidence.
    *_optional(Millis, "gone_at", "absent_at", "stamp", "told_at", "told_end"),
    # While only reads say that it is gone: the first of these.
    *_optional(Millis, "absent_since"),
)
is_to_refetch = records.c.refetch_since.is_not(None)
is_doubtful = records.c.doubtful.is_(sa.literal_column("true"))  # the same words on all databases

users = sa.Table(
    "logto_users",
    metadata,
    *_keys(Uuid, "id"),
    sa.Column("logto_user_id", sa.Text, nullable=False, unique=True),
    *_optional(sa.Text, "username", "email", "phone", "name", "avatar"),
    *_required(Document, "profile", "identities", "custom_data"),
    *_required(sa.Boolean, "is_suspended"),
    *_optional(Moment, "last_sign_in_at", "created_at", "updated_at", "deleted_at"),
)

organizations = sa.Table(
    "logto_organizations",
    metadata,
    *_keys(Uuid, "id"),
    sa.Column("logto_organization_id", sa.Text, nullable=False, unique=True),
    *_required(sa.Text, "name"),
    *_optional(sa.Text, "description"),
    *_required(Document, "custom_data"),
    *_optional(Moment, "created_at", "updated_at", "deleted_at"),
)

# No foreign keys: memberships may arrive before their users.
members = sa.Table(
    "logto_organization_members",
    metadata,
    *_keys(sa.Text, "logto_organization_id", "logto_user_id"),
    *_optional(Moment, "joined_at"),
)

user_identities = sa.Table(
    "logto_user_identities",
    metadata,
    *_keys(sa.Text, "logto_user_id", "target"),
    *_optional(sa.Text, "identity_id"),
    *_optional(Document, "details"),
)

user_roles = sa.Table(
    "logto_user_roles",
    metadata,
    *_keys(sa.Text, "logto_user_id", "role_id"),
    *_required(sa.Text, "name"),
    *_required(Millis, "read_at"),
)

member_roles = sa.Table(
    "logto_organization_member_roles",
    metadata,
    *_keys(sa.Text, "logto_organization_id", "logto_user_id", "role_id"),
    *_required(sa.Text, "name"),
)

# The application's own tables that follow the mirror.
mappings = sa.Table(
    "logto_mappings",
    metadata,
    *_keys(sa.Text, "name"),
    *_required(sa.Text, "kind", "definition"),
    *_required(Json, "former"),  # definitions that it had before
    *_optional(sa.Text, "applied_to"),
    *_required(Millis, "registered_at", "seen_at"),
)

# What became of each record in these tables. Its key and indexes don't begin with the mapping:
# without statistics, a planner would take that for selective.
mapped_rows = sa.Table(
    "logto_mapped_rows",
    metadata,
    *_keys(sa.Text, "logto_id", "mapping"),
    *_optional(sa.Text, "record_id", "row_id", "ends", "role"),
    *_required(sa.Text, "kind", "state"),
    *_optional(sa.Text, "reason", "blocked_by"),
    *_required(Millis, "changed_at"),
    # When the row was last deleted, or unlinked; 0 if somebody has allowed it since.
    *_optional(Millis, "deleted_at"),
)
# One expression each, because an index is only used for the very words of its condition.
_SETTLED: list[sa.ColumnElement[Any]] = [sa.literal_column("'ok'"), sa.literal_column("'excluded'")]
is_unsettled = mapped_rows.c.state.not_in(_SETTLED)
is_owed = mapped_rows.c.state == sa.literal_column("'owed'")
is_excluded = mapped_rows.c.state == sa.literal_column("'excluded'")

# The application's rows that a record had before.
former_rows = sa.Table(
    "logto_former_rows", metadata, *_keys(sa.Text, "row_id", "mapping", "logto_id")
)

# Users and organizations with too many memberships for one transaction. If `change` is "ending",
# they were deleted, and their memberships have yet to be ended. If it is "arrival", they came, and
# their memberships have yet to be announced; then `ended_at` is null.
membership_steps = sa.Table(
    "logto_membership_steps",
    metadata,
    *_keys(sa.Text, "change", "kind", "logto_id"),
    *_optional(Millis, "ended_at"),
    *_optional(sa.Text, "source"),
    *_optional(sa.BigInteger, "delivery_id"),
    *_required(Millis, "noted_at"),
)

# One row for each handler and release: with other options, it is another definition.
handlers = sa.Table(
    "logto_handlers",
    metadata,
    *_keys(sa.Text, "name", "definition"),
    *_required(Json, "options"),
    *_required(Millis, "registered_at", "seen_at"),
)

jobs = sa.Table(
    "logto_jobs",
    metadata,
    _id(),
    *_required(sa.Text, "handler", "key", "event", "subject", "queue_key"),
    *_required(Millis, "occurred_at"),
    *_required(sa.BigInteger, "order_at"),  # the place in the queue: a time, or 0 to be the first
    *_optional(sa.BigInteger, "delivery_id"),
    *_optional(sa.LargeBinary, "payload"),
    *_required(sa.Text, "state"),
    *_required(sa.Integer, "attempts", "failures", "runs"),
    *_optional(Millis, "finished_at"),
    *_optional(sa.Text, "error"),
    sa.UniqueConstraint("handler", "key", name="logto_jobs_once"),
    sqlite_autoincrement=True,
)

# Few jobs. A handler can have very many, which a command moves page by page.
has_not_succeeded = jobs.c.state.in_(
    [sa.literal_column("'dead'"), sa.literal_column("'discarded'")]
)

# One row for each queue with waiting jobs. Its holder runs the first of these.
queue_keys = sa.Table(
    "logto_lines",  # older than the term "queue key"
    metadata,
    _id(),
    *_required(sa.Text, "handler", "queue_key"),
    *_required(Millis, "due_at"),
    # In no index, so that holding a row and freeing it writes to none.
    *_optional(Millis, "held_until"),
    *_optional(sa.Text, "token"),
    sa.UniqueConstraint("handler", "queue_key", name="logto_lines_once"),
    sqlite_autoincrement=True,
)

# The progress of recover and reconcile.
checkpoints = sa.Table(
    "logto_checkpoints",
    metadata,
    *_keys(sa.Text, "name"),
    *_required(Millis, "at"),
    *_required(sa.BigInteger, "count"),
)

# Work that only one process does at a time.
leases = sa.Table(
    "logto_leases",
    metadata,
    *_keys(sa.Text, "name"),
    *_required(sa.BigInteger, "holder"),
    *_required(Millis, "until"),
)

# One row: when the first and the last delivery came, and since when they have stopped.
flow = sa.Table(
    "logto_flow",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    *_optional(Millis, "began", "last", "silent_since"),
)

# One row for each of the last days: the longest time without a delivery that ended on that day.
flow_gaps = sa.Table(
    "logto_flow_gaps",
    metadata,
    sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
    *_required(Millis, "ended_at", "length"),
)

# One row: when this was installed, and the last noted time of the database's clock.
installation = sa.Table(
    "logto_installation",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    *_required(Millis, "installed_at", "clock_noted_at", "clock_moved_ms"),
)

# `key` is set only for keys from Logto's API. Of configured keys, only the fingerprint is stored.
keys = sa.Table(
    "logto_keys",
    metadata,
    *_keys(sa.Text, "fingerprint"),
    *_optional(sa.Text, "webhook_id", "key"),
    *_optional(Millis, "learnt_at", "until", "last_used_at"),
)

rejected = sa.Table(
    "logto_rejected",
    metadata,
    _id(),
    *_required(sa.LargeBinary, "body"),
    *_required(sa.Integer, "size"),
    *_required(sa.Text, "signature"),
    *_required(Millis, "received_at"),
    *_required(sa.Text, "hook"),  # the ID of the webhook that the body names
    *_required(sa.Boolean, "known"),
    sqlite_autoincrement=True,
)


@functools.cache
def metadata_with_indexes() -> sa.MetaData:
    """Add the indexes, which are needed only to create the tables.

    Their options make SQLAlchemy import PostgreSQL's dialect, which is slow.
    """
    # With `received_at`, so that the age of the oldest is read without the table.
    due = (deliveries.c.due_at, deliveries.c.id, deliveries.c.received_at)
    _add_index("logto_deliveries_due", *due, where=is_pending)
    _add_index("logto_deliveries_odd", deliveries.c.state, where=is_odd)
    # With the id, so that pages of memberships are read in order.
    for column in (records.c.organization_id, records.c.user_id):
        name = f"logto_records_{column.name.removesuffix('_id')}"
        _add_index(name, column, records.c.logto_id, where=column.is_not(None))
    kind, since, id_ = records.c["kind", "refetch_since", "logto_id"]
    _add_index("logto_records_refetch", since, kind, id_, where=is_to_refetch)
    _add_index("logto_records_refetch_kind", kind, since, id_, where=is_to_refetch)
    _add_index("logto_records_doubtful", kind, where=is_doubtful)
    steps = membership_steps.c
    in_order = (steps.noted_at, steps.kind, steps.logto_id)
    _add_index("logto_membership_steps_noted", steps.change, *in_order)
    for column in (users.c.username, users.c.email, users.c.phone):
        _add_index(f"logto_users_{column.name}", column, **_ANY_LENGTH)
    _add_index("logto_users_email_folded", folded(users.c.email), **_ANY_LENGTH)
    _add_index("logto_organization_members_user", members.c.logto_user_id)
    _add_index("logto_user_identities_identity", user_identities.c.identity_id, **_ANY_LENGTH)
    _add_index("logto_user_roles_role", user_roles.c.role_id, user_roles.c.logto_user_id)
    _add_index("logto_organization_member_roles_user", member_roles.c.logto_user_id)
    queue = (jobs.c.handler, jobs.c.queue_key, jobs.c.order_at)
    is_waiting, is_done = (jobs.c.state == sa.literal_column(f"'{s}'") for s in ("waiting", "done"))
    _add_index("logto_jobs_waiting", *queue, jobs.c.id, where=is_waiting)
    _add_index("logto_jobs_done", *queue, where=is_done)
    odd = (jobs.c.handler, jobs.c.state, jobs.c.id)
    _add_index("logto_jobs_odd", *odd, where=has_not_succeeded)
    _add_index("logto_jobs_delivery", jobs.c.delivery_id, jobs.c.id)
    of_role = mapped_rows.c.record_id.is_not(None)
    of_record = (mapped_rows.c.record_id, mapped_rows.c.mapping)
    _add_index("logto_mapped_rows_record", *of_record, where=of_role)
    _add_index("logto_mapped_rows_row", mapped_rows.c.row_id, mapped_rows.c.mapping)
    _add_index(
        "logto_mapped_rows_blocked",
        mapped_rows.c.blocked_by,
        mapped_rows.c.mapping,
        where=is_unsettled,
    )
    # With the mapping first: only what lists these rows has the very words of the conditions.
    of_mapping = (mapped_rows.c.mapping, mapped_rows.c.logto_id)
    _add_index("logto_mapped_rows_unsettled", *of_mapping, where=is_unsettled)
    _add_index("logto_mapped_rows_owed", *of_mapping, where=is_owed)
    _add_index("logto_mapped_rows_excluded", mapped_rows.c.mapping, where=is_excluded)
    deleted_at = mapped_rows.c.deleted_at
    _add_index(
        "logto_mapped_rows_deleted",
        deleted_at,
        mapped_rows.c.mapping,
        where=deleted_at.is_not(None),
    )
    _add_index("logto_keys_webhook", keys.c.webhook_id)
    # What decides which of them to keep. In the table, it is behind the bodies.
    _add_index("logto_rejected_kept", *rejected.c["known", "id", "size", "received_at"])
    _add_index("logto_lines_due", queue_keys.c.handler, queue_keys.c.due_at)
    return metadata


# PostgreSQL's B-tree indexes refuse values of more than 2,700 bytes. SQLite's don't.
_ANY_LENGTH: dict[str, Any] = {"postgresql_using": "hash"}


def _add_index(
    name: str,
    *columns: sa.ColumnElement[Any],
    where: sa.ColumnElement[bool] | None = None,
    **options: Any,
) -> None:
    sa.Index(name, *columns, sqlite_where=where, postgresql_where=where, **options)
