"""The faults of this side. Each has its place in docs/troubleshooting.md."""

from __future__ import annotations

from typing import Final

from logto_webhooks.core.doctor.fault import CONSOLE, MAKE, Fault

HERE: Final[dict[str, Fault]] = {
    # Any check.
    "check_failed": Fault(
        "broken", "It can't be told: {problem}.", "Run it again; if it stays, please report it."
    ),
    # The signing key.
    "key_missing": Fault(
        "broken",
        "No signing key is set; nothing can be accepted.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to the one that stands {CONSOLE} > your webhook.",
    ),
    "key_unusable": Fault(
        "broken",
        "A signing key can't be used: {problem}. serve refuses to start.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to the key that stands {CONSOLE} > your webhook, as it is.",
    ),
    "key_short": Fault(
        "broken",
        "A signing key has only {length:character|characters}, and can be guessed. serve refuses "
        "to start.",
        "Set LOGTO_WEBHOOK_SIGNING_KEY to the key of Logto's webhook, which has 32.",
    ),
    "key_not_told": Fault(
        "broken",
        "Logto's answer about the webhook {hook} has no signing key that can be used: {problem}.",
        f"Look at its signing key {CONSOLE}, and change it there; or make another webhook.",
    ),
    "key_unproven": Fault(
        "warning",
        "No delivery signed with the key has come yet: whether it is the webhook's isn't known.",
        f"Send a test {CONSOLE} > your webhook; with credentials: logto-webhooks endpoint test.",
    ),
    "key_doubted": Fault(
        "broken",
        "Nothing that came was signed with the key, and {count:request|requests} like Logto's "
        "refused: it isn't the webhook's, as it seems.",
        f"Compare LOGTO_WEBHOOK_SIGNING_KEY with the key that stands {CONSOLE} > your webhook. "
        "What was refused is set aside, and taken once the key is right.",
    ),
    "key_differs": Fault(
        "broken",
        "The webhook {hook} signs with a key that isn't set here: all it sends is refused.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to its signing key, {CONSOLE}.",
    ),
    "key_outdated": Fault(
        "warning",
        "The webhook {hook} has another key than is set here; Logto told it, so it is accepted.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to its signing key, {CONSOLE}, before credentials change.",
    ),
    # The database.
    "database_setting": Fault("broken", "{problem}", "Correct {setting}."),
    "database_unusable": Fault(
        "broken",
        "The database can't be used: {problem}.",
        "See that it exists, runs, and may be written to by this user, and that "
        "{setting} leads to it from here.",
    ),
    "schema_missing": Fault(
        "broken", "The database has none of our tables.", "Run: logto-webhooks migrate"
    ),
    "schema_old": Fault(
        "broken",
        "The schema is at {found}, this release needs {needed}.",
        "Run: logto-webhooks migrate",
    ),
    "schema_newer": Fault(
        "warning",
        "The schema is at {found}, newer than this release, which knows {needed}.",
        "It works; bring this process up to the release that migrated.",
    ),
    "database_read_only": Fault(
        "broken",
        "The database takes no writes here: it is a standby, or read-only.",
        "Set {setting} to the primary.",
    ),
    "database_unwritable": Fault(
        "broken",
        "Nothing can be written into the database: {problem}. All deliveries are answered 503.",
        "If it is locked, end who holds it; else let this user write the file and its folder.",
    ),
    "not_durable": Fault(
        "broken",
        "What was answered 200 can be lost when the server stops: {settings}.",
        "Switch them on for this role and database, as ALTER ROLE … SET synchronous_commit = on.",
    ),
    "files_open": Fault(
        "warning",
        "Other users of this machine can read or write files with people or keys in them: {files}.",
        "Run: chmod 600 {paths}",
    ),
    "disk_low": Fault(
        "warning",
        "Only {free_mb} MB are free where {place} is.",
        "Make room: when the disk is full, all deliveries are answered 503, and lost.",
    ),
    "disk_full": Fault(
        "broken",
        "Only {free_mb} MB are free where {place} is: hardly any delivery can be stored.",
        "Make room now; then logto-webhooks recover brings back what was lost.",
    ),
    # What is in it.
    "pending_old": Fault(
        "broken",
        "{count:delivery is|deliveries are} pending, the oldest for {seconds} s: nobody applies "
        "them in time.",
        "Run logto-webhooks worker, or serve without --no-worker. If it runs, its log says more.",
    ),
    "spool_waiting": Fault(
        "warning",
        "{count:delivery waits|deliveries wait} in the spool directory to be stored.",
        "See that serve or worker runs with the same LOGTO_WEBHOOKS_SPOOL_DIR, and that it can "
        "use the database; its log says more.",
    ),
    "deliveries_dead": Fault(
        "warning",
        "{count:delivery is|deliveries are} dead: never applied, and their records in doubt.",
        "See why with logto-webhooks deliveries list --state dead, then deliveries replay ID.",
    ),
    "silent": Fault(
        "warning",
        "No delivery was taken since {since}, which is longer than is usual here.",
        "Look at what the checks key, hook, address and log say; endpoint test tries the way.",
    ),
    "jobs_dead": Fault(
        "warning",
        "{count:job is|jobs are} dead, of {handlers}.",
        "See why with logto-webhooks jobs list --group; mended: jobs retry --handler NAME.",
    ),
    "jobs_waiting": Fault(
        "warning",
        "{count:job waits|jobs wait}, of {handlers}, the first for {seconds} s.",
        "See that a serve or worker runs with --app; jobs list --state waiting shows what fails.",
    ),
    "jobs_without_code": Fault(
        "broken",
        "{count:job waits|jobs wait} for code that the application doesn't have: {handlers}.",
        "Bring the handler back under its name, or: logto-webhooks handlers forget NAME",
    ),
    "handlers_unregistered": Fault(
        "warning",
        "No jobs are made for these handlers of the application: {handlers}.",
        "Start serve or worker with --app again; then, for what came meanwhile: "
        "logto-webhooks deliveries replay ID --handler NAME",
    ),
    "records_waiting": Fault(
        "warning",
        "{count:record waits|records wait} for Logto, the first for {seconds} s: nobody asks.",
        "See that serve runs with these credentials; its log says what went wrong.",
    ),
    "records_unsettled": Fault(
        "warning",
        "{count:record|records} can be settled only by Logto, which can't be asked without "
        "credentials.",
        MAKE,
    ),
    "rejected": Fault(
        "warning",
        "{count:request is|requests are} set aside, {fresh} of the last day: signed with no known "
        "key.",
        "If a key was changed, set the new one beside the old: what is set aside is tried again.",
    ),
    "application_database": Fault(
        "broken",
        "The application has its own database at {theirs}, but its handlers run on {ours}.",
        "Set {setting} to the one that LogtoWebhooks(…) is given.",
    ),
}
