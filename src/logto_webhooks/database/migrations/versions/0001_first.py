"""All tables."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Uuid = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
Millis = sa.BigInteger()
Moment = sa.DateTime(timezone=True)
Text = sa.Text()
Json = sa.Text()
Document = sa.Text().with_variant(postgresql.JSONB(), "postgresql")
# PostgreSQL's hash indexes take values of any length. B-tree indexes refuse more than 2,700 bytes.
ANY_LENGTH = {"postgresql_using": "hash"}
FOLDED = {"sqlite": "{} COLLATE NOCASE", "postgresql": "lower({})"}
NOW = {
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
    "postgresql": "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)",
}


def upgrade() -> None:
    _deliveries()
    _records()
    _users()
    _organizations()
    _jobs()
    _mapped_rows()
    _signing_keys()
    _state()
    if op.get_context().dialect.name == "postgresql":
        _storage()


def _column(name: str, kind: object, nullable: bool = False) -> sa.Column:
    return sa.Column(name, kind, nullable=nullable)


def _optional(kind: object, *names: str) -> list[sa.Column]:
    return [sa.Column(name, kind, nullable=True) for name in names]


def _key(*names: str) -> list[sa.Column]:
    return [sa.Column(name, Text, primary_key=True) for name in names]


def _id() -> sa.Column:
    return sa.Column("id", Identity, primary_key=True, autoincrement=True)


def _number(name: str) -> sa.Column:
    return sa.Column(name, sa.Integer(), primary_key=True, autoincrement=False)


def _index(name: str, table: str, columns: list[str], where: str | None = None) -> None:
    condition = None if where is None else sa.text(where)
    op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)


def _deliveries() -> None:
    op.create_table(
        "logto_deliveries",
        _id(),
        _column("digest", sa.LargeBinary(24)),
        _column("body", sa.LargeBinary()),
        _column("event", Text),
        _column("subject", Text, nullable=True),
        _column("occurred_at", Millis),
        _column("received_at", Millis),
        _column("origin", Text),
        _column("state", Text),
        _column("result", Text, nullable=True),
        _column("attempts", sa.Integer()),
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0"),
        _column("last_error", Text, nullable=True),
        _column("due_at", Millis),
        _column("token", Text, nullable=True),
        sa.UniqueConstraint("digest"),
        sqlite_autoincrement=True,
    )
    due = ["due_at", "id", "received_at"]
    _index("logto_deliveries_due", "logto_deliveries", due, "state = 'pending'")
    _index("logto_deliveries_odd", "logto_deliveries", ["state"], "state IN ('dead', 'ignored')")


def _records() -> None:
    op.create_table(
        "logto_records",
        *_key("kind", "logto_id"),
        _column("local_id", Uuid),
        *_optional(Text, "organization_id", "user_id"),
        *(_column(name, Json) for name in ("data", "groups", "facts", "needs")),
        *_optional(Millis, "deleted_at", "read_at"),
        _column("doubtful", sa.Boolean()),
        sa.Column("announced", sa.Boolean(), nullable=False, server_default=sa.false()),
        *_optional(Millis, "refetch_since"),
        *_optional(Text, "waiting_reason"),
        *_optional(Millis, "gone_at", "absent_at", "stamp", "told_at", "told_end", "absent_since"),
    )
    for end in ("organization", "user"):
        columns = [f"{end}_id", "logto_id"]
        _index(f"logto_records_{end}", "logto_records", columns, f"{end}_id IS NOT NULL")
    waits = "refetch_since IS NOT NULL"
    by_time, by_kind = ["refetch_since", "kind", "logto_id"], ["kind", "refetch_since", "logto_id"]
    _index("logto_records_refetch", "logto_records", by_time, waits)
    _index("logto_records_refetch_kind", "logto_records", by_kind, waits)
    _index("logto_records_doubtful", "logto_records", ["kind"], "doubtful IS true")
    op.create_table(
        "logto_membership_steps",
        *_key("change", "kind", "logto_id"),
        *_optional(Millis, "ended_at"),
        *_optional(Text, "source"),
        *_optional(sa.BigInteger(), "delivery_id"),
        _column("noted_at", Millis),
    )
    in_order = ["change", "noted_at", "kind", "logto_id"]
    _index("logto_membership_steps_noted", "logto_membership_steps", in_order)


def _users() -> None:
    op.create_table(
        "logto_users",
        sa.Column("id", Uuid, primary_key=True),
        _column("logto_user_id", Text),
        *_optional(Text, "username", "email", "phone", "name", "avatar"),
        *(_column(name, Document) for name in ("profile", "identities", "custom_data")),
        _column("is_suspended", sa.Boolean()),
        *_optional(Moment, "last_sign_in_at", "created_at", "updated_at", "deleted_at"),
        sa.UniqueConstraint("logto_user_id"),
    )
    for name in ("username", "email", "phone"):
        op.create_index(f"logto_users_{name}", "logto_users", [name], **ANY_LENGTH)
    folded = sa.text(FOLDED[op.get_context().dialect.name].format("email"))
    op.create_index("logto_users_email_folded", "logto_users", [folded], **ANY_LENGTH)
    op.create_table(
        "logto_user_identities",
        *_key("logto_user_id", "target"),
        *_optional(Text, "identity_id"),
        *_optional(Document, "details"),
    )
    op.create_index(
        "logto_user_identities_identity", "logto_user_identities", ["identity_id"], **ANY_LENGTH
    )
    op.create_table(
        "logto_user_roles",
        *_key("logto_user_id", "role_id"),
        _column("name", Text),
        _column("read_at", Millis),
    )
    _index("logto_user_roles_role", "logto_user_roles", ["role_id", "logto_user_id"])


def _organizations() -> None:
    op.create_table(
        "logto_organizations",
        sa.Column("id", Uuid, primary_key=True),
        _column("logto_organization_id", Text),
        _column("name", Text),
        _column("description", Text, nullable=True),
        _column("custom_data", Document),
        *_optional(Moment, "created_at", "updated_at", "deleted_at"),
        sa.UniqueConstraint("logto_organization_id"),
    )
    members = "logto_organization_members"
    both = _key("logto_organization_id", "logto_user_id")
    op.create_table(members, *both, *_optional(Moment, "joined_at"))
    _index(f"{members}_user", members, ["logto_user_id"])
    roles = "logto_organization_member_roles"
    op.create_table(
        roles,
        *_key("logto_organization_id", "logto_user_id", "role_id"),
        _column("name", Text),
    )
    _index(f"{roles}_user", roles, ["logto_user_id"])


def _jobs() -> None:
    op.create_table(
        "logto_handlers",
        *_key("name", "definition"),
        _column("options", Json),
        *(_column(name, Millis) for name in ("registered_at", "seen_at")),
    )
    op.create_table(
        "logto_jobs",
        _id(),
        *(_column(name, Text) for name in ("handler", "key", "event", "subject", "queue_key")),
        _column("occurred_at", Millis),
        _column("order_at", sa.BigInteger()),
        _column("delivery_id", sa.BigInteger(), nullable=True),
        _column("payload", sa.LargeBinary(), nullable=True),
        _column("state", Text),
        *(_column(name, sa.Integer()) for name in ("attempts", "failures", "runs")),
        _column("finished_at", Millis, nullable=True),
        _column("error", Text, nullable=True),
        sa.UniqueConstraint("handler", "key", name="logto_jobs_once"),
        sqlite_autoincrement=True,
    )
    order = ["handler", "queue_key", "order_at"]
    _index("logto_jobs_waiting", "logto_jobs", [*order, "id"], "state = 'waiting'")
    _index("logto_jobs_done", "logto_jobs", order, "state = 'done'")
    odd = "state IN ('dead', 'discarded')"
    _index("logto_jobs_odd", "logto_jobs", ["handler", "state", "id"], odd)
    _index("logto_jobs_delivery", "logto_jobs", ["delivery_id", "id"])
    op.create_table(
        "logto_lines",
        _id(),
        _column("handler", Text),
        _column("queue_key", Text),
        _column("due_at", Millis),
        _column("held_until", Millis, nullable=True),
        _column("token", Text, nullable=True),
        sa.UniqueConstraint("handler", "queue_key", name="logto_lines_once"),
        sqlite_autoincrement=True,
    )
    _index("logto_lines_due", "logto_lines", ["handler", "due_at"])


def _mapped_rows() -> None:
    op.create_table(
        "logto_mappings",
        *_key("name"),
        _column("kind", Text),
        _column("definition", Text),
        _column("former", Json),
        _column("applied_to", Text, nullable=True),
        *(_column(name, Millis) for name in ("registered_at", "seen_at")),
    )
    table = "logto_mapped_rows"
    op.create_table(
        table,
        *_key("logto_id", "mapping"),
        *_optional(Text, "record_id", "row_id", "ends", "role"),
        _column("kind", Text),
        _column("state", Text),
        *_optional(Text, "reason", "blocked_by"),
        _column("changed_at", Millis),
        *_optional(Millis, "deleted_at"),
    )
    op.create_table("logto_former_rows", *_key("row_id", "mapping", "logto_id"))
    _index(f"{table}_record", table, ["record_id", "mapping"], "record_id IS NOT NULL")
    _index(f"{table}_row", table, ["row_id", "mapping"])
    _index(f"{table}_blocked", table, ["blocked_by", "mapping"], "state NOT IN ('ok', 'excluded')")
    in_order = ["mapping", "logto_id"]
    _index(f"{table}_unsettled", table, in_order, "state NOT IN ('ok', 'excluded')")
    _index(f"{table}_owed", table, in_order, "state = 'owed'")
    _index(f"{table}_excluded", table, ["mapping"], "state = 'excluded'")
    _index(f"{table}_deleted", table, ["deleted_at", "mapping"], "deleted_at IS NOT NULL")


def _signing_keys() -> None:
    op.create_table(
        "logto_keys",
        *_key("fingerprint"),
        *_optional(Text, "webhook_id", "key"),
        *_optional(Millis, "learnt_at", "until", "last_used_at"),
    )
    _index("logto_keys_webhook", "logto_keys", ["webhook_id"])
    op.create_table(
        "logto_rejected",
        _id(),
        _column("body", sa.LargeBinary()),
        _column("size", sa.Integer()),
        _column("signature", Text),
        _column("received_at", Millis),
        _column("hook", Text),
        _column("known", sa.Boolean()),
        sqlite_autoincrement=True,
    )
    kept = ["known", "id", "size", "received_at"]
    _index("logto_rejected_kept", "logto_rejected", kept)


def _state() -> None:
    op.create_table(
        "logto_checkpoints", *_key("name"), _column("at", Millis), _column("count", sa.BigInteger())
    )
    op.create_table(
        "logto_leases", *_key("name"), _column("holder", sa.BigInteger()), _column("until", Millis)
    )
    op.create_table(
        "logto_flow", _number("id"), *_optional(Millis, "began", "last", "silent_since")
    )
    op.create_table(
        "logto_flow_gaps", _number("place"), _column("ended_at", Millis), _column("length", Millis)
    )
    op.create_table(
        "logto_installation",
        _number("id"),
        *(_column(name, Millis) for name in ("installed_at", "clock_noted_at", "clock_moved_ms")),
    )
    # Older events run no handlers: an installation must not send mails for last week's sign-ups.
    context = op.get_context()
    schema = context.opts.get("version_table_schema")
    table = f'"{schema}".logto_installation' if schema else "logto_installation"
    now = NOW[context.dialect.name]
    op.execute(f"INSERT INTO {table} VALUES (1, {now}, 0, 0)")


def _storage() -> None:
    """Leave room in each page: an update that finds room there, and changes no indexed column,
    writes to no index. Vacuum tables that change often earlier than after a fifth of their rows."""
    vacuum = "autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02"
    for table, settings in {
        "logto_deliveries": vacuum,
        "logto_records": f"fillfactor = 80, {vacuum}",
        "logto_users": f"fillfactor = 85, {vacuum}",
        "logto_jobs": f"fillfactor = 70, {vacuum}",
        # A small table whose rows come and go: dead rows slow down every claim.
        "logto_lines": "fillfactor = 50, autovacuum_vacuum_scale_factor = 0,"
        " autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0",
    }.items():
        op.execute(f"ALTER TABLE {table} SET ({settings})")
