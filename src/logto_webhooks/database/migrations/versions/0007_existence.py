"""Whether a record exists: what its deletions and its reads told, each at its newest.

Rows of before have none of these. Their `deleted_at` is read as the newest deletion.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("gone_at", "absent_at", "stamp", "told_at", "told_end"):
        op.add_column("logto_records", sa.Column(name, sa.BigInteger()))
