"""Errors that users of the package see. The docstring is the message."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

# Added to the message of an unexpected error.
REPORT: Final = "this is a bug: report it as docs/troubleshooting.md#unexpected says"
_PACKAGE: Final = "logto_webhooks"


class LogtoWebhooksError(Exception):
    """Something in logto-webhooks went wrong."""

    def __init__(self, **data: object) -> None:
        super().__init__(*data.values())
        self.__dict__.update(data)

    def __str__(self) -> str:
        template = inspect.cleandoc(type(self).__doc__ or type(self).__name__)
        return " ".join(template.format(**self.__dict__).split())


def describe(error: BaseException) -> str:
    """Describe an error without quoting a payload or a statement. Of an unexpected one, name its
    place in the code, and where to report it."""
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    return f"unexpected {located(error)}; {REPORT}"


def located(error: BaseException) -> str:
    """Name the type of an error, and the last line of this package in its traceback."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    frames = traceback.walk_tb(error.__traceback__)
    places = [
        f"{name.removeprefix(_PACKAGE).lstrip('.').replace('.', '/')}:{line}"
        for frame, line in frames
        if (name := str(frame.f_globals.get("__name__", ""))).split(".")[0] == _PACKAGE
    ]
    kind = type(error).__name__
    return f"{kind} at {places[-1]}" if places else kind


class StoreUnavailable(LogtoWebhooksError):
    """The database can't be used now: {problem}."""

    problem: str


class TimedOut(StoreUnavailable):
    """The database didn't finish in time, probably because another transaction holds a lock:
    {problem}."""


class RowRejected(LogtoWebhooksError):
    """The database rejected a row of this batch: {problem}."""

    problem: str


class ClaimLost(LogtoWebhooksError):
    """Another worker took over {count} claimed rows, because this worker's lease had expired."""

    count: int


class SchemaMismatch(LogtoWebhooksError):
    """The database's schema is {state}, but this release needs {needed}.
    Run: logto-webhooks migrate"""

    found: str | None
    needed: str

    def __init__(self, found: str | None, needed: str) -> None:
        state = f"at {found}" if found else "missing"
        super().__init__(found=found, needed=needed, state=state)


class DeliveryUnknown(LogtoWebhooksError):
    """No delivery has the id {listed}; nothing was done."""

    ids: tuple[int, ...]

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids=tuple(ids), listed=", ".join(map(str, ids)))


class JobUnknown(LogtoWebhooksError):
    """No job has the id {listed}; nothing was done."""

    ids: tuple[int, ...]

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids=tuple(ids), listed=", ".join(map(str, ids)))


_MOST_NAMES: Final = 12


class RetryLater(LogtoWebhooksError):
    """Raise it in a handler to run the handler again later, after `after_s` seconds if you give
    them."""

    after_s: float | None = None  # also for subclasses that don't set it

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__(after_s=after_s)
        self.after_s = None if after_s is None else float(after_s)


class Discard(LogtoWebhooksError):
    """Raise it in a handler to discard the job: there is nothing to do, and no retry."""

    why: str = "no reason given"

    def __init__(self, why: str = why) -> None:
        super().__init__(why=why)
        self.why = str(why)


class InvalidHandler(LogtoWebhooksError):
    """The handler {name} can't be registered: {problem}."""

    name: str
    problem: str


class TableIsReadOnly(LogtoWebhooksError):
    """A handler may read {table}, but not write to it or lock it: all deliveries would wait for the
    end of its transaction. To lock rows of your own in a join, write FOR UPDATE OF your_table."""

    table: str


class HandlerMismatch(LogtoWebhooksError):
    """The handler {name} handles {event} in another release, but not in this one, so it wasn't
    called. The job will be retried."""

    name: str
    event: str


class HandlerNotAwaited(LogtoWebhooksError):
    """The handler {name} returned an un-awaited {returned}. Make it an `async def` that awaits it,
    or let it finish its work before it returns."""

    name: str
    returned: str


class CalledFromEventLoop(LogtoWebhooksError):
    """`logto.call` would block the event loop of this thread. Use `await` instead."""


