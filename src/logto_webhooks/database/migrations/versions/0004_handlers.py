"""Handlers, their jobs, and the lines in which those wait; and since when this is installed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NOW = {
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
    "postgresql": "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)",
}


def _column(name: str, kind: object, nullable: bool = False) -> sa.Column:
    return sa.Column(name, kind, nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "logto_handlers",
        sa.Column("name", sa.Text(), primary_key=True),
        _column("options", sa.Text()),
        _column("registered_at", sa.BigInteger()),
    )
    op.create_table(
        "logto_jobs",
        sa.Column("id", Identity, primary_key=True, autoincrement=True),
        *(_column(name, sa.Text()) for name in ("handler", "key", "event", "subject", "line")),
        _column("occurred_at", sa.BigInteger()),
        _column("delivery_id", sa.BigInteger(), nullable=True),
        _column("payload", sa.LargeBinary(), nullable=True),
        _column("state", sa.Text()),
        *(_column(name, sa.Integer()) for name in ("attempts", "failures", "runs")),
        _column("finished_at", sa.BigInteger(), nullable=True),
        _column("error", sa.Text(), nullable=True),
        sa.UniqueConstraint("handler", "key", name="logto_jobs_once"),
        sqlite_autoincrement=True,
    )
    op.create_index("logto_jobs_line", "logto_jobs", ["handler", "line", "state", "occurred_at"])
    op.create_index("logto_jobs_delivery", "logto_jobs", ["delivery_id"])
    op.create_table(
        "logto_lines",
        sa.Column("id", Identity, primary_key=True, autoincrement=True),
        _column("handler", sa.Text()),
        _column("line", sa.Text()),
        _column("due_at", sa.BigInteger()),
        _column("token", sa.Text(), nullable=True),
        sa.UniqueConstraint("handler", "line", name="logto_lines_once"),
        sqlite_autoincrement=True,
    )
    op.create_index("logto_lines_due", "logto_lines", ["handler", "due_at"])
    _note_since_when()


def _note_since_when() -> None:
    """What is older runs no handlers: installing must not mail last week's sign-ups."""
    context = op.get_context()
    schema = context.opts.get("version_table_schema")
    table = f'"{schema}".logto_progress' if schema else "logto_progress"
    now = _NOW[context.dialect.name]
    op.execute(f"INSERT INTO {table} (name, at, count) VALUES ('installed', {now}, 0)")
