"""Webhooks in Logto: find, create, test them, and rotate their keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks import canonical_json
from logto_webhooks.arrivals import follow, newest_id
from logto_webhooks.clock import Clock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter, StoredDelivery
from logto_webhooks.errors import (
    KeyNotTold,
    LogtoUnreachable,
    StoreUnavailable,
    WebhookChanged,
    WebhookExists,
    WebhookUnknown,
)
from logto_webhooks.events import BY_NAME, DERIVED
from logto_webhooks.events.base import Id, Json
from logto_webhooks.events.local import LOCAL
from logto_webhooks.events.organizations import OrganizationEvent
from logto_webhooks.events.users import InteractionEvent, UserEvent
from logto_webhooks.jobs import matches
from logto_webhooks.logto.delivery_log import RESETS
from logto_webhooks.signing_keys import WebhookKey, fingerprint, problem_of_key
from logto_webhooks.validation import strip_url

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

SYNCED: Final = (UserEvent, InteractionEvent, OrganizationEvent)
# No released Logto lets a webhook subscribe to these.
LATER: Final = frozenset({"TrustedDevice.Created", "TrustedDevice.Deleted"})


class Webhook(Struct, frozen=True, kw_only=True, rename="camel"):
    """A webhook in Logto. `config` is complete, because a change replaces it."""

    id: Id
    name: str = ""
    events: list[str] = []
    config: Json = {}
    signing_key: str = ""
    enabled: bool = True

    def __repr__(self) -> str:
        """Without the key, and without headers, which may hold another."""
        return f"Webhook(id={self.id!r}, name={self.name!r}, url={self.shown_url!r})"

    @property
    def url(self) -> str:
        """The webhook's URL."""
        return str(self.config.get("url", ""))

    @property
    def shown_url(self) -> str:
        """Its URL without what may be secret: the password and the query."""
        return strip_url(self.url)

    def leads_to(self, url: str) -> bool:
        """Return whether the webhook's URL is `url`, ignoring a trailing slash."""
        return self.url.rstrip("/") == url.rstrip("/")


def parse_webhook(content: Any) -> Webhook | None:
    """Parse an answer. Return None if it isn't a webhook. A key that isn't a text is left out."""
    if isinstance(content, dict) and not isinstance(content.get("signingKey"), str):
        content = {name: value for name, value in content.items() if name != "signingKey"}
    try:
        return msgspec.convert(content, Webhook)
    except msgspec.ValidationError:
        return None


def find_webhook(webhooks: Sequence[Webhook], query: str) -> Webhook:
    """Find a webhook by id, else by name, else by URL. Raises WebhookUnknown."""
    several = False
    for matching in (
        [webhook for webhook in webhooks if webhook.id == query],
        [webhook for webhook in webhooks if webhook.name == query],
        [webhook for webhook in webhooks if webhook.leads_to(query)],
    ):
        if len(matching) == 1:
            return matching[0]
        several = several or bool(matching)
    raise _refuse(webhooks, several, f"the name or URL {query!r}")


def find_our_webhook(
    webhooks: Sequence[Webhook],
    keys: Collection[str],
    public_url: str | None,
    *,
    or_only: bool = False,
) -> Webhook:
    """Find the webhook with our key or our URL. Raises WebhookUnknown. With `or_only`, find the
    only one there is, if none is ours."""
    here = [webhook for webhook in webhooks if is_ours(webhook, keys, public_url)]
    if or_only and not here and len(webhooks) == 1:
        here = list(webhooks)
    if len(here) == 1:
        return here[0]
    raise _refuse(webhooks, bool(here), "the signing key or URL in the settings")


def is_ours(webhook: Webhook, keys: Collection[str], public_url: str | None) -> bool:
    """Whether a webhook has one of the keys, or the public URL."""
    has_our_key = webhook.signing_key != "" and webhook.signing_key in keys
    return has_our_key or (bool(public_url) and webhook.leads_to(str(public_url)))


def leads_here(
    webhook: Webhook, seen: Collection[str], keys: Collection[str], public_url: str | None
) -> bool:
    """Whether a webhook is ours: by key, by URL, or because deliveries from it were accepted
    (`seen`)."""
    return webhook.id in seen or is_ours(webhook, keys, public_url)