class HandlerUnknown(LogtoWebhooksError):
    """No handler is called {name!r}. {known}."""

    name: object
    known: str

    def __init__(self, name: object, names: Sequence[str]) -> None:
        near = get_close_matches(str(name), names, n=1)
        others = [other for other in names if other not in near]
        listed = [f"{name} (did you mean this?)" for name in near] + others[:_MOST_NAMES]
        known = f"Known handlers: {', '.join(listed)}" if listed else "No handlers are known"
        super().__init__(name=name, known=known)


class TransactionEnded(LogtoWebhooksError):
    """The handler committed or rolled back its transaction. Leave that to logto-webhooks: it
    commits when the handler returns, and rolls back when it raises."""


class WriterBusy(LogtoWebhooksError):
    """The handler holds SQLite's only write transaction, so it can't wait for another one. Use the
    handler's own with session=, or a handler without a transaction."""


class TimeLimitExceeded(LogtoWebhooksError):
    """The handler took longer than {seconds:g} s. Raise its time_limit, or make it faster."""

    seconds: float


class JobLost(LogtoWebhooksError):
    """The process ended or hung {times} times while the handler ran, so the job isn't retried.
    Fix the handler, then run: logto-webhooks jobs retry"""

    times: int


class ClaimsUnusable(LogtoWebhooksError):
    """The claims name no user of Logto: {problem}. Pass the claims of a verified token."""

    problem: str


class UserIsDeletedError(LogtoWebhooksError):
    """The user {id} was deleted in Logto; the token has outlived it. Respond as without a token."""

    id: str


class ApiNotConfigured(LogtoWebhooksError):
    """Logto's Management API isn't configured. Set LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and
    LOGTO_M2M_APP_SECRET to those of a machine-to-machine application with the role "Logto
    Management API access", which you create in Logto's console."""


class ExtraMissing(LogtoWebhooksError):
    """{feature} needs the extra "{extra}" of this package ({package} is missing)."""

    feature: str
    extra: str
    package: str


class LogtoUnreachable(LogtoWebhooksError):
    """Logto at {endpoint} can't be reached now: {problem}."""

    endpoint: str
    problem: str


class LogtoApiError(LogtoWebhooksError):
    """Logto at {endpoint} refuses: {problem}. {hint}"""

    endpoint: str
    problem: str
    hint: str


class InvalidApiResponse(LogtoWebhooksError):
    """Logto's response about the {kind} {id} can't be used: {problem}."""

    kind: str
    id: str
    problem: str


class WrongTenant(LogtoWebhooksError):
    """This seems to be another Logto: it has neither the users known here, nor a webhook that sent
    deliveries here. Nothing was marked as deleted. Set LOGTO_ENDPOINT to the Logto that sends the
    webhooks."""


class WebhookUnknown(LogtoWebhooksError):
    """It isn't clear which webhook you mean: {problem}. {hint}"""

    problem: str
    hint: str


class WebhookExists(LogtoWebhooksError):
    """The webhook {id} leads to {url} already. With another one, each delivery would arrive twice.
    Use its key, or delete it in Logto's console first."""

    id: str
    url: str


class WebhookChanged(LogtoWebhooksError):
    """The webhook {name} was {what} in Logto while it was in use. Check the webhooks with
    `logto-webhooks endpoint list`, then run this again."""

    name: str
    what: str


class KeyNotTold(LogtoWebhooksError):
    """Logto's API returns no usable signing key for the webhook {name} ({id}): {problem}. Its
    deliveries are rejected. Check and rotate its signing key in Logto's console, or delete the
    webhook and create another."""

    id: str
    name: str
    problem: str


class NoEnabledWebhook(LogtoWebhooksError):
    """Logto logs nothing, because it has no enabled webhook. Create one, whose URL need not answer:
    logto-webhooks endpoint create --url URL. Or use --tunnel-command."""


class AlreadyListening(LogtoWebhooksError):
    """Another `listen` {what}. Stop it first, or run this one {instead}."""

    what: str
    instead: str


class TunnelFailed(LogtoWebhooksError):
    """The tunnel {problem}. Run its command alone to see why: {command}"""

    problem: str
    command: str


class SignatureRejected(LogtoWebhooksError):
    """The signature is not valid: {reason}."""

    reason: str
    well_formed: bool = False  # one header, of the right shape, but of no known key


class NotADelivery(LogtoWebhooksError):
    """The signed body is not a delivery of Logto: {problem}."""

    problem: str


