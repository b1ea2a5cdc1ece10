"""Faults at Logto and between: each put into a healthy system, and what must be found."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager, nullcontext

import pytest

from logto_webhooks import canonical_json
from logto_webhooks.doctor.faults import Finding
from logto_webhooks.logto.webhooks import subscription
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import log_entry
from tests.support.fake import NOBODY
from tests.support.healthy_system import (
    OTHER_KEY,
    TLS,
    Clinic,
    answering,
    breaking,
    ills,
    refusing,
)

THERE, finds = ills()
_RESET = 'TypeError: {"message":"fetch failed","cause":{"code":"ECONNRESET"}}'
_CLOSED = 'TypeError: {"message":"fetch failed","cause":{"message":"other side closed"}}'
_TIMED_OUT = 'TimeoutError: {"message":"Request timed out: POST http://127.0.0.1:9/"}'
_ODD = 'TypeError: {"message":"fetch failed","cause":{"code":"CERT_HAS_EXPIRED"}}'


@finds("api_partial")
async def half_of_the_credentials(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(app_secret=None)


@finds("api_admin")
async def the_admin_application(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(app_id="m-default")


@finds("api_admin_answers")
async def an_admin_application_that_is_answered(clinic: Clinic) -> list[Finding]:
    with pytest.MonkeyPatch.context() as patch:
        credentials = ("m-default", clinic.logto.app_secret)
        patch.setattr(clinic.logto._tokens, "_credentials", credentials)
        return await clinic.ask(app_id="m-default")


@finds("api_admin", "api_unreachable")
async def the_admin_address(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(endpoint="http://127.0.0.1:3002")


@finds("api_unreachable")
async def a_logto_that_is_down(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(endpoint="http://127.0.0.1:9")


@finds("api_refused")
async def a_wrong_secret(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(app_secret="wrong")


@finds("api_refused")
async def an_application_without_the_role(clinic: Clinic) -> list[Finding]:
    clinic.logto.set_role(False)
    try:
        return await clinic.ask()
    finally:
        clinic.logto.set_role(True)


@finds("api_refused")
async def something_that_is_no_logto(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(endpoint=clinic.url.partition("/api/")[0])


@finds("webhook_missing", stays=True)
async def no_webhook(clinic: Clinic) -> list[Finding]:
    clinic.logto.delete_hook(clinic.webhook)
    return await clinic.ask()


@finds("webhook_disabled")
async def a_webhook_that_is_disabled(clinic: Clinic) -> list[Finding]:
    with clinic.changed(enabled=False):
        return await clinic.ask()


@finds("webhook_unproven", "key_differs")
async def a_webhook_that_only_has_our_path(clinic: Clinic) -> list[Finding]:
    another = await clinic.another()
    return await clinic.ask("key", "webhook", **another, signing_key=OTHER_KEY, public_url=None)


@finds("webhook_elsewhere")
async def a_webhook_that_leads_elsewhere(clinic: Clinic) -> list[Finding]:
    return await clinic.ask(public_url="http://127.0.0.1:9/elsewhere")


@finds("webhook_twice")
async def two_webhooks(clinic: Clinic) -> list[Finding]:
    twin = clinic.logto.add_hook(f"{clinic.url}/", name="twin")["id"]
    try:
        return await clinic.ask()
    finally:
        clinic.logto.delete_hook(twin)


@finds("events_missing")
async def a_webhook_without_an_event_of_the_copy(clinic: Clinic) -> list[Finding]:
    some = [each for each in subscription(["Role.Created"]) if each != "User.Deleted"]
    with clinic.changed(events=some):
        return await clinic.ask()


@finds("events_missing_handlers")
async def a_webhook_without_an_event_of_a_handler(clinic: Clinic) -> list[Finding]:
    with clinic.changed(events=subscription()):
        return await clinic.ask()


@finds("address_lost")
async def a_redirect_for_good(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(301, location=f"{clinic.url}/x"))


@finds("address_lost")
async def a_redirect_for_now(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(302, location="/login"))


@finds("address_moved")
async def a_redirect_that_keeps_the_body(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(308, location=clinic.url))


@finds("address_not_found")
async def another_path(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, nullcontext(f"{clinic.url}/other"))


@finds("address_method")
async def a_path_that_takes_no_post(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(405))


@finds("address_open")
async def a_site_that_takes_everything(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(200))


@finds("address_guarded")
async def a_proxy_that_wants_a_password(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(401))


@finds("address_failing")
async def a_gateway_with_nobody_behind(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, answering(502))


@finds("address_refused")
async def nobody_who_listens(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, nullcontext(NOBODY))


@finds("address_unknown")
async def a_host_without_an_address(clinic: Clinic) -> list[Finding]:
    host = ".".join(["a" * 60] * 5)  # longer than a name may be: nobody needs be asked
    return await _leading_to(clinic, nullcontext(f"http://{host}/"))


@finds("address_invalid")
async def a_port_that_is_too_large(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, nullcontext("http://127.0.0.1:99999/"))


@finds("address_unreachable")
async def a_server_that_hangs_up(clinic: Clinic) -> list[Finding]:
    return await _leading_to(clinic, breaking())


@finds("address_timeout")
async def a_server_that_is_silent(clinic: Clinic) -> list[Finding]:
    async with refusing(after_s=1.3) as url:
        return await clinic.ask("address", **_alone(url), timeout_s=2)


@finds("address_slow")
async def a_server_that_is_slow(clinic: Clinic) -> list[Finding]:
    async with refusing(after_s=1) as url:
        return await clinic.ask("address", **_alone(url), timeout_s=6)


@finds("tls_expired")
async def a_certificate_that_expired(clinic: Clinic) -> list[Finding]:
    return await _behind(clinic, "expired", trusted=True)


@finds("tls_name")
async def a_certificate_of_another_host(clinic: Clinic) -> list[Finding]:
    return await _behind(clinic, "other", trusted=True)


@finds("tls_untrusted")
async def a_certificate_that_nobody_trusts(clinic: Clinic) -> list[Finding]:
    return await _behind(clinic, "good", trusted=False)


@finds("log_signature", "gap_recent", stays=True)
async def deliveries_that_were_answered_401(clinic: Clinic) -> list[Finding]:
    return await _while_leading_to(clinic, answering(401))


@finds("log_failing", "gap_recent", stays=True)
async def deliveries_that_were_answered_500(clinic: Clinic) -> list[Finding]:
    return await _while_leading_to(clinic, answering(500))


@finds("log_denied", "gap_recent", stays=True)
async def deliveries_that_were_answered_413(clinic: Clinic) -> list[Finding]:
    return await _while_leading_to(clinic, answering(413))


@finds("log_refused", "gap_recent", stays=True)
async def deliveries_that_found_nobody(clinic: Clinic) -> list[Finding]:
    return await _while_leading_to(clinic, nullcontext(NOBODY))


@finds("log_timed_out", "gap")
async def deliveries_that_timed_out_an_hour_ago(clinic: Clinic) -> list[Finding]:
    return await _logged(clinic, _TIMED_OUT)


@finds("log_reset", "gap")
async def deliveries_whose_connection_was_closed_an_hour_ago(clinic: Clinic) -> list[Finding]:
    return await _logged(clinic, _CLOSED)


@finds("log_reset", "gap")
async def deliveries_that_broke_off_an_hour_ago(clinic: Clinic) -> list[Finding]:
    return await _logged(clinic, _RESET)


@finds("log_other", "gap")
async def deliveries_that_failed_by_tls_an_hour_ago(clinic: Clinic) -> list[Finding]:
    return await _logged(clinic, _ODD)


@finds("gap_answered", stays=True)
async def deliveries_that_somebody_else_took(clinic: Clinic) -> list[Finding]:
    return await _while_leading_to(clinic, answering(200))


@finds("log_unread")
async def a_log_that_nobody_ever_read(clinic: Clinic) -> list[Finding]:
    return await clinic.ask("recovery", **await clinic.another())


@finds("log_unread", stays=True)
async def a_log_that_nobody_reads_any_more(clinic: Clinic) -> list[Finding]:
    clinic.sql("UPDATE logto_checkpoints SET at = 1000000000000 WHERE name = 'recover'")
    return await clinic.ask()


@finds("log_unread", stays=True)
async def a_log_that_a_wrong_clock_read(clinic: Clinic) -> list[Finding]:
    clinic.sql("UPDATE logto_checkpoints SET at = 4000000000000 WHERE name = 'recover'")
    return await clinic.ask()


async def _leading_to(clinic: Clinic, server: AbstractAsyncContextManager[str]) -> list[Finding]:
    async with server as url:
        with clinic.changed(config={"url": url}):
            return await clinic.ask()


def _alone(url: str) -> dict[str, str | None]:
    """Settings without credentials: the public URL is what is looked at."""
    return {"endpoint": None, "app_id": None, "app_secret": None, "public_url": url}


async def _behind(clinic: Clinic, certificate: str, trusted: bool) -> list[Finding]:
    with pytest.MonkeyPatch.context() as patch:
        if trusted:
            patch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
        return await _leading_to(clinic, breaking(certificate))


async def _while_leading_to(
    clinic: Clinic, server: AbstractAsyncContextManager[str]
) -> list[Finding]:
    """Something happens while the webhook leads elsewhere."""
    async with server as url:
        with clinic.changed(config={"url": url}):
            clinic.logto.create_user()
            await clinic.logto.settle()
        return await clinic.ask()


async def _logged(clinic: Clinic, error: str) -> list[Finding]:
    """Logto's log has an attempt that failed before serve could bring it back."""
    an_hour_ago = time.time_ns() // 1_000_000 - 3_600_000
    payload = canonical_json.decode(make.user_created(at=an_hour_ago).body) | {
        "hookId": clinic.webhook
    }
    clinic.logto.populate_log(clinic.webhook, [log_entry("e", payload, an_hour_ago, None, error)])
    try:
        return await clinic.ask()
    finally:
        clinic.logto.populate_log(clinic.webhook, [])
