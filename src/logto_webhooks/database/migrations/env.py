"""Alembic's environment: the connection and the schema come from `migrate.py`."""

from alembic import context

from logto_webhooks.database.schema import VERSION_TABLE, metadata_with_indexes

schema = context.config.attributes["schema"]
options = {
    "target_metadata": metadata_with_indexes(),
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
        # IF NOT EXISTS needs the right to create schemas even if the schema exists.
        context.execute(
            f"DO $$ BEGIN IF to_regnamespace('\"{schema}\"') IS NULL "
            f'THEN CREATE SCHEMA "{schema}"; END IF; END $$'
        )
        context.execute(f'SET LOCAL search_path TO "{schema}"')
    context.run_migrations()
