"""`init` and `migrate`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from logto_webhooks import private_files
from logto_webhooks.cli.options import DATABASE, with_settings
from logto_webhooks.database import Database, database_for
from logto_webhooks.database.migrate import Migrated, head
from logto_webhooks.database.sqlite import SqliteFile
from logto_webhooks.errors import FileExists, NotWritable, SettingInvalid
from logto_webhooks.mapping.file import FILE_NAME
from logto_webhooks.mapping.own_tables import OwnTables
from logto_webhooks.mapping.propose import propose_map_file
from logto_webhooks.settings import Settings

_ENV: Final = """\
# Settings of logto-webhooks. Commands read this file from the current folder.
# Environment variables override it, and options override both.

# The webhook's signing key: in Logto's console, Webhooks > your webhook > Settings > Signing key.
# You can set several, separated by commas. During a rotation, put the new one first.
# To try it without Logto, with `logto-webhooks trigger`, use any text of 16 or more characters.
LOGTO_WEBHOOK_SIGNING_KEY=
# Secrets can also be in files: add _FILE to the variable's name. This works for the signing key,
# the database's URL and the secret of the machine-to-machine application.
#LOGTO_WEBHOOK_SIGNING_KEY_FILE=/run/secrets/logto-signing-key

# The database. If this isn't set, DATABASE_URL is used. A SQLite file is created, and migrated,
# when the service starts.
#LOGTO_WEBHOOKS_DATABASE_URL=sqlite:///logto-webhooks.db
# Or a PostgreSQL database, and a schema in it for the tables (run `logto-webhooks migrate` once).
#LOGTO_WEBHOOKS_DATABASE_URL=postgresql://user:password@127.0.0.1/name
#LOGTO_WEBHOOKS_SCHEMA=logto

# Whether `serve` also applies deliveries. If false, run `worker` as well.
#LOGTO_WEBHOOKS_WORKER=true

# The address on which the service listens. In Logto's console, set the webhook's endpoint URL to
# the service's public address with this path: https://your-host/api/webhooks/logto
#LOGTO_WEBHOOKS_HOST=127.0.0.1
#LOGTO_WEBHOOKS_PORT=8787
#LOGTO_WEBHOOKS_PATH=/api/webhooks/logto

# The largest request body, in bytes. Logto has sent bodies of 3.6 MB.
#LOGTO_WEBHOOKS_MAX_BODY_BYTES=8388608

# Attempts to apply a delivery before it is dead.
#LOGTO_WEBHOOKS_MAX_ATTEMPTS=8

# How long before its webhook a change may have happened, in milliseconds, if Logto doesn't send
# the time. Larger values mark more records as in doubt. Smaller values may miss some.
#LOGTO_WEBHOOKS_LAG_MS=100

# Run no handlers for deliveries that are older than this, in seconds: somebody may have recorded
# and replayed them. 0 disables the limit. It doesn't apply to deliveries from Logto's log.
#LOGTO_WEBHOOKS_REPLAY_WINDOW_S=604800

# Logto's Management API. With it, missed deliveries are recovered from Logto's own log.
# Create a machine-to-machine application in Logto's console, with the role "Logto Management API
# access". The endpoint is Logto's address.
#LOGTO_ENDPOINT=https://auth.example.com
#LOGTO_M2M_APP_ID=
#LOGTO_M2M_APP_SECRET=
# The API's resource indicator. Set it on Logto Cloud if you use a custom domain.
#LOGTO_WEBHOOKS_API_RESOURCE=https://your-tenant.logto.app/api
# Requests per second to the API. Logto Cloud allows 20.
#LOGTO_WEBHOOKS_API_BUDGET=15
# Seconds between two reads of Logto's log.
#LOGTO_WEBHOOKS_RECOVER_EVERY_S=300
# Seconds between two comparisons of all records with Logto. 0 disables them.
#LOGTO_WEBHOOKS_RECONCILE_EVERY_S=86400
# Seconds without a delivery before the silence alarm. If this isn't set, it is learned from usual
# traffic. 0 disables the alarm.
#LOGTO_WEBHOOKS_SILENCE_AFTER_S=3600
# The URL at which Logto reaches the webhook. Set it if no webhook has your signing key yet.
#LOGTO_WEBHOOKS_PUBLIC_URL=https://your-host/api/webhooks/logto
# A directory for deliveries that the database can't store in time. They are answered 200 and
# stored later. The directory must outlive the process.
#LOGTO_WEBHOOKS_SPOOL_DIR=/var/lib/logto-webhooks/spool

# Your LogtoWebhooks object with its handlers, as module:name.
#LOGTO_WEBHOOKS_APP=app.logto:logto

# The file with your mapped tables. By default, it is logto-webhooks.toml, if it exists.
#LOGTO_WEBHOOKS_MAP_FILE=logto-webhooks.toml

# The log's format (text or json) and level (debug, info, warning or error).
#LOGTO_WEBHOOKS_LOG_FORMAT=text
#LOGTO_WEBHOOKS_LOG_LEVEL=info
"""


@with_settings(*DATABASE)
def init(
    settings: Settings,
    file: Annotated[
        Path | None,
        Option(help=f"The file to write. Default: .env, or {FILE_NAME} with --map."),
    ] = None,
    map: Annotated[
        bool, Option("--map", help="Propose a file that maps the tables of your database.")
    ] = False,
) -> None:
    """Write an .env file that explains every setting.

    With --map, write a file that maps your own tables. An existing file is not changed.
    """
    if not map:
        path = file or Path(".env")
        _write(path, _ENV)
        print(f"Wrote {path}. Set your signing key in it, then run: logto-webhooks serve")
        return
    path = file or Path(FILE_NAME)
    if path.exists():
        raise FileExists(path=path)
    database = database_for(settings)
    if isinstance(database, SqliteFile) and not database.exists:
        problem = f"there is no file {database.name}; use the URL of your application's database"
        raise SettingInvalid(name=settings.name_of("database_url"), problem=problem)
    text, names = asyncio.run(_propose(database))
    _write(path, text)
    print(f"Wrote {path}, which maps {', '.join(names)}. Check it, then run: logto-webhooks serve")


def _write(path: Path, text: str) -> None:
    """Write a new file. Raises FileExists, NotWritable."""
    try:
        with os.fdopen(private_files.open_for_writing(path, new=True), "wb") as new:
            new.write(text.encode())
    except FileExistsError:
        raise FileExists(path=path) from None
    except OSError as error:
        raise NotWritable(path=path, problem=error.strerror) from None


async def _propose(database: Database) -> tuple[str, list[str]]:
    try:
        return await database.host.read(lambda store: propose_map_file(OwnTables(store.connection)))
    finally:
        await database.host.close()


@with_settings(*DATABASE)
def migrate(
    settings: Settings,
    sql: Annotated[
        bool, Option("--sql", help="Print the SQL statements instead of running them.")
    ] = False,
) -> None:
    """Migrate the database's schema to this release.

    On SQLite, `serve` also does this when it starts. The schema of a newer release is left alone.
    """
    database = database_for(settings)
    if sql:
        print(database.migration_sql(), end="")
        return
    migrated = asyncio.run(_migrate(database))
    if migrated.new_schema:
        print(f"Created the schema {settings.schema}.")
    place = f"{database.name}, schema {settings.schema}," if settings.schema else database.name
    print(f"{place} is at version {migrated.version}.")
    if migrated.is_newer:
        print(f"A newer release has migrated it. This release, at version {head()}, runs on it.")


async def _migrate(database: Database) -> Migrated:
    try:
        return await database.migrate()
    finally:
        await database.host.close()
