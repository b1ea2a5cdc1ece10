"""Errors that users of the package see. The docstring is the message."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

# What is said of an error that nobody foresaw.
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
    """Name an error without what it may quote of a payload or a statement; one that nobody foresaw
    with its place in the code, and where to report it."""
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    return f"unexpected {located(error)}; {REPORT}"


def located(error: BaseException) -> str:
    """The kind of an error, and the last line of this package that it went through."""
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
    """The database didn't finish in time, most likely because another transaction holds a lock:
    {problem}."""


class RowRejected(LogtoWebhooksError):
    """The database refuses a row of this batch: {problem}."""

    problem: str


class ClaimLost(LogtoWebhooksError):
    """Another worker took over what this one had claimed ({count}): its lease had run out."""

    count: int


class SchemaMismatch(LogtoWebhooksError):
    """The database's schema is {state}, this release needs {needed}.
    Run: logto-webhooks migrate"""

    found: str | None
    needed: str

    def __init__(self, found: str | None, needed: str) -> None:
        state = f"at {found}" if found else "not there yet"
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
    """Raise it in a handler: try again later; after so many seconds, if that is given."""

    after_s: float | None = None  # of a subclass that doesn't say it, too

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__(after_s=after_s)
        self.after_s = None if after_s is None else float(after_s)


class Discard(LogtoWebhooksError):
    """Raise it in a handler: nothing is to be done, and nothing to be tried again."""

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
    """The handler {name} is for {event} in another release, but not in this one, so it wasn't
    called. It is tried again, there or here."""

    name: str
    event: str


class HandlerNotAwaited(LogtoWebhooksError):
    """The handler {name} returned what nobody runs, of type {returned}. Make it an `async def` that
    awaits it, or let it do its work before it returns."""

    name: str
    returned: str


class CalledFromEventLoop(LogtoWebhooksError):
    """`logto.call` would stop the event loop that runs on this thread. Write `await` instead."""


class HandlerUnknown(LogtoWebhooksError):
    """No handler is called {name!r}; {known}."""

    name: object
    known: str

    def __init__(self, name: object, names: Sequence[str]) -> None:
        near = get_close_matches(str(name), names, n=1)
        others = [each for each in names if each not in near]
        told = [f"{each} (did you mean that?)" for each in near] + others[:_MOST_NAMES]
        known = f"there are: {', '.join(told)}" if told else "there is none"
        super().__init__(name=name, known=known)


class TransactionEnded(LogtoWebhooksError):
    """The handler committed or rolled back the transaction that it was given. Leave that to
    logto-webhooks: it commits when the handler returns, and rolls back when it raises."""


class WriterBusy(LogtoWebhooksError):
    """The handler has SQLite's one writer, so it can't wait for another transaction: do that in
    its own, with session=, or in a handler that asks for none."""


class TimeLimitExceeded(LogtoWebhooksError):
    """The handler took longer than {seconds:g} s. Raise its time_limit, or let it do less."""

    seconds: float


class JobLost(LogtoWebhooksError):
    """The process ended, or was stuck, {times} times while the handler ran, so it isn't tried
    again by itself. Mend it, then: logto-webhooks jobs retry."""

    times: int


class ClaimsUnusable(LogtoWebhooksError):
    """The claims name no user of Logto: {problem}. Give those of a verified token, with its sub."""

    problem: str


class UserIsDeletedError(LogtoWebhooksError):
    """The user {id} was deleted in Logto; its token outlived it. Answer as for no token at all."""

    id: str


class ApiNotConfigured(LogtoWebhooksError):
    """Logto's Management API isn't configured. Set LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and
    LOGTO_M2M_APP_SECRET: a machine-to-machine application of Logto's console that has the role
    "Logto Management API access"."""


class LogtoUnreachable(LogtoWebhooksError):
    """Logto at {endpoint} can't be asked now: {problem}."""

    endpoint: str
    problem: str


