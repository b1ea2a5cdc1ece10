"""How often applying a delivery failed: claims that ended for another reason aren't failures."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.Column("failures", sa.Integer(), nullable=False, server_default="0")
    op.add_column("logto_deliveries", column)
