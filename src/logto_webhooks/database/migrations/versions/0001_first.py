"""The inbox, the records and the mirror."""

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
Json = sa.Text()
Document = sa.Text().with_variant(postgresql.JSONB(), "postgresql")


def _column(name: str, kind: object, nullable: bool = False) -> sa.Column:
    return sa.Column(name, kind, nullable=nullable)


def upgrade() -> None:
    _inbox()
    _records()
    _mirror()


def _inbox() -> None:
    op.create_table(
        "logto_deliveries",
        sa.Column("id", Identity, primary_key=True, autoincrement=True),
        _column("digest", sa.LargeBinary(24)),
        _column("body", sa.LargeBinary()),
        _column("event", sa.Text()),
        _column("subject", sa.Text(), nullable=True),
        _column("occurred_at", Millis),
        _column("received_at", Millis),
        _column("origin", sa.Text()),
        _column("state", sa.Text()),
        _column("result", sa.Text(), nullable=True),
        _column("attempts", sa.Integer()),
        _column("last_error", sa.Text(), nullable=True),
        _column("due_at", Millis),
        _column("token", sa.Text(), nullable=True),
        sa.UniqueConstraint("digest"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "logto_deliveries_due",
        "logto_deliveries",
        ["due_at", "id"],
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "logto_deliveries_odd",
        "logto_deliveries",
        ["state"],
        sqlite_where=sa.text("state IN ('dead', 'ignored')"),
        postgresql_where=sa.text("state IN ('dead', 'ignored')"),
    )


def _records() -> None:
    op.create_table(
        "logto_records",
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("logto_id", sa.Text(), primary_key=True),
        _column("local_id", Uuid),
        _column("organization_id", sa.Text(), nullable=True),
        _column("user_id", sa.Text(), nullable=True),
        _column("data", Json),
        _column("groups", Json),
        _column("facts", Json),
        _column("needs", Json),
        _column("deleted_at", Millis, nullable=True),
        _column("read_at", Millis, nullable=True),
        _column("doubtful", sa.Boolean()),
        _column("refetch_since", Millis, nullable=True),
        _column("waiting_reason", sa.Text(), nullable=True),
        sa.UniqueConstraint("local_id"),
    )
    op.create_index("logto_records_organization", "logto_records", ["organization_id"])
    op.create_index("logto_records_user", "logto_records", ["user_id"])
    op.create_index("logto_records_refetch", "logto_records", ["refetch_since"])


def _mirror() -> None:
    op.create_table(
        "logto_users",
        sa.Column("id", Uuid, primary_key=True),
        _column("logto_user_id", sa.Text()),
        *[
            _column(name, sa.Text(), nullable=True)
            for name in ("username", "email", "phone", "name", "avatar")
        ],
        *[_column(name, Document) for name in ("profile", "identities", "custom_data")],
        _column("is_suspended", sa.Boolean()),
        *[
            _column(name, Moment, nullable=True)
            for name in ("last_sign_in_at", "created_at", "updated_at", "deleted_at")
        ],
        sa.UniqueConstraint("logto_user_id"),
    )
    for name in ("username", "email", "phone"):
        op.create_index(f"logto_users_{name}", "logto_users", [name])
    op.create_table(
        "logto_organizations",
        sa.Column("id", Uuid, primary_key=True),
        _column("logto_organization_id", sa.Text()),
        _column("name", sa.Text()),
        _column("description", sa.Text(), nullable=True),
        _column("custom_data", Document),
        *[
            _column(name, Moment, nullable=True)
            for name in ("created_at", "updated_at", "deleted_at")
        ],
        sa.UniqueConstraint("logto_organization_id"),
    )
    op.create_table(
        "logto_organization_members",
        sa.Column("logto_organization_id", sa.Text(), primary_key=True),
        sa.Column("logto_user_id", sa.Text(), primary_key=True),
        _column("joined_at", Moment, nullable=True),
    )
    op.create_index(
        "logto_organization_members_user", "logto_organization_members", ["logto_user_id"]
    )
