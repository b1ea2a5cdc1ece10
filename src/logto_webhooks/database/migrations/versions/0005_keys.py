"""Keys of hooks, and what no key signed."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "logto_keys",
        sa.Column("fingerprint", sa.Text(), primary_key=True),
        sa.Column("hook", sa.Text()),
        sa.Column("key", sa.Text()),
        *(sa.Column(name, sa.BigInteger()) for name in ("learnt_at", "until", "last_used_at")),
    )
    op.create_table(
        "logto_rejected",
        sa.Column("id", Identity, primary_key=True, autoincrement=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("hook", sa.Text(), nullable=False),
        sa.Column("known", sa.Boolean(), nullable=False),
        sqlite_autoincrement=True,
    )