class BodyTooLarge(LogtoWebhooksError):
    """The body is larger than {limit} bytes. Raise LOGTO_WEBHOOKS_MAX_BODY_BYTES to accept it."""

    limit: int


class BodyTooSlow(LogtoWebhooksError):
    """The body didn't arrive within {seconds:.0f} s."""

    seconds: float


class BodyIncomplete(LogtoWebhooksError):
    """The client disconnected before the body had arrived."""


class BodyReadBefore(LogtoWebhooksError):
    """Something in the application read the request's body as a stream, so that the webhook can't
    read it. Let it await request.body() instead, or let it skip the webhook's path."""


class NoRoom(LogtoWebhooksError):
    """Request bodies use all memory reserved for them, and none became free in time."""


class UnknownPath(LogtoWebhooksError):
    """There is no webhook at {path!r}."""

    path: str


class MalformedEvent(LogtoWebhooksError):
    """{event} can't be applied, because a field that the sync needs is malformed: {problem}. The
    body stays in the inbox."""

    event: str
    problem: str


class UnknownEventName(LogtoWebhooksError):
    """Logto has no event named {name!r}. {hint}"""

    name: str
    hint: str


class NotStarted(LogtoWebhooksError):
    """A webhook was answered 503, because logto-webhooks isn't started. Start it in your
    application's lifespan: include its router, or enter `logto.lifespan()`."""


class SettingInvalid(LogtoWebhooksError):
    """{name} can't be used: {problem}."""

    name: str
    problem: str


class SigningKeyMissing(LogtoWebhooksError):
    """No signing key. Set LOGTO_WEBHOOK_SIGNING_KEY to the webhook's signing key: in Logto's
    console, Webhooks > your webhook > Settings > Signing key. Commands also read it from
    --signing-key or a file .env, an application only from its environment."""


class ServiceUnreachable(LogtoWebhooksError):
    """{url} can't be reached: {problem}. Is `logto-webhooks serve` running there?"""

    url: str
    problem: str


class SigningKeyExists(LogtoWebhooksError):
    """{path} holds a signing key already. It was not changed, and no webhook was created. Remove
    the line LOGTO_WEBHOOK_SIGNING_KEY first, or leave out --env-file and add the new key yourself
    (separate several with commas)."""

    path: str


class FileExists(LogtoWebhooksError):
    """{path} exists and was not changed. Remove it first, or name another file with --file."""

    path: str


class NotWritable(LogtoWebhooksError):
    """{path} can't be written: {problem}."""

    path: str
    problem: str


class AddressUnavailable(LogtoWebhooksError):
    """Can't listen on {host}:{port}: {problem}. Choose another with {option}."""

    host: str
    port: int
    problem: str
    option: str


__all__ = [
    "AddressUnavailable",
    "AlreadyListening",
    "ApiNotConfigured",
    "BodyIncomplete",
    "BodyReadBefore",
    "BodyTooLarge",
    "BodyTooSlow",
    "CalledFromEventLoop",
    "ClaimLost",
    "ClaimsUnusable",
    "DeliveryUnknown",
    "Discard",
    "ExtraMissing",
    "FileExists",
    "HandlerMismatch",
    "HandlerNotAwaited",
    "HandlerUnknown",
    "InvalidApiResponse",
    "InvalidHandler",
    "JobLost",
    "JobUnknown",
    "KeyNotTold",
    "LogtoApiError",
    "LogtoUnreachable",
    "LogtoWebhooksError",
    "MalformedEvent",
    "NoEnabledWebhook",
    "NoRoom",
    "NotADelivery",
    "NotStarted",
    "NotWritable",
    "RetryLater",
    "RowRejected",
    "SchemaMismatch",
    "ServiceUnreachable",
    "SettingInvalid",
    "SignatureRejected",
    "SigningKeyExists",
    "SigningKeyMissing",
    "StoreUnavailable",
    "TableIsReadOnly",
    "TimeLimitExceeded",
    "TimedOut",
    "TransactionEnded",
    "TunnelFailed",
    "UnknownEventName",
    "UnknownPath",
    "UserIsDeletedError",
    "WebhookChanged",
    "WebhookExists",
    "WebhookUnknown",
    "WriterBusy",
    "WrongTenant",
    "describe",
]