def subscription(patterns: Iterable[str] = ()) -> list[str]:
    """Return the events that the sync needs, and those that match the handlers' patterns.

    An event that no released Logto has is included only if it is named.
    """
    patterns = list(patterns)
    unknown = [
        pattern for pattern in patterns if not {"*", "?"} & set(pattern) and pattern not in BY_NAME
    ]
    return [
        *(name for name in BY_NAME if name not in DERIVED and _is_needed(name, patterns)),
        *(name for name in unknown if name not in LOCAL),
    ]


def _is_needed(name: str, patterns: Sequence[str]) -> bool:
    if name in patterns or issubclass(BY_NAME[name], SYNCED):
        return True
    return name not in LATER and any(matches(pattern, name) for pattern in patterns)


def _refuse(webhooks: Sequence[Webhook], several: bool, what: str) -> WebhookUnknown:
    problem = f"{'several webhooks have' if several else 'no webhook has'} {what}"
    if not webhooks:
        hint = "Create one: logto-webhooks endpoint create --url URL"
        return WebhookUnknown(problem="Logto has no webhooks", hint=hint)
    listed = ", ".join(
        f"{webhook.id} ({webhook.name}, {webhook.shown_url})" for webhook in webhooks
    )
    return WebhookUnknown(problem=problem, hint=f"Use an ID. Logto has these webhooks: {listed}.")


POLL_S: Final = 0.2
PROVED_S: Final = 4.0  # within this time, a key in the database verifies rejected requests
NAME: Final = "logto-webhooks"


class TestResult(Struct, frozen=True, kw_only=True):
    """The result of a test: the delivery's id, or the problem. If the webhook isn't `enabled`,
    Logto sends only tests."""

    webhook: str
    url: str
    enabled: bool
    event: str
    delivery: int | None = None
    took_ms: int | None = None
    problem: str | None = None


async def list_webhooks(logto: ManagementClient) -> tuple[list[Webhook], int]:
    """Return all webhooks, and the time at Logto (ms). Raises LogtoUnreachable, LogtoApiError."""
    webhooks: list[Webhook] = []
    now = 0
    async for page in logto.webhooks():
        now = page.date or page.asked_at
        webhooks += [webhook for item in page.content if (webhook := parse_webhook(item))]
    return webhooks, now


async def create_webhook(
    logto: ManagementClient, url: str, name: str, events: Sequence[str]
) -> Webhook:
    """Create a webhook. Raises WebhookExists, KeyNotTold, LogtoUnreachable, LogtoApiError."""
    webhooks, _ = await list_webhooks(logto)
    for webhook in webhooks:
        if webhook.leads_to(url):
            raise WebhookExists(id=webhook.id, url=webhook.shown_url)
    with note_on_failure("it may exist anyway: see `logto-webhooks endpoint list`"):
        return parse_created((await logto.create_webhook(name, url, events)).content, name)


@contextmanager
def note_on_failure(note: str) -> Iterator[None]:
    """Add a note to LogtoUnreachable: without an answer, Logto may have made the change."""
    try:
        yield
    except LogtoUnreachable as error:
        problem = f"{error.problem}; {note}"
        raise LogtoUnreachable(endpoint=error.endpoint, problem=problem) from None


def parse_created(content: Any, name: str) -> Webhook:
    """Return the webhook that was created or changed. Raises WebhookChanged, and KeyNotTold if
    the answer lacks its key."""
    webhook = parse_webhook(content)
    if webhook is None:
        raise WebhookChanged(name=name, what="deleted")
    if (problem := problem_of_key(webhook.signing_key)) is not None:
        raise KeyNotTold(id=webhook.id, name=webhook.name or name, problem=problem)
    return webhook


