"""`init` and `migrate`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from logto_webhooks import private_files
from logto_webhooks.cli import options
from logto_webhooks.database import Database, database_for
from logto_webhooks.database import migrate as migrations
from logto_webhooks.errors import FileExists, NotWritable

_ENV = """\
# Settings of logto-webhooks. Its commands read this file where they are run;
# a variable of the environment wins over it, an option over both.

# The hook's signing key: Logto's console, Webhooks > your webhook > Settings > Signing key.
# Several keys, separated by commas, are all accepted: during a rotation, put the new one first.
# To try it without Logto, with `logto-webhooks trigger`, any text of 16 characters or more will do.
LOGTO_WEBHOOK_SIGNING_KEY=
# A secret can also be the content of a file: add _FILE to the variable's name. It works for the
# signing key, the database's URL and the secret of the machine-to-machine application.
#LOGTO_WEBHOOK_SIGNING_KEY_FILE=/run/secrets/logto-signing-key

# Where the data is kept; DATABASE_URL serves, too. A SQLite file is made, and migrated, when the
# service starts.
#LOGTO_WEBHOOKS_DATABASE_URL=sqlite:///logto-webhooks.db
# Or a PostgreSQL server (run `logto-webhooks migrate` once), and a schema of its own in it.
#LOGTO_WEBHOOKS_DATABASE_URL=postgresql://user:password@127.0.0.1/name
#LOGTO_WEBHOOKS_SCHEMA=logto

# Whether `serve` applies what it receives; if not, `worker` must run beside it.
#LOGTO_WEBHOOKS_WORKER=true

# Where the service listens. In Logto's console, the endpoint's URL is this address as Logto
# reaches it, with the path: https://your-host/api/webhooks/logto
#LOGTO_WEBHOOKS_HOST=127.0.0.1
#LOGTO_WEBHOOKS_PORT=8787
#LOGTO_WEBHOOKS_PATH=/api/webhooks/logto

# The largest body that is accepted, in bytes. Bodies of 3.6 MB were seen.
#LOGTO_WEBHOOKS_MAX_BODY_BYTES=8388608

# How often a delivery that can't be applied is tried before it is dead.
#LOGTO_WEBHOOKS_MAX_ATTEMPTS=8

# How much older than its dispatch a change can be, in milliseconds, where Logto tells no time.
# Greater marks more records as doubtful, smaller misses some.
#LOGTO_WEBHOOKS_LAG_MS=100

# How old a delivery to the webhook may be, in seconds, and still run handlers; 0 is no limit.
# Somebody may send a signed delivery again. What Logto's log brings back isn't limited.
#LOGTO_WEBHOOKS_REPLAY_WINDOW_S=604800

# Logto's Management API: with it, what Logto sent and this service didn't get is brought back
# from Logto's own log. A machine-to-machine application of Logto's console with the role
# "Logto Management API access"; the endpoint is Logto's address.
#LOGTO_ENDPOINT=https://auth.example.com
#LOGTO_M2M_APP_ID=
#LOGTO_M2M_APP_SECRET=
# The API's identifier, where it can't be derived from the endpoint (Cloud with a domain of yours).
#LOGTO_WEBHOOKS_API_RESOURCE=https://your-tenant.logto.app/api
# How many requests a second Logto gets; Cloud allows 20.
#LOGTO_WEBHOOKS_API_BUDGET=15
# How often, in seconds, its log is asked.
#LOGTO_WEBHOOKS_RECOVER_EVERY_S=300
# How often, in seconds, all records are compared with Logto's own; 0 is never.
#LOGTO_WEBHOOKS_RECONCILE_EVERY_S=86400
# How long nothing may come, in seconds, before that is an alarm; learnt from what is usual if
# unset, 0 is for ever.
#LOGTO_WEBHOOKS_SILENCE_AFTER_S=3600
# Where Logto reaches the webhook, if its key and its deliveries aren't known here yet.
#LOGTO_WEBHOOKS_PUBLIC_URL=https://your-host/api/webhooks/logto
# A directory for deliveries that the database doesn't take in time: they are answered 200, and
# stored once it does. It must outlive the process.
#LOGTO_WEBHOOKS_SPOOL_DIR=/var/lib/logto-webhooks/spool

# Where your handlers are, as module:name of a LogtoWebhooks.
#LOGTO_WEBHOOKS_APP=app.logto:logto

# text or json; debug, info, warning or error.
#LOGTO_WEBHOOKS_LOG_FORMAT=text
#LOGTO_WEBHOOKS_LOG_LEVEL=info
"""


def init(
    file: Annotated[Path, typer.Option(help="The file to write.")] = Path(".env"),
) -> None:
    """Write an .env with every setting explained.

    One that exists is left as it is.
    """
    try:
        with os.fdopen(private_files.open_for_writing(file, new=True), "wb") as new:
            new.write(_ENV.encode())
    except FileExistsError:
        raise FileExists(path=file) from None
    except OSError as error:
        raise NotWritable(path=file, problem=error.strerror) from None
    print(f"Wrote {file}. Put the signing key into it, then run: logto-webhooks serve")


def migrate(
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements instead of running them.")
    ] = False,
) -> None:
    """Bring the database's schema up to this release.

    On SQLite, `serve` does it by itself.
    """
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    database = database_for(settings)
    if sql:
        print(database.migration_sql(), end="")
        return
    asyncio.run(_migrate(database))
    print(f"{database.name} is at schema {migrations.head()}.")


async def _migrate(database: Database) -> None:
    try:
        await database.migrate()
    finally:
        await database.host.close()
