"""Indexes that take values of any length: a hash on PostgreSQL. SQLite's take them as they are."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_INDEXES = {
    "logto_users_username": ("logto_users", "username"),
    "logto_users_email": ("logto_users", "email"),
    "logto_users_phone": ("logto_users", "phone"),
    "logto_user_identities_identity": ("logto_user_identities", "identity_id"),
}


def upgrade() -> None:
    for name, (table, column) in _INDEXES.items():
        op.drop_index(name, table)
        op.create_index(name, table, [column], postgresql_using="hash")