async def send_test(
    logto: ManagementClient, host: TransactionRunner, webhook: Webhook, event: str, timeout_s: float
) -> TestResult:
    """Make Logto send a test, and wait until the inbox has it.

    A test that was answered 401 may still arrive there, once the receiver finds a key that was just
    changed. Raises LogtoUnreachable, LogtoApiError, StoreUnavailable.
    """
    newest, began = await newest_id(host), time.monotonic()
    result = TestResult(
        webhook=webhook.id, url=webhook.shown_url, enabled=webhook.enabled, event=event
    )
    answered = (await logto.test_webhook(webhook.id, webhook.url, event)).content
    problem = None if answered == {} else _describe_failure(answered)
    if problem not in (None, _REFUSED):
        return replace(result, problem=problem)
    wait_s = timeout_s if problem is None else min(timeout_s, PROVED_S)
    try:
        async with asyncio.timeout(wait_s):
            delivery = await _await_delivery(
                webhook, host, DeliveryFilter(event=event, after=newest)
            )
    except TimeoutError:
        return replace(result, problem=problem or _ELSEWHERE.format(timeout_s))
    took = round((time.monotonic() - began) * 1000)
    return replace(result, delivery=delivery.id, took_ms=took)


async def _await_delivery(
    webhook: Webhook, host: TransactionRunner, awaited: DeliveryFilter
) -> StoredDelivery:
    async with aclosing(follow(host, awaited, POLL_S)) as deliveries:
        async for delivery in deliveries:
            if canonical_json.decode(delivery.body).get("hookId") == webhook.id:
                return delivery
    raise AssertionError("following has no end")


def _describe_failure(answered: Any) -> str:
    """Describe why a test failed, from Logto's answer."""
    if answered is None:
        return "Logto no longer has this webhook"
    data = answered.get("data")
    status = data.get("responseStatus") if isinstance(data, dict) else None
    if status == 401:
        return _REFUSED
    if isinstance(status, int):
        return f"the answer was {status}"
    text = str(answered.get("message", ""))
    return next((word for sign, word in _CAUSES if sign in text), "Logto got no answer")


_CAUSES: Final = (
    ("timed out", "Logto got no answer in time"),
    ("ECONNREFUSED", "as seen from Logto, nothing listens there"),
    *((sign, "as seen from Logto, the connection was closed without an answer") for sign in RESETS),
    ("ENOTFOUND", "Logto can't resolve the host"),
    ("certificate", "Logto doesn't trust the TLS certificate"),
)
_REFUSED: Final = "the answer was 401: the service doesn't have this webhook's signing key"
_ELSEWHERE: Final = (
    "Logto got a success, but the test didn't arrive here within {:g} s: the URL leads to another "
    "server, there is a redirect, or the service uses another database"
)


_CHANGED: Final = "Logto already uses the new key, so run this command again"


class RotationResult(Struct, frozen=True, kw_only=True):
    """A webhook with a new key. Times are in milliseconds since the epoch.

    `signing_key` is the new key. The old key is in the database, so you don't need to keep it in
    the settings.
    """

    webhook: str
    url: str
    signing_key: str
    old_ends_at: int
    old_used_at: int | None

    def __repr__(self) -> str:
        """Without the keys."""
        return f"RotationResult(webhook={self.webhook!r}, url={self.url!r})"


async def rotate_key(
    logto: ManagementClient,
    host: TransactionRunner,
    clock: Clock,
    webhook: Webhook,
    overlap_ms: int,
) -> RotationResult:
    """Change the key in Logto, and store both keys for every process on the database.

    The old key is stored first, so that its deliveries are accepted whatever fails, unless it can't
    be a key. Raises WebhookChanged, KeyNotTold, LogtoUnreachable, LogtoApiError, StoreUnavailable.
    """
    old = WebhookKey(webhook_id=webhook.id, key=webhook.signing_key, learnt_at=clock.now())
    await host.run(lambda store: store.webhook_keys.learn([old]))
    with note_on_failure("the key may have changed anyway, so run this command again"):
        changed = parse_created((await logto.rotate_key(webhook.id)).content, webhook.name)
    now = clock.now()
    new = WebhookKey(webhook_id=webhook.id, key=changed.signing_key, learnt_at=now)
    ending = replace(old, until=now + overlap_ms)

    def learn(store: Store) -> dict[str, int]:
        store.webhook_keys.learn([ending, new], overlap_ms)
        return store.webhook_keys.used({})

    try:
        used = await host.run(learn)
    except StoreUnavailable as error:
        raise StoreUnavailable(problem=f"{error.problem}; {_CHANGED}") from None
    return RotationResult(
        webhook=webhook.id,
        url=webhook.shown_url,
        signing_key=new.key,
        old_ends_at=now + overlap_ms,
        old_used_at=used.get(fingerprint(old.key)),
    )
