"""All faults that `doctor` can find, with their texts and fixes, and how findings are made."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import partial
from typing import Any, Final, NamedTuple

from msgspec import Struct

from logto_webhooks.errors import format_message
from logto_webhooks.logto.errors import CORE
from logto_webhooks.plural import Count, Names

PAGE: Final = "docs/troubleshooting.md"
FINE: Final = "fine"
SKIPPED: Final = "skipped"


class Level(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    SKIPPED = "skipped"  # could not be checked
    WARNING = "warning"  # it works, but not permanently or not completely
    BROKEN = "broken"  # deliveries or their effects are lost


class Fault(NamedTuple):
    """A kind of problem: how serious it is, its text, and what to do."""

    level: Level
    text: str
    do: str


_broken = partial(Fault, Level.BROKEN)
_warning = partial(Fault, Level.WARNING)
SEE_LOG: Final = "The service's log says why."
CREDENTIALS: Final = (
    "In Logto's console, create a machine-to-machine application and assign it the role "
    '"Logto Management API access". Then set LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and '
    "LOGTO_M2M_APP_SECRET."
)
CONSOLE: Final = "in Logto's console, under Webhooks > your webhook"
_NOT_WRITTEN: Final = (
    "{count:row isn't|rows aren't} written yet in {mappings:the mapped table|the mapped tables}, "
    "the oldest for {seconds} s: {reason}"
)


FAULTS: Final[dict[str, Fault]] = {
    # Any check.
    "check_failed": _broken(
        "The check failed: {problem}.",
        "Run it again. If it fails again, please report it.",
    ),
    # The signing key.
    "key_missing": _broken(
        "No signing key is set, so deliveries can't be verified.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to the webhook's signing key, {CONSOLE}.",
    ),
    "key_unusable": _broken(
        "A signing key is invalid: {problem}. serve refuses to start.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to the webhook's exact signing key, {CONSOLE}.",
    ),
    "key_short": _broken(
        "A signing key has only {length:character|characters} and is easy to guess. serve refuses "
        "to start.",
        "Set LOGTO_WEBHOOK_SIGNING_KEY to the webhook's signing key, which has 32 characters.",
    ),
    "key_not_told": _broken(
        "Logto's API returns no usable signing key for the webhook {webhook}: {problem}.",
        f"Check and rotate its signing key {CONSOLE}, or create another webhook.",
    ),
    "key_unproven": _warning(
        "No delivery signed with this key has arrived yet, so it may not be the webhook's key.",
        f"Send a test {CONSOLE}. With credentials, you can run: logto-webhooks endpoint test",
    ),
    "key_doubted": _broken(
        "No delivery was signed with this key, and {count:request was|requests were} rejected. It "
        "is probably not the webhook's key.",
        f"Compare LOGTO_WEBHOOK_SIGNING_KEY with the webhook's signing key, {CONSOLE}. Rejected "
        "requests are kept, and accepted once the key is right.",
    ),
    "key_differs": _broken(
        "The webhook {webhook} uses a signing key that isn't in your settings, so its "
        "deliveries are rejected.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to its signing key, {CONSOLE}.",
    ),
    "key_outdated": _warning(
        "The webhook {webhook} uses another signing key than your settings. Its deliveries are "
        "accepted only because the database has its key.",
        f"Set LOGTO_WEBHOOK_SIGNING_KEY to its signing key, {CONSOLE}.",
    ),
    "key_ended": _warning(
        "A signing key in your settings has not been accepted since {at}, because it was rotated.",
        "Set LOGTO_WEBHOOK_SIGNING_KEY to the webhook's current signing key. If that is the "
        f"rejected key, first rotate it {CONSOLE}.",
    ),
    # The database.
    "database_setting": _broken("{problem}", "Correct {setting}."),
    "database_unusable": _broken(
        "The database can't be used: {problem}.",
        "Check that it exists and is running, that this user can write to it, and that {setting} "
        "is right.",
    ),
    "schema_missing": _broken(
        "{place} has none of the tables of logto-webhooks.",
        "Run: logto-webhooks migrate",
    ),
    "schema_old": _broken(
        "The tables are of version {found}, but this release needs version {needed}.",
        "Run: logto-webhooks migrate",
    ),
    "schema_unknown": _broken(
        "The tables are of version {found}, which no release has.",
        "Restore the version in the table logto_schema_version, or use another database.",
    ),
    "schema_newer": _warning(
        "The tables are of version {found}, which is newer than version {needed} of this release.",
        "This works for now. Upgrade this process to the release that migrated the tables.",
    ),
    "database_read_only": _broken(
        "The database is read-only, or a standby.",
        "Set {setting} to the primary database.",
    ),
    "database_unwritable": _broken(
        "Can't write to the database: {problem}. All deliveries are answered 503.",
        "If it is locked, stop the process that locks it. Otherwise, give this user the "
        "permissions that it lacks: for the file and its folder, or, on PostgreSQL, for the "
        "tables. After a failover, run logto-webhooks migrate.",
    ),
    "not_durable": _broken(
        "If the database server crashes, deliveries that were answered 200 can be lost: "
        "{settings}.",
        "Turn these settings on. For this role: ALTER ROLE … SET synchronous_commit = on",
    ),
    "vacuum_off": _warning(
        "PostgreSQL doesn't vacuum {tables}. Their {dead} dead rows slow down every statement.",
        "Turn on autovacuum for the server and for these tables. Then run VACUUM on them.",
    ),
    "files_open": _warning(
        "Other users of this machine can read or write files with personal data or keys: {files}.",
        "Run: chmod 600 {paths}",
    ),
    "disk_low": _warning(
        "Only {free_mb} MB are free on the disk of {place}.",
        "Free some space. When the disk is full, all deliveries are answered 503.",
    ),
    "disk_full": _broken(
        "Only {free_mb} MB are free on the disk of {place}. Soon, no delivery can be stored.",
        "Free some space, then run: logto-webhooks recover",
    ),
    # Its contents.
    "pending_old": _broken(
        "{count:delivery is|deliveries are} pending, the oldest for {seconds} s. No worker is "
        "running, or it can't keep up.",
        "Run logto-webhooks worker, or serve without --no-worker. If it is running, read its log.",
    ),
    "spool_open": _broken(
        "Others could forge deliveries: {problem}.",
        "Until you fix this, serve and worker don't start.",
    ),
    "spool_waiting": _warning(
        "{count:delivery waits|deliveries wait} in the spool directory.",
        "Check that serve or worker runs with the same LOGTO_WEBHOOKS_SPOOL_DIR, and that it can "
        "use the database. See its log.",
    ),
    "deliveries_dead": _warning(
        "{count:delivery is|deliveries are} dead, which means not applied. The records that they "
        "are about are in doubt.",
        "To see the errors, run logto-webhooks deliveries list --state dead. After a fix, run: "
        "logto-webhooks deliveries replay --state dead",
    ),
    "silent": _warning(
        "No delivery has been accepted since {since}, which is longer than usual.",
        "See the checks key, webhook, address and log. To send a test, run: logto-webhooks "
        "endpoint test",
    ),
    "jobs_dead": _warning(
        "{count:job is|jobs are} dead, of {handlers}.",
        "To see the errors, run logto-webhooks jobs list --group. After a fix, run: logto-webhooks "
        "jobs retry --handler NAME",
    ),
    "jobs_waiting": _warning(
        "{count:job waits|jobs wait}, of {handlers}, the oldest for {seconds} s.",
        "Check that serve or worker runs with --app. To see failures, run: logto-webhooks jobs "
        "list --state waiting",
    ),
    "jobs_without_code": _broken(
        "{count:job waits|jobs wait} for handlers that the application doesn't have: {handlers}.",
        "Add the handler again with this name, or run: logto-webhooks handlers forget NAME",
    ),
    "handlers_unregistered": _warning(
        "These handlers of the application get no jobs yet: {handlers}.",
        "Restart serve or worker with --app. For earlier deliveries, run: logto-webhooks "
        "deliveries replay --since 1d --handler NAME",
    ),
    "records_waiting": _warning(
        "{count:record waits|records wait} for a refetch from Logto, the oldest for {seconds} s.",
        "Check that serve runs with these credentials. See its log.",
    ),
    "records_unsettled": _warning(
        "{count:record waits|records wait} for a refetch from Logto, which needs credentials for "
        "its API.",
        CREDENTIALS,
    ),
    "mapping_conflicts": _warning(
        "{count:row|rows} of {mappings:the mapped table|the mapped tables} couldn't be written. "
        "The first: {first}.",
        "To see all, run logto-webhooks mapping check{options}. After a fix, run mapping apply in "
        "the same way.",
    ),
    "mapping_owed": _broken(
        f"{_NOT_WRITTEN}.",
        "Check that your application, or serve or worker with --app, runs with this mapping. If "
        "you have just undone a change to it, wait until no process with that change has run for "
        "five minutes. If you have removed the mapping, run: logto-webhooks mapping forget NAME",
    ),
    "mapping_blocked": _broken(
        f"{_NOT_WRITTEN}.",
        "If a table or a column is missing, run your migrations. If a row is locked, end the "
        "transaction that has locked it. If a permission is missing, grant it. If writing a row "
        "takes long, add an index on each foreign key that refers to its table, or make its "
        "triggers faster.",
    ),
    "mapping_not_migrated": _broken(
        "{problems}.",
        "Run your migrations. Until then, the rows of {mappings:this mapping|these mappings} "
        "aren't written.",
    ),
    "mapping_incomplete": _broken(
        "{problem}",
        "Until then, your application doesn't start, nor do serve and worker with it.",
    ),
    "mapping_file_invalid": _broken(
        "{problem}",
        "Correct the file, or run your migrations. Until then, serve and worker don't start with "
        "it.",
    ),
    "mapping_deletions_held": _broken(
        "{count:row|rows} of {mappings:the mapped table|the mapped tables} would be deleted or "
        "unlinked, which is more than 20 rows and 5% of a table within an hour. They stay until "
        "you allow it. The first: {first}.",
        "Check that the data in Logto is right: users are missing if Logto was restored from an "
        "old dump. If it is right, run logto-webhooks mapping apply --allow-deletes{options}.",
    ),
    "mapping_excludes_all": _warning(
        "The `where` of {mappings:the mapped table|the mapped tables} excludes all users or all "
        "organizations, so no rows are written.",
        "If you didn't intend this, correct `where`, and restart your application, or serve and "
        "worker.",
    ),
    "mapping_cascades": _broken(
        "In the database, {problems}.",
        "Drop these actions in a migration. Where a row may lose what it refers to, use ON DELETE "
        "SET NULL.",
    ),
    "mapping_key_without_index": _warning(
        "There is no unique index on {columns:the key column|the key columns}. Each write reads "
        "the whole table, and two rows could have the same user, organization, membership or role.",
        "Create a unique index on each of them.",
    ),
    "rejected": _warning(
        "{count:request is|requests are} quarantined, {fresh} in the last day, because no known "
        "key signed them.",
        "If you have rotated a key, add the new one. Quarantined requests are then verified again.",
    ),
    "application_database": _broken(
        "The application uses the database {theirs}, but its handlers run on {ours}.",
        "Set {setting} to the database that you pass to LogtoWebhooks(…).",
    ),
    "application_handler": _broken(
        "The application can't start: {problem}",
        "Correct the handler, then start the application.",
    ),
    "application_without_api": _warning(
        "The credentials for Logto's API are set, but the application doesn't read them. If it "
        "receives the webhooks itself, lost deliveries aren't recovered.",
        "Pass environment=os.environ to LogtoWebhooks(…).",
    ),
    # Logto's Management API.
    "api_missing": Fault(
        Level.SKIPPED, "Logto's API isn't used, because no credentials are set.", CREDENTIALS
    ),
    "api_partial": _broken(
        "The credentials are incomplete: {missing} is not set. serve refuses to start.",
        CREDENTIALS,
    ),
    "api_admin": _broken(
        "LOGTO_ENDPOINT is Logto's admin address, which issues tokens but doesn't serve your "
        "tenant's API: {signs}.",
        CORE,
    ),
    "api_admin_answers": _warning(
        "Logto answers, but this seems to be its admin address, not your tenant: {signs}.",
        f"If `endpoint list` doesn't show your webhooks: {CORE}",
    ),
    "api_unreachable": _broken(
        "Can't reach Logto at {endpoint}: {problem}.",
        "Check that LOGTO_ENDPOINT is right, that Logto is running, and that this machine can "
        "reach it.",
    ),
    "api_refused": _broken("Logto at {endpoint} refused: {problem}.", "{hint}"),
    "clock_skew": _warning(
        "This machine's clock and Logto's differ by at least {seconds} s.",
        "Synchronize both with NTP.",
    ),
    "dates_differ": _warning(
        "The Date header of Logto's API and the dates of recent deliveries differ by at least "
        "{seconds} s. Nothing is lost, but each changed record is refetched for that long.",
        "Synchronize the clocks of Logto, of any proxy in front of it, and of all hosts of this "
        "service.",
    ),
    # Its webhook.
    "webhook_missing": _broken(
        "No webhook of this Logto leads here. Its webhooks: {webhooks}.",
        "Run logto-webhooks endpoint create --url URL{options}, or set LOGTO_WEBHOOKS_PUBLIC_URL.",
    ),
    "webhook_disabled": _broken(
        "The webhook {webhook} is disabled. Logto sends and logs nothing.",
        f"Enable it {CONSOLE}. Then run: logto-webhooks reconcile",
    ),
    "webhook_unproven": _warning(
        "The webhook {webhook} may not be yours: only the path of its URL matches. It has another "
        "key, and none of its deliveries arrived. serve and recover ignore it.",
        "If it is yours, set LOGTO_WEBHOOK_SIGNING_KEY to its key, or LOGTO_WEBHOOKS_PUBLIC_URL to "
        "its URL.",
    ),
    "webhook_elsewhere": _broken(
        "The webhook {webhook} leads to {url}, but LOGTO_WEBHOOKS_PUBLIC_URL is {public_url}.",
        f"Change its endpoint URL {CONSOLE}, or change the setting.",
    ),
    "webhook_twice": _warning(
        "Several webhooks lead to {url}: {webhooks}. Each delivery arrives more than once.",
        "In Logto's console, delete all of them but one.",
    ),
    "events_missing": _broken(
        "No webhook sends {events}, which the sync needs.",
        f"Select them {CONSOLE}. Then run: logto-webhooks reconcile",
    ),
    "events_missing_handlers": _broken(
        "No webhook sends {events}, needed by {handlers}.",
        f"Select them {CONSOLE}.",
    ),
    # Its URL.
    "address_lost": _broken(
        "{url} redirects ({status}). Logto follows with a GET without a body, and logs a success. "
        "Every delivery is lost.",
        "Change the webhook's URL to {location}, or remove the redirect. Then run: logto-webhooks "
        "recover",
    ),
    "address_moved": _warning(
        "{url} redirects ({status}).",
        "Change the webhook's URL to {location}.",
    ),
    "address_not_found": _broken(
        "{url} answers 404: there is no webhook at this path.",
        "Compare the path with LOGTO_WEBHOOKS_PATH, or with the path of the application's router.",
    ),
    "address_method": _broken(
        "{url} answers 405: it doesn't accept POST.",
        "Compare the path with LOGTO_WEBHOOKS_PATH, or with the path of the application's router.",
    ),
    "address_open": _broken(
        "{url} answers {status} to an unsigned request, so it isn't logto-webhooks.",
        "Change the URL, or the proxy in front of it, to lead to logto-webhooks.",
    ),
    "address_guarded": _broken(
        "{url} answers {status}, but not like logto-webhooks: a proxy or a firewall answers.",
        "Configure it to pass on the webhook's path without authentication.",
    ),
    "address_failing": _broken(
        "{url} answers {status}.", f"{SEE_LOG} If it doesn't, see the proxy's log."
    ),
    "address_refused": _broken(
        "Nothing listens at {url}, as seen from this machine.",
        "Start logto-webhooks serve or the application. Check that the port is right and open.",
    ),
    "address_unknown": _broken(
        "This machine can't resolve the host of {url}.",
        "Correct the host in the webhook's URL, or its DNS record.",
    ),
    "address_invalid": _broken("{url} isn't a valid URL.", "Correct the webhook's URL in Logto."),
    "address_unreachable": _broken(
        "This machine can't connect to {url}.",
        "Check the proxy and the firewall, and that the server uses the URL's scheme (HTTP or "
        "HTTPS).",
    ),
    "address_timeout": _broken(
        "{url} doesn't answer within {seconds} s. After 10 s, Logto gives up and never retries.",
        "Check the service's log and the load of its database. Then run: logto-webhooks recover",
    ),
    "address_slow": _warning(
        "{url} took {took_ms} ms to answer. After 10 s, Logto gives up.",
        "Check the load of the service and of its database.",
    ),
    "tls_expired": _broken(
        "The certificate of {url} has expired.",
        "Renew it, and reload the server.",
    ),
    "tls_untrusted": _broken(
        "This machine doesn't trust the certificate of {url}. Logto probably doesn't either.",
        "Use a certificate from a public authority, with its whole chain.",
    ),
    "tls_name": _broken(
        "The certificate of {url} is for another host.",
        "Use a certificate for this host, or correct the host in the webhook's URL.",
    ),
    # Its log of the last day.
    "log_timed_out": _warning(
        "{count:delivery of the last day wasn't|deliveries of the last day weren't} answered "
        "within 10 s.",
        "Check the load of the service and of its database, and the proxy in front of it.",
    ),
    "log_signature": _warning(
        "{count:delivery of the last day was|deliveries of the last day were} refused with 401.",
        "After a rotation, a few are normal, and they are applied later. Otherwise, compare the "
        "signing key with the webhook's key, and check that no proxy changes bodies.",
    ),
    "log_refused": _warning(
        "{count:delivery|deliveries} of the last day could not connect: nothing was listening.",
        "Check when the service was down. During a release, start the new process first.",
    ),
    "log_reset": _warning(
        "{count:connection of the last day was|connections of the last day were} closed before "
        "the answer.",
        "Configure proxies to keep idle connections open for longer than 13 s.",
    ),
    "log_failing": _warning(
        "{count:delivery of the last day was|deliveries of the last day were} answered 5xx.",
        SEE_LOG,
    ),
    "log_denied": _warning(
        "{count:delivery of the last day was|deliveries of the last day were} answered 4xx.",
        "Check the proxy in front of the service: its paths, size limits and firewall rules.",
    ),
    "log_other": _warning(
        "{count:delivery|deliveries} of the last day failed for another reason, probably DNS or "
        "TLS.",
        "See Logto's console, under Webhooks > your webhook > Recent requests.",
    ),
    "log_unread": _warning(
        "Logto's log was {when}.",
        "Check that serve or your application runs with these credentials, or run: logto-webhooks "
        "recover",
    ),
    "gap": _broken(
        "Of the newest {entries:delivery|deliveries} in Logto's log, {count:is|are} missing from "
        "the inbox.",
        "Run: logto-webhooks recover",
    ),
    "gap_recent": _warning(
        "Of the newest {entries:delivery|deliveries} in Logto's log, {count:isn't|aren't} in the "
        "inbox yet.",
        "serve will recover them. To do it now, run: logto-webhooks recover",
    ),
    "gap_answered": _broken(
        "{count:delivery is|deliveries are} not in the inbox, although Logto logged a success.",
        "Check that no other server answers at the webhook's URL, and that serve uses this "
        "database. Then run: logto-webhooks recover",
    ),
}


class Finding(Struct, frozen=True, kw_only=True):
    """The result of a check. `do` says how to fix a problem, and `docs` is a page about it.

    `details` has the numbers and names in the text, for scripts.
    """

    check: str = ""
    code: str
    level: Level
    text: str
    do: str = ""
    docs: str = ""
    details: dict[str, Any] = {}


def make_finding(code: str, options: str = "", /, **details: Any) -> Finding:
    """Make a finding of a fault, and fill in its details, and the options of the command that it
    says to run."""
    level, text, do = FAULTS[code]
    shown = {name: _format(value) for name, value in details.items()}
    return Finding(
        code=code,
        level=level,
        text=format_message(text, **shown),
        do=format_message(do, options=options, **shown),
        docs=f"{PAGE}#{code}",
        details=details,
    )


def make_ok(text: str) -> Finding:
    """Make a finding that nothing is wrong."""
    return Finding(code=FINE, level=Level.OK, text=text)


def make_skipped(text: str) -> Finding:
    """Make a finding that something could not be checked."""
    return Finding(code=SKIPPED, level=Level.SKIPPED, text=text)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 2 if something is broken, 1 if there are warnings, else 0."""
    levels = {finding.level for finding in findings}
    return 2 if Level.BROKEN in levels else int(Level.WARNING in levels)


def _format(value: Any) -> Any:
    if isinstance(value, list):
        return Names(value)
    return Count(value) if type(value) is int else value
