"""The faults of Logto's side. Each has its place in docs/troubleshooting.md."""

from __future__ import annotations

from typing import Final

from logto_webhooks.core.admin import CORE
from logto_webhooks.core.doctor.fault import CONSOLE, MAKE, SEE_LOG, Fault

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
