"""The tables. The mirror's are for the application to read; inbox and records are private."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from logto_webhooks import canonical_json
from logto_webhooks.events.base import to_millis
from logto_webhooks.records.projection import without_nul

VERSION_TABLE = "logto_schema_version"

metadata = sa.MetaData()


class Json(sa.types.TypeDecorator[Any]):
    """JSON through the product's one parser, kept as text."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        """Encode."""
        return None if value is None else canonical_json.encode(value).decode()

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        """Decode."""
        return None if value is None else canonical_json.decode(value.encode())


class Document(Json):
    """JSON for applications to query: JSONB on PostgreSQL, which holds no NUL; text elsewhere."""

    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose by the database."""
        if dialect.name != "postgresql":
            return dialect.type_descriptor(sa.Text())
        from sqlalchemy.dialects.postgresql import JSONB  # which takes long to import

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
    """Milliseconds since the epoch here, a timestamp with time zone (UTC) in the table.

    On SQLite it is the text that SQLAlchemy's DateTime writes, without its detour.
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
        """Make milliseconds; SQLite's timestamps have no zone."""
        if value is None:
            return None
        return to_millis(datetime.fromisoformat(value) if isinstance(value, str) else value)


Millis = sa.BigInteger
# With its dashes as text, where a database has no type for it.
Uuid = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
Identity = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts INTEGER keys only