class LogtoApiError(LogtoWebhooksError):
    """Logto at {endpoint} refuses: {problem}. {hint}"""

    endpoint: str
    problem: str
    hint: str


class InvalidApiResponse(LogtoWebhooksError):
    """What Logto answers about the {kind} {id} can't be used: {problem}."""

    kind: str
    id: str
    problem: str


class WrongTenant(LogtoWebhooksError):
    """This Logto has neither a hook that sent something here nor the users known here, so
    none of them is taken for deleted. Set LOGTO_ENDPOINT to the Logto whose webhooks come here."""


class WebhookUnknown(LogtoWebhooksError):
    """It isn't clear which webhook is meant: {problem}. {hint}"""

    problem: str
    hint: str


class WebhookExists(LogtoWebhooksError):
    """The webhook {id} leads to {url} already; with another, each delivery would come twice.
    Use its key, or delete it in Logto's console first."""

    id: str
    url: str


class WebhookChanged(LogtoWebhooksError):
    """The webhook {name} was {what} in Logto while it was in use. See what there is with
    `logto-webhooks endpoint list`, then run this again."""

    name: str
    what: str


class KeyNotTold(LogtoWebhooksError):
    """Logto's answer about the webhook {name} ({id}) has no signing key that can be used:
    {problem}. It isn't accepted here. Look at the webhook's signing key in Logto's console, and
    change it there; or delete the webhook, and make another."""

    id: str
    name: str
    problem: str


class NoEnabledWebhook(LogtoWebhooksError):
    """Logto has no enabled webhook to read the log of, so it logs nothing. Make one, whose address
    need not answer: logto-webhooks endpoint create --url URL. Or give --tunnel-command."""


class AlreadyListening(LogtoWebhooksError):
    """Another `listen` {what}. End that one first, or run this one {instead}."""

    what: str
    instead: str


class TunnelFailed(LogtoWebhooksError):
    """The tunnel {problem}. Run its command by itself to see why: {command}"""

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
    """The client went away before the body had arrived."""


class BodyReadBefore(LogtoWebhooksError):
    """Something in the application read the request's body as a stream before the webhook could, so
    nothing of it is left. Let it await request.body() instead, or leave the webhook's path out."""


class NoRoom(LogtoWebhooksError):
    """The memory for request bodies in flight is used up, and none became free in time."""


class UnknownPath(LogtoWebhooksError):
    """There is no webhook at {path!r}."""

    path: str


class MalformedEvent(LogtoWebhooksError):
    """{event} can't be applied, because a field that the sync needs is not as expected: {problem}.
    The body is kept in the inbox."""

    event: str
    problem: str


class UnknownEventName(LogtoWebhooksError):
    """Logto has no event named {name!r}. {hint}"""

    name: str
    hint: str


class NotStarted(LogtoWebhooksError):
    """A webhook came before logto-webhooks was started, and was answered 503. Let the
    application's lifespan start it: include its router, or enter `logto.lifespan()`."""


class SettingInvalid(LogtoWebhooksError):
    """{name} can't be used: {problem}."""

    name: str
    problem: str


class SigningKeyMissing(LogtoWebhooksError):
    """No signing key. Set LOGTO_WEBHOOK_SIGNING_KEY to the hook's signing key, which stands in
    Logto's console under Webhooks > your webhook > Settings > Signing key. Commands take it from
    --signing-key or a file .env, too, an application only from its environment."""


class ServiceUnreachable(LogtoWebhooksError):
    """{url} can't be reached: {problem}. Is `logto-webhooks serve` running there?"""

    url: str
    problem: str


class SigningKeyExists(LogtoWebhooksError):
    """{path} holds a signing key already and is left as it is, and no webhook was made. Remove the
    line LOGTO_WEBHOOK_SIGNING_KEY first, or leave out --env-file and put the key there by hand
    (several are separated by commas)."""

    path: str


class FileExists(LogtoWebhooksError):
    """{path} exists and is left as it is. Remove it first, or name another file with --file."""

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
