"""The tables of keys, and of what no key signed."""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks.adapters.stores.schema import Identity, Millis, metadata

# `key` only of what Logto told: what is configured is kept nowhere but by its fingerprint.
keys = sa.Table(
    "logto_keys",
    metadata,
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("hook", sa.Text),
    sa.Column("key", sa.Text),
    sa.Column("learnt_at", Millis),
    sa.Column("until", Millis),
    sa.Column("last_used_at", Millis),
)

rejected = sa.Table(
    "logto_rejected",
    metadata,
    sa.Column("id", Identity, primary_key=True, autoincrement=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("signature", sa.Text, nullable=False),
    sa.Column("received_at", Millis, nullable=False),
    sa.Column("hook", sa.Text, nullable=False),
    sa.Column("known", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)
