"""Alembic's environment: the connection and the schema come from `migrate.py`."""

import sqlalchemy as sa
from alembic import context

from logto_webhooks.adapters.stores.schema import VERSION_TABLE, metadata

schema = context.config.attributes["schema"]
options = {
    "target_metadata": metadata,
    "version_table": VERSION_TABLE,
    "version_table_schema": schema,
}

if context.is_offline_mode():
    url = context.config.get_main_option("sqlalchemy.url")
    context.configure(url=url, literal_binds=True, **options)
else:
    context.configure(connection=context.config.attributes["connection"], **options)

with context.begin_transaction():
    if schema:
        name = sa.sql.quoted_name(schema, quote=True)
        context.execute(sa.schema.CreateSchema(name, if_not_exists=True))
        context.execute(f'SET LOCAL search_path TO "{schema}"')
    context.run_migrations()
