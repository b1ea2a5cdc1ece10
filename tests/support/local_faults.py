"""Faults on this side, each put into a healthy system, and what must be found."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2
import sqlalchemy as sa
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.database.mapped_rows import NOT_WRITTEN
from logto_webhooks.database.store import RecordedFlow, Store
from logto_webhooks.doctor.faults import Finding
from logto_webhooks.ingest.spool import SpoolDirectory
from logto_webhooks.jobs import NewJob, RegisteredHandler
from logto_webhooks.mapping.file import parse_map_file
from logto_webhooks.signing_keys import fingerprint
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.healthy_system import OTHER_KEY, Clinic, answering, ills
from tests.support.own_tables import Team
from tests.support.stores import Copy, delivery
from tests.support.waiting import eventually

T = TypeVar("T")
HERE, finds = ills()
_ALONE = {"endpoint": None, "app_id": None, "app_secret": None}
_LONG_AGO = "1000000000000"


@finds("check_failed")
async def a_check_that_takes_too_long(clinic: Clinic) -> list[Finding]:
    async with answering(204, after_s=1) as url:
        endpoint = url.rpartition("/api/")[0]
        return await clinic.ask("api", endpoint=endpoint, timeout_s=0.1)


@finds("key_missing")
async def no_key(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(signing_key="")


@finds("key_unusable")
async def a_key_with_odd_characters(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(signing_key=f"{clinic.logto.signing_key},{OTHER_KEY}\x07")


@finds("key_unusable")
async def a_key_with_quotes(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(signing_key=f"{clinic.logto.signing_key},'{OTHER_KEY}'")


@finds("key_short")
async def a_key_to_be_guessed(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(signing_key=f"{clinic.logto.signing_key},secret")


@finds("key_unproven")
async def a_key_that_nothing_came_with(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(**_ALONE, **await clinic.another(), public_url=clinic.url)


@finds("key_doubted", "rejected")
async def a_key_that_nothing_of_what_came_was_signed_with(clinic: Clinic) -> list[Finding]:
    aside = "INSERT INTO logto_rejected (body, signature, received_at, hook, known, size) VALUES "
    row = f"('{{}}', 'x', {round(time.time() * 1000)}, 'hook', 0, 2)"
    another = await clinic.another(f"{aside}{row}")
    return await clinic.ask(**_ALONE, **another, public_url=clinic.url)


@finds("key_not_told")
async def a_webhook_whose_key_is_empty(clinic: Clinic) -> list[Finding]:
    with clinic.changed(signingKey=""):
        return await clinic.ask(public_url=clinic.url)


@finds("key_differs")
async def a_key_of_another_webhook(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(signing_key=OTHER_KEY)


@finds("key_ended", "key_unproven")
async def a_key_that_a_rotation_ended(clinic: Clinic) -> list[Finding]:
    key = clinic.logto.signing_key
    ended = (
        "INSERT INTO logto_keys (fingerprint, webhook_id, key, learnt_at, until)"
        f" VALUES ('{fingerprint(key)}', 'hook', '{key}', 1, 2)"
    )
    another = await clinic.another(ended)
    return await clinic.ask(**_ALONE, **another, public_url=clinic.url)


@finds("key_outdated", "log_signature", stays=True)
async def a_key_that_was_changed_at_logto(clinic: Clinic) -> list[Finding]:
    clinic.logto.rotate_signing_key(clinic.webhook)
    clinic.logto.create_user()
    await clinic.logto.settle()
    await eventually(clinic.app.status, lambda found: found.deliveries["done"] == 2)
    return await clinic.ask()


@finds("database_setting")
async def a_database_of_an_odd_kind(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(database_url="mysql://127.0.0.1/logto")


@finds("database_unusable")
async def a_server_that_is_down(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(database_url="postgresql://someone:hush@127.0.0.1:9/logto")


@finds("database_unusable")
async def a_file_that_is_not_there(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(database_url=f"sqlite:///{clinic.folder / 'none.db'}")


@finds("schema_missing")
async def a_database_without_tables(clinic: Clinic) -> list[Finding]:
    clinic.sql("CREATE TABLE theirs (id INTEGER)", "empty.db")
    (clinic.folder / "empty.db").chmod(0o600)
    return await clinic.ask(database_url=f"sqlite:///{clinic.folder / 'empty.db'}")


@finds("schema_old")
async def tables_of_an_older_release(clinic: Clinic) -> list[Finding]:
    older = "UPDATE logto_schema_version SET version_num = '0000'"
    return await clinic.ask(**await clinic.another(older))


@finds("schema_newer", stays=True)
async def tables_of_a_newer_release(clinic: Clinic) -> list[Finding]:
    clinic.sql("UPDATE logto_schema_version SET version_num = '9999'")
    return await clinic.ask()


@finds("schema_unknown")
async def tables_of_no_release(clinic: Clinic) -> list[Finding]:
    theirs = "UPDATE logto_schema_version SET version_num = 'abc'"
    return await clinic.ask(**await clinic.another(theirs))


@finds("not_durable")
async def a_server_that_commits_without_the_disk(clinic: Clinic) -> list[Finding]:
    return await _on_postgres(clinic, "-c synchronous_commit=off")


@finds("vacuum_off")
async def a_table_that_nobody_vacuums(clinic: Clinic) -> list[Finding]:
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url)
    table = f"{schema}.logto_checkpoints"
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {table} SET (autovacuum_enabled = off)"))
            rows = f"INSERT INTO {table} SELECT n::text, 0, 0 FROM generate_series(1, 10001) n"
            connection.execute(sa.text(rows))
            connection.execute(sa.text(f"DELETE FROM {table}"))
        engine.dispose()  # a session tells its counts at its end
        return await clinic.ask("vacuum", engine=engine, schema=schema)
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {table} RESET (autovacuum_enabled)"))
        engine.dispose()


@finds("database_read_only")
async def a_server_that_takes_no_writes(clinic: Clinic) -> list[Finding]:
    return await _on_postgres(clinic, "-c default_transaction_read_only=on")


@finds("database_unwritable")
async def a_file_that_somebody_holds(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    holder = sa.create_engine(another["database_url"])
    with holder.begin() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        found = await clinic.ask("durability", **another)
    holder.dispose()
    return found


@finds("database_unwritable")
async def a_table_that_takes_no_delivery(clinic: Clinic) -> list[Finding]:
    another = await clinic.another(
        "CREATE TRIGGER audit BEFORE INSERT ON logto_deliveries"
        " BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    return await clinic.ask("durability", **another)


@finds("files_open")
async def a_file_that_everybody_can_read(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    (clinic.folder / another["database_url"].rpartition("/")[2]).chmod(0o644)
    return await clinic.ask("files", **another)


@finds("disk_low")
async def a_disk_that_fills(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("disk", least_free_mb=await _free_mb(clinic) * 2)


@finds("disk_full")
async def a_disk_that_is_full(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("disk", least_free_mb=await _free_mb(clinic) * 100)


@finds("pending_old")
async def nobody_who_applies(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    await _run(another, lambda store: store.add([delivery(make.user_created().body, 1)]))
    return await clinic.ask("inbox", **another)


@finds("spool_open")
async def a_spool_directory_for_everybody(clinic: Clinic) -> list[Finding]:
    spool = clinic.folder / "open spool"
    spool.mkdir(exist_ok=True)
    spool.chmod(0o777)
    return await clinic.ask("spool", spool_dir=str(spool))


@finds("spool_waiting")
async def a_delivery_that_nobody_takes_from_the_spool(clinic: Clinic) -> list[Finding]:
    spool = clinic.folder / "spool"
    spool.mkdir(mode=0o700, exist_ok=True)
    SpoolDirectory(spool).write([delivery(make.user_created().body)])
    return await clinic.ask("spool", spool_dir=str(spool))


@finds("silent")
async def a_flow_that_stopped(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    await _run(another, lambda store: store.save_flow(RecordedFlow(silent_since=1)))
    return await clinic.ask("inbox", **another)


@finds("deliveries_dead")
async def a_delivery_that_can_not_be_applied(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    application = _application(another)
    await Copy(application.database.host).take([make.user_created(id="a", username=7).body])
    await application.close()
    return await clinic.ask("inbox", **another)


@finds("jobs_dead", stays=True)
async def a_handler_that_raises(clinic: Clinic) -> list[Finding]:
    clinic.logto.create_user(username="bad")
    await clinic.logto.settle()
    await eventually(clinic.app.jobs, lambda jobs: "dead" in {each.state for each in jobs})
    return await clinic.ask()


@finds("handlers_unregistered", stays=True)
async def a_handler_that_was_forgotten_while_it_runs(clinic: Clinic) -> list[Finding]:
    [handler, *_] = clinic.app.handlers
    await clinic.app.forget_handler(handler.name)
    return await clinic.ask()


@finds("jobs_without_code", stays=True)
async def a_handler_whose_code_is_gone(clinic: Clinic) -> list[Finding]:
    await clinic.app.database.host.run(lambda store: _new_job(store, "gone"))
    return await clinic.ask()


@finds("jobs_waiting")
async def jobs_that_nobody_runs(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    await _run(another, lambda store: _new_job(store, "greet"))
    return await clinic.ask("jobs", **another)


@finds("records_waiting")
async def a_record_that_nobody_asks_about(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("records", **await _with_a_part(clinic))


@finds("records_unsettled")
async def a_record_that_nobody_can_ask_about(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("records", **await _with_a_part(clinic), **_ALONE)


@finds("mapping_conflicts")
async def rows_that_were_refused(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("mappings", **await _with_a_mapped_row(clinic, "conflict"))


@finds("mapping_owed")
async def rows_that_nobody_writes(clinic: Clinic) -> list[Finding]:
    another = await _with_a_mapped_row(clinic, "owed", NOT_WRITTEN)
    return await clinic.ask("mappings", **another)


@finds("mapping_blocked")
async def rows_that_cannot_be_written(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("mappings", **await _with_a_mapped_row(clinic, "owed"))


@finds("mapping_not_migrated")
async def a_mapped_column_that_does_not_exist(clinic: Clinic) -> list[Finding]:
    another = await _with_a_mapped_row(clinic, "owed")
    file = another["database_url"].rpartition("/")[2]
    clinic.sql("CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT)", file)
    return await _ask_who_maps_people(clinic, another)


@finds("mapping_incomplete")
async def a_mapping_of_members_without_their_teams(clinic: Clinic) -> list[Finding]:
    another = await clinic.another(
        "CREATE TABLE members (team_id INTEGER, user_id TEXT, PRIMARY KEY (team_id, user_id))"
    )
    theirs = _application(clinic.settings | another)
    teams = sa.Table("teams", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    members = sa.Table(
        "members",
        teams.metadata,
        sa.Column("team_id", sa.ForeignKey(teams.c.id), primary_key=True),
        sa.Column("user_id", sa.Text, primary_key=True),
    )
    theirs.map_members(members, organization="team_id", user="user_id")
    found = await clinic.ask("mappings", application=theirs, **another)
    await theirs.close()
    return found


@finds("mapping_file_invalid")
async def a_file_that_names_a_table_that_does_not_exist(clinic: Clinic) -> list[Finding]:
    section = 'table = "people"\nkey = "logto_id"\nwhen_deleted = "keep"'
    file = parse_map_file("logto-webhooks.toml", f"[map.users]\n{section}")
    return await clinic.ask("mappings", read_map_file=lambda: file, **await clinic.another())


@finds("mapping_deletions_held")
async def deletions_that_are_held(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("mappings", **await _with_a_mapped_row(clinic, "held"))


@finds("mapping_excludes_all")
async def a_condition_that_no_user_meets(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    application = _application(clinic.settings | another)
    await Copy(application.database.host).take([make.user_created(id="ana").body])
    await application.close()
    for statement in _add_mapped_row("excluded", "where"):
        clinic.sql(statement, another["database_url"].rpartition("/")[2])
    return await clinic.ask("mappings", **another)


@finds("mapping_cascades")
async def a_foreign_key_that_deletes_too_much(clinic: Clinic) -> list[Finding]:
    another = await clinic.another(
        "CREATE TABLE people (id INTEGER PRIMARY KEY, logto_id TEXT UNIQUE,"
        " boss INTEGER REFERENCES people ON DELETE CASCADE)"
    )
    engine = sa.create_engine(another["database_url"])
    sa.event.listen(engine, "connect", lambda own, _: own.execute("PRAGMA foreign_keys = ON"))
    theirs = LogtoWebhooks(signing_key=OTHER_KEY, engine=engine)
    found = await _ask_who_maps_people(clinic, another, theirs)
    engine.dispose()
    return found


@finds("mapping_key_without_index")
async def a_key_without_an_index(clinic: Clinic) -> list[Finding]:
    another = await clinic.another("CREATE TABLE people (id INTEGER PRIMARY KEY, logto_id TEXT)")
    return await _ask_who_maps_people(clinic, another)


@finds("rejected", stays=True)
async def a_delivery_that_another_key_signed(clinic: Clinic) -> list[Finding]:
    forged = make.user_created(hookId=clinic.webhook, key=OTHER_KEY)
    async with httpx2.AsyncClient() as client:
        answer = await client.post(clinic.url, content=forged.body, headers=forged.headers)
    assert answer.status_code == 401

    async def aside() -> int:
        return await clinic.app.database.host.read(
            lambda store: store.webhook_keys.count_rejected()
        )

    await eventually(aside)
    return await clinic.ask()


@finds("application_database")
async def an_application_with_another_database(clinic: Clinic) -> list[Finding]:
    theirs = _application(clinic.settings | await clinic.another())
    return await clinic.ask(application=theirs)


@finds("application_handler")
async def an_application_with_a_handler_that_cannot_be_called(clinic: Clinic) -> list[Finding]:
    theirs = _application(clinic.settings)

    @theirs.on("User.Created")
    def hear(event: events.UserCreated, team: Team, session: Session) -> None: ...

    return await clinic.ask(application=theirs)


@finds("application_without_api")
async def an_application_that_reads_no_environment(clinic: Clinic) -> list[Finding]:
    database_url = clinic.settings["database_url"]
    theirs = LogtoWebhooks(signing_key=OTHER_KEY, database_url=database_url)
    return await clinic.ask(application=theirs)


async def _on_postgres(clinic: Clinic, options: str) -> list[Finding]:
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, connect_args={"options": options})
    try:
        schema = postgres.emptied_schema()
        return await clinic.ask("durability", engine=engine, schema=schema)
    finally:
        engine.dispose()


async def _free_mb(clinic: Clinic) -> int:
    free = (await clinic.app.database.inspect()).free
    assert free
    return free // 2**20


async def _ask_who_maps_people(
    clinic: Clinic, settings: dict[str, Any], theirs: LogtoWebhooks | None = None
) -> list[Finding]:
    theirs = theirs or _application(clinic.settings | settings)
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
    )
    theirs.map_users(people, key="logto_id", columns={}, when_deleted="delete")
    found = await clinic.ask("mappings", application=theirs, **settings)
    await theirs.close()
    return found


def _application(settings: dict[str, Any]) -> LogtoWebhooks:
    return LogtoWebhooks(**settings)


async def _run(settings: dict[str, str], work: Callable[[Store], T]) -> None:
    application = _application(settings)
    await application.database.host.run(work)
    await application.close()


async def _with_a_part(clinic: Clinic) -> dict[str, str]:
    """A database in which a user is incomplete, and has been for long."""
    another = await clinic.another()
    application = _application(another)
    part = make.user_data_updated(id="a", matchedRoute="/users/:userId/custom-data").body
    await Copy(application.database.host).take([part])
    assert (await application.status()).refetch == 1
    await application.close()
    file = another["database_url"].rpartition("/")[2]
    clinic.sql(f"UPDATE logto_records SET refetch_since = {_LONG_AGO}", file)
    return another


async def _with_a_mapped_row(
    clinic: Clinic, state: str, reason: str = "it is so"
) -> dict[str, str]:
    """A database in which a user's row in the application's table isn't as it should be."""
    return await clinic.another(*_add_mapped_row(state, reason))


def _add_mapped_row(state: str, reason: str) -> tuple[str, str]:
    mapping = "INSERT INTO logto_mappings (name, kind, definition, former, registered_at, seen_at) "
    row = "INSERT INTO logto_mapped_rows (mapping, logto_id, kind, state, reason, changed_at) "
    quoted = reason.replace("'", "''")
    return (
        f"{mapping} VALUES ('people', 'user', '', '[]', {_LONG_AGO}, {_LONG_AGO})",
        f"{row} VALUES ('people', 'ana', 'user', '{state}', '{quoted}', {_LONG_AGO})",
    )


def _new_job(store: Store, handler: str) -> None:
    an_hour_ago = time.time_ns() // 1_000_000 - 3_600_000
    store.jobs.register([RegisteredHandler(name=handler, patterns=("User.Created",))])
    job = NewJob(
        handler=handler,
        key="k",
        event="User.Created",
        subject="user:a",
        queue_key="user:a",
        occurred_at=an_hour_ago,
        payload=make.user_created(id="a").body,
    )
    store.jobs.add([job])
