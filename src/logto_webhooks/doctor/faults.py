"""Every fault that doctor can find, with what to do about it."""

from __future__ import annotations

from typing import Final, NamedTuple

from logto_webhooks.logto.admin_address import CORE


class Fault(NamedTuple):
    """How bad it is, what is said of it, and what to do."""

    level: str
    text: str
    do: str


SEE_LOG: Final = "The service's log says why, at the time of each."
MAKE: Final = (
    "In Logto's console, make an application of the type machine-to-machine, give it the role "
    '"Logto Management API access", and set LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and '
    "LOGTO_M2M_APP_SECRET."
)
CONSOLE: Final = "in Logto's console, under Webhooks"


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
    "vacuum_off": Fault(
        "warning",
        "PostgreSQL doesn't vacuum {tables} by itself; {dead} dead rows slow down every statement.",
        "Switch autovacuum on, for the server and for these tables, and run VACUUM on them.",
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


THERE: Final[dict[str, Fault]] = {
    # Logto's Management API.
    "api_missing": Fault("skipped", "Logto can't be asked: no credentials are set.", MAKE),
    "api_partial": Fault(
        "broken",
        "The credentials are not whole: {missing} is not set, so serve won't start.",
        MAKE,
    ),
    "api_admin": Fault(
        "broken",
        "Logto's admin side is set, which issues tokens but doesn't have your tenant's API: "
        "{signs}.",
        CORE,
    ),
    "api_admin_answers": Fault(
        "warning",
        "Logto answers, but it seems to be its admin side, and not your tenant: {signs}.",
        f"If the webhooks that it lists aren't yours: {CORE}",
    ),
    "api_unreachable": Fault(
        "broken",
        "Logto at {endpoint} can't be reached from here: {problem}.",
        "See that LOGTO_ENDPOINT is its address, as seen from here, and that it runs.",
    ),
    "api_refused": Fault("broken", "Logto at {endpoint} refuses: {problem}.", "{hint}"),
    "clock_skew": Fault(
        "warning",
        "The clock here and Logto's differ by {seconds} s at least.",
        "Synchronize both with NTP.",
    ),
    # Its webhook.
    "hook_missing": Fault(
        "broken",
        "No webhook of this Logto leads here. It has: {hooks}.",
        "Make one: logto-webhooks endpoint create --url URL. Or set LOGTO_WEBHOOKS_PUBLIC_URL.",
    ),
    "hook_disabled": Fault(
        "broken",
        "The webhook {hook} is disabled: Logto sends nothing, and logs nothing.",
        f"Enable it {CONSOLE}; then: logto-webhooks reconcile",
    ),
    "hook_unproven": Fault(
        "warning",
        "Only the path of its URL says that the webhook {hook} is ours: it has another key, and "
        "nothing of it came. serve and recover leave it out.",
        "Set LOGTO_WEBHOOK_SIGNING_KEY to its key, or LOGTO_WEBHOOKS_PUBLIC_URL to its URL.",
    ),
    "hook_elsewhere": Fault(
        "broken",
        "The webhook {hook} leads to {url}, but LOGTO_WEBHOOKS_PUBLIC_URL is {public_url}.",
        f"Change its endpoint URL {CONSOLE}, or the setting.",
    ),
    "hook_twice": Fault(
        "warning",
        "Several webhooks lead to {url}: {hooks}. Each delivery comes more than once.",
        f"Delete all but one {CONSOLE}.",
    ),
    "events_missing": Fault(
        "broken",
        "No webhook sends {events}, which the copy needs.",
        f"Tick them {CONSOLE} > your webhook; then: logto-webhooks reconcile",
    ),
    "events_missing_handlers": Fault(
        "broken",
        "No webhook sends {events}, needed by {handlers}.",
        f"Tick them {CONSOLE} > your webhook.",
    ),
    # Its URL.
    "address_lost": Fault(
        "broken",
        "{url} redirects ({status}): Logto follows with a GET without a body, and logs a success. "
        "Every delivery is lost without a trace.",
        "Let the webhook lead straight to {location}, or take the redirect away; then recover.",
    ),
    "address_moved": Fault(
        "warning",
        "{url} redirects ({status}).",
        "Let the webhook lead straight to {location}.",
    ),
    "address_not_found": Fault(
        "broken",
        "{url} answers 404: there is no webhook at that path.",
        "Compare it with LOGTO_WEBHOOKS_PATH, or with where the application mounts the router.",
    ),
    "address_method": Fault(
        "broken",
        "{url} answers 405: what is there takes no POST.",
        "Compare it with LOGTO_WEBHOOKS_PATH, or with where the application mounts the router.",
    ),
    "address_open": Fault(
        "broken",
        "{url} answers {status} to what nobody signed: something else is there, and takes all.",
        "Let the URL, or the proxy before it, lead to logto-webhooks.",
    ),
    "address_guarded": Fault(
        "broken",
        "{url} answers {status}, but not as logto-webhooks does: something stands before it.",
        "Let the proxy pass the webhook's path on, without credentials of its own.",
    ),
    "address_failing": Fault(
        "broken", "{url} answers {status}.", f"{SEE_LOG} If it has nothing, the proxy's does."
    ),
    "address_refused": Fault(
        "broken",
        "Nothing listens at {url}, seen from here.",
        "Start logto-webhooks serve, or the application; see that the port is right, and open.",
    ),
    "address_unknown": Fault(
        "broken",
        "The host of {url} isn't known, seen from here.",
        "Mend the host in the webhook's URL, or its entry in the DNS.",
    ),
    "address_unreachable": Fault(
        "broken",
        "{url} can't be reached from here: the connection breaks.",
        "See that what answers there speaks HTTP, and HTTPS if the URL says so.",
    ),
    "address_timeout": Fault(
        "broken",
        "{url} doesn't answer within {seconds} s. After 10 s, Logto gives up, for good.",
        "See the service's log, and the load of its database. What failed: logto-webhooks recover",
    ),
    "address_slow": Fault(
        "warning",
        "{url} took {took_ms} ms to answer; after 10 s, Logto gives up.",
        "See the load of the service and of its database.",
    ),
    "tls_expired": Fault(
        "broken",
        "The certificate of {url} has expired.",
        "Renew it, and see that the server loads the new one.",
    ),
    "tls_untrusted": Fault(
        "broken",
        "The certificate of {url} is of no authority that is trusted here; Logto likely agrees.",
        "Serve a certificate of a public authority, with its whole chain.",
    ),
    "tls_name": Fault(
        "broken",
        "The certificate of {url} is for another name.",
        "Serve one for that host, or mend the host in the webhook's URL.",
    ),
    # Its log of the last day.
    "log_timed_out": Fault(
        "warning",
        "{count:delivery of the last day wasn't|deliveries of the last day weren't} answered "
        "within 10 s.",
        "See the load of the service and of its database, and what stands before it.",
    ),
    "log_signature": Fault(
        "warning",
        "{count:delivery of the last day was|deliveries of the last day were} refused with 401.",
        "Compare the signing key with the webhook's; a proxy may change bodies, too.",
    ),
    "log_refused": Fault(
        "warning",
        "{count:delivery|deliveries} of the last day found nobody listening.",
        "See when the service was down; during a release, let the new one start first.",
    ),
    "log_reset": Fault(
        "warning",
        "{count:delivery|deliveries} of the last day broke off.",
        "See what stands between: it must keep idle connections for longer than Logto's 13 s.",
    ),
    "log_failing": Fault(
        "warning",
        "{count:delivery of the last day was|deliveries of the last day were} answered 5xx.",
        SEE_LOG,
    ),
    "log_denied": Fault(
        "warning",
        "{count:delivery of the last day was|deliveries of the last day were} answered 4xx.",
        "See what stands before the service: a path, a limit of size, a firewall.",
    ),
    "log_other": Fault(
        "warning",
        "{count:delivery|deliveries} of the last day failed otherwise, likely by DNS or TLS.",
        "Logto's console shows what, under Webhooks > your webhook > Recent requests.",
    ),
    "log_unread": Fault(
        "warning",
        "Logto's log was last compared with the inbox {when}.",
        "See that serve runs with these credentials; or: logto-webhooks recover",
    ),
    "gap": Fault(
        "broken",
        "Of the newest {entries:delivery|deliveries} in Logto's log {count} never came into the "
        "inbox.",
        "Run: logto-webhooks recover",
    ),
    "gap_recent": Fault(
        "warning",
        "Of the newest {entries:delivery|deliveries} in Logto's log {count:isn't|aren't} in the "
        "inbox yet.",
        "serve brings them back by itself; at once: logto-webhooks recover",
    ),
    "gap_answered": Fault(
        "broken",
        "{count:delivery|deliveries} that Logto logged as a success never came into the inbox.",
        "Something redirects or answers in our place, or this is another database than serve's. "
        "Then: logto-webhooks recover",
    ),
}
