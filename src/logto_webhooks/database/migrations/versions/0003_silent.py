"""What changes in Logto without a webhook: identities, users' roles, members' roles."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Document = sa.Text().with_variant(postgresql.JSONB(), "postgresql")


def _key(name: str) -> sa.Column:
    return sa.Column(name, sa.Text(), primary_key=True)


def upgrade() -> None:
    op.create_table(
        "logto_user_identities",
        _key("logto_user_id"),
        _key("target"),
        sa.Column("identity_id", sa.Text()),
        sa.Column("details", Document),
    )
    op.create_index(
        "logto_user_identities_identity", "logto_user_identities", ["target", "identity_id"]
    )
    op.create_table(
        "logto_user_roles",
        _key("logto_user_id"),
        _key("role_id"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("read_at", sa.BigInteger(), nullable=False),
    )
    op.create_index("logto_user_roles_role", "logto_user_roles", ["role_id", "logto_user_id"])
    op.create_table(
        "logto_organization_member_roles",
        _key("logto_organization_id"),
        _key("logto_user_id"),
        _key("role_id"),
        sa.Column("name", sa.Text(), nullable=False),
    )
    op.create_index(
        "logto_organization_member_roles_user",
        "logto_organization_member_roles",
        ["logto_user_id"],
    )