deliveries = sa.Table(
    "logto_deliveries",
    metadata,
    sa.Column("id", Identity, primary_key=True, autoincrement=True),
    sa.Column("digest", sa.LargeBinary(24), nullable=False, unique=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("subject", sa.Text),
    sa.Column("occurred_at", Millis, nullable=False),
    sa.Column("received_at", Millis, nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("last_error", sa.Text),
    sa.Column("due_at", Millis, nullable=False),  # a lease is a later due time
    sa.Column("token", sa.Text),
    sqlite_autoincrement=True,
)
# Spelt out, not a parameter: only so can a planner prove that the partial index serves.
is_pending = deliveries.c.state == sa.literal_column("'pending'")
sa.Index(
    "logto_deliveries_due",
    deliveries.c.due_at,
    deliveries.c.id,
    sqlite_where=is_pending,
    postgresql_where=is_pending,
)
# Few rows are neither done nor pending.
is_odd = deliveries.c.state.in_([sa.literal_column("'dead'"), sa.literal_column("'ignored'")])
sa.Index("logto_deliveries_odd", deliveries.c.state, sqlite_where=is_odd, postgresql_where=is_odd)

records = sa.Table(
    "logto_records",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("logto_id", sa.Text, primary_key=True),
    sa.Column("local_id", Uuid, nullable=False),
    sa.Column("organization_id", sa.Text),  # of a membership
    sa.Column("user_id", sa.Text),  # of a membership
    sa.Column("data", Json, nullable=False),
    sa.Column("groups", Json, nullable=False),
    sa.Column("facts", Json, nullable=False),
    sa.Column("needs", Json, nullable=False),
    sa.Column("deleted_at", Millis),
    sa.Column("read_at", Millis),
    sa.Column("doubtful", sa.Boolean, nullable=False),
    sa.Column("refetch_since", Millis),
    sa.Column("waiting_reason", sa.Text),
    # Whether it exists follows from these (`Record`); null where nothing told.
    sa.Column("gone_at", Millis),
    sa.Column("absent_at", Millis),
    sa.Column("stamp", Millis),
    sa.Column("told_at", Millis),
    sa.Column("told_end", Millis),
)
for _name, _column in (
    ("organization", records.c.organization_id),
    ("user", records.c.user_id),
    ("refetch", records.c.refetch_since),
):
    _is_there = _column.is_not(None)
    sa.Index(f"logto_records_{_name}", _column, sqlite_where=_is_there, postgresql_where=_is_there)

users = sa.Table(
    "logto_users",
    metadata,
    sa.Column("id", Uuid, primary_key=True),
    sa.Column("logto_user_id", sa.Text, nullable=False, unique=True),
    sa.Column("username", sa.Text),
    sa.Column("email", sa.Text),
    sa.Column("phone", sa.Text),
    sa.Column("name", sa.Text),
    sa.Column("avatar", sa.Text),
    sa.Column("profile", Document, nullable=False),
    sa.Column("identities", Document, nullable=False),
    sa.Column("custom_data", Document, nullable=False),
    sa.Column("is_suspended", sa.Boolean, nullable=False),
    sa.Column("last_sign_in_at", Moment),
    sa.Column("created_at", Moment),
    sa.Column("updated_at", Moment),
    sa.Column("deleted_at", Moment),
)
# Of any length: PostgreSQL's other indexes refuse values of more than 2,700 bytes. SQLite's don't.
_ANY_LENGTH: dict[str, Any] = {"postgresql_using": "hash"}
for _column in (users.c.username, users.c.email, users.c.phone):
    sa.Index(f"logto_users_{_column.name}", _column, **_ANY_LENGTH)

organizations = sa.Table(
    "logto_organizations",
    metadata,
    sa.Column("id", Uuid, primary_key=True),
    sa.Column("logto_organization_id", sa.Text, nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("custom_data", Document, nullable=False),
    sa.Column("created_at", Moment),
    sa.Column("updated_at", Moment),
    sa.Column("deleted_at", Moment),
)

# No foreign keys: memberships come before their users.
members = sa.Table(
    "logto_organization_members",
    metadata,
    sa.Column("logto_organization_id", sa.Text, primary_key=True),
    sa.Column("logto_user_id", sa.Text, primary_key=True),
    sa.Column("joined_at", Moment),
)
sa.Index("logto_organization_members_user", members.c.logto_user_id)

user_identities = sa.Table(
    "logto_user_identities",
    metadata,
    sa.Column("logto_user_id", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("identity_id", sa.Text),
    sa.Column("details", Document),
)
sa.Index("logto_user_identities_identity", user_identities.c.identity_id, **_ANY_LENGTH)

user_roles = sa.Table(
    "logto_user_roles",
    metadata,
    sa.Column("logto_user_id", sa.Text, primary_key=True),
    sa.Column("role_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("read_at", Millis, nullable=False),
)
sa.Index("logto_user_roles_role", user_roles.c.role_id, user_roles.c.logto_user_id)

member_roles = sa.Table(
    "logto_organization_member_roles",
    metadata,
    sa.Column("logto_organization_id", sa.Text, primary_key=True),
    sa.Column("logto_user_id", sa.Text, primary_key=True),
    sa.Column("role_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
)
sa.Index("logto_organization_member_roles_user", member_roles.c.logto_user_id)

# Who was deleted and has memberships that are still to be ended.
endings = sa.Table(
    "logto_endings",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("logto_id", sa.Text, primary_key=True),
    sa.Column("ended_at", Millis, nullable=False),
    sa.Column("source", sa.Text),
    sa.Column("delivery_id", sa.BigInteger),
    sa.Column("noted_at", Millis, nullable=False),
)

handlers = sa.Table(
    "logto_handlers",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("options", Json, nullable=False),
    sa.Column("registered_at", Millis, nullable=False),
)

jobs = sa.Table(
    "logto_jobs",
    metadata,
    sa.Column("id", Identity, primary_key=True, autoincrement=True),
    sa.Column("handler", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("queue_key", sa.Text, nullable=False),
    sa.Column("occurred_at", Millis, nullable=False),
    sa.Column("delivery_id", sa.BigInteger),
    sa.Column("payload", sa.LargeBinary),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("runs", sa.Integer, nullable=False),
    sa.Column("finished_at", Millis),
    sa.Column("error", sa.Text),
    sa.UniqueConstraint("handler", "key", name="logto_jobs_once"),
    sqlite_autoincrement=True,
)
for _state, _of_state in (("waiting", ["occurred_at", "id"]), ("done", ["occurred_at"])):
    _is_in_state = jobs.c.state == sa.literal_column(f"'{_state}'")
    sa.Index(
        f"logto_jobs_{_state}",
        *(jobs.c[name] for name in ("handler", "queue_key", *_of_state)),
        sqlite_where=_is_in_state,
        postgresql_where=_is_in_state,
    )
sa.Index("logto_jobs_delivery", jobs.c.delivery_id)

# One row for each queue in which jobs wait: who holds it runs its first job.
queue_keys = sa.Table(
    "logto_lines",  # the name of the table of queue keys is older than the term
    metadata,
    sa.Column("id", Identity, primary_key=True, autoincrement=True),
    sa.Column("handler", sa.Text, nullable=False),
    sa.Column("queue_key", sa.Text, nullable=False),
    sa.Column("due_at", Millis, nullable=False),
    # In no index, so that to hold a row and to let it go writes into none.
    sa.Column("held_until", Millis),
    sa.Column("token", sa.Text),
    sa.UniqueConstraint("handler", "queue_key", name="logto_lines_once"),
    sqlite_autoincrement=True,
)
sa.Index("logto_lines_due", queue_keys.c.handler, queue_keys.c.due_at)


# How far recovering and reconciling have come.
checkpoints = sa.Table(
    "logto_checkpoints",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("at", Millis, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
)

# What only one process does at a time.
leases = sa.Table(
    "logto_leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.BigInteger, nullable=False),
    sa.Column("until", Millis, nullable=False),
)

# One row: since when deliveries come, and whether they still do.
flow = sa.Table(
    "logto_flow",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("began", Millis),
    sa.Column("last", Millis),
    sa.Column("silent_since", Millis),
)

# One row for each of the last days: the longest time without a delivery that ended then.
flow_gaps = sa.Table(
    "logto_flow_gaps",
    metadata,
    sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ended_at", Millis, nullable=False),
    sa.Column("length", Millis, nullable=False),
)

# One row: since when this is installed, and what the database's clock said.
installation = sa.Table(
    "logto_installation",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("installed_at", Millis, nullable=False),
    sa.Column("clock_noted_at", Millis, nullable=False),
    sa.Column("clock_moved_ms", Millis, nullable=False),
)


# `key` only of what Logto told: what is configured is kept nowhere but by its fingerprint.
keys = sa.Table(
    "logto_keys",
    metadata,
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("hook", sa.Text),
    sa.Column("key", sa.Text),
    sa.Column("learnt_at", Millis),
    sa.Column("until", Millis),
    sa.Column("last_used_at", Millis),
)

rejected = sa.Table(
    "logto_rejected",
    metadata,
    sa.Column("id", Identity, primary_key=True, autoincrement=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("signature", sa.Text, nullable=False),
    sa.Column("received_at", Millis, nullable=False),
    sa.Column("hook", sa.Text, nullable=False),
    sa.Column("known", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)
