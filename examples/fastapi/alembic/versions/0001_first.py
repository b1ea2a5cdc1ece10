"""The first tables"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go on."""
    op.create_table(
        "workspaces",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("owner", sa.String(), nullable=False, unique=True),
        sa.Column("title", sa.String(), nullable=False),
    )
    op.create_table(
        "sign_ins",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("logto_user_id", sa.String(), nullable=False, index=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ip", sa.String()),
    )
    op.create_table(
        "greetings",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("logto_user_id", sa.String(), nullable=False, index=True),
        sa.Column("text", sa.String(), nullable=False),
    )
    op.create_table(
        "notes",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("author", sa.String(), nullable=False, index=True),
        sa.Column("text", sa.String(), nullable=False),
    )


def downgrade() -> None:
    """Go back."""
    for table in ("notes", "greetings", "sign_ins", "workspaces"):
        op.drop_table(table)
