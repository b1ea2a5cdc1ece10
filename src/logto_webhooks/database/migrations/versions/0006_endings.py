"""Memberships that are ended step by step."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "logto_endings",
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("logto_id", sa.Text(), primary_key=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text()),
        sa.Column("delivery_id", sa.BigInteger()),
        sa.Column("noted_at", sa.BigInteger(), nullable=False),
    )
