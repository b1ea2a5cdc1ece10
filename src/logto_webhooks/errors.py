"""Errors that users of the package see. The docstring is the message."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

# Added to the message of an unexpected error.
REPORT: Final = "this is a bug, please report it: docs/troubleshooting.md#unexpected"
_PACKAGE: Final = "logto_webhooks"
_TWO_STOPS: Final = re.compile(r"(?<=[^.\s])\.\.(?= |$)")


class LogtoWebhooksError(Exception):
    """The base class of all errors of logto-webhooks."""

    def __init__(self, **data: object) -> None:
        super().__init__(*data.values())
        self.__dict__.update(data)

    def __str__(self) -> str:
        template = inspect.cleandoc(type(self).__doc__ or type(self).__name__)
        return format_message(template, **self.__dict__)


def format_message(template: str, /, **data: object) -> str:
    """Fill in a message, as one line. A value that ends with a full stop adds no second one."""
    return _TWO_STOPS.sub(".", " ".join(template.format(**data).split()))


def describe(error: BaseException) -> str:
    """Describe an error without quoting a payload or a statement. For an unexpected error, name its
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


class NoAnswer(StoreUnavailable):
    """The database can't be used now: {problem}."""


class TimedOut(StoreUnavailable):
    """The database didn't answer in time, probably because another transaction holds a lock:
    {problem}."""


class RowRejected(LogtoWebhooksError):
    """The database rejected a row of this batch: {problem}."""

    problem: str


# Errors that a smaller transaction may not have: it is refused, locked, or too large.
WORTH_DIVIDING: Final = (RowRejected, TimedOut, NoAnswer)


class ClaimLost(LogtoWebhooksError):
    """This worker's lease expired, and another worker took over {count} of its claimed rows."""

    count: int


class SchemaMismatch(LogtoWebhooksError):
    """{place} has {tables}. Run: logto-webhooks migrate"""

    place: str
    found: str | None
    needed: str

    def __init__(self, place: str, found: str | None, needed: str) -> None:
        tables = "none of the tables"
        if found:
            tables = f"the tables of version {found}, but this release needs version {needed}"
        super().__init__(place=place, found=found, needed=needed, tables=tables)


class SchemaUnknown(SchemaMismatch):
    """{place} has {tables}. No release has version {found}: restore the version in the table
    logto_schema_version, or use another database."""


class DeliveryUnknown(LogtoWebhooksError):
    """Unknown delivery ID: {listed}. Nothing was done. List deliveries with:
    logto-webhooks deliveries list"""

    ids: tuple[int, ...]

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids=tuple(ids), listed=", ".join(map(str, ids)))


class JobUnknown(LogtoWebhooksError):
    """Unknown job ID: {listed}. Nothing was done. List jobs with: logto-webhooks jobs list"""

    ids: tuple[int, ...]

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids=tuple(ids), listed=", ".join(map(str, ids)))


_MOST_NAMES: Final = 12
ASKED_LATER: Final = "asked for a retry"


class RetryLater(LogtoWebhooksError):
    """Raise this in a handler to retry its job later: after `after_s` seconds, or after the usual
    wait. `jobs show` shows the reason `why`. Without a reason, you can pass the seconds as the
    first argument.
    """

    # also for subclasses that don't set them
    why: str | None = None
    after_s: float | None = None

    def __init__(self, why: str | float | None = None, after_s: float | None = None) -> None:
        if after_s is None and isinstance(why, int | float):
            why, after_s = None, why
        super().__init__(why=why, after_s=after_s)
        self.why = None if why is None else str(why)
        self.after_s = None if after_s is None else float(after_s)

    def __str__(self) -> str:
        when = "" if self.after_s is None else f" in {self.after_s:g} s"
        return f"{ASKED_LATER}{when}{f': {self.why}' if self.why else ''}"


class Discard(LogtoWebhooksError):
    """Raise this in a handler to discard its job without a retry."""

    why: str = "no reason given"

    def __init__(self, why: str = why) -> None:
        super().__init__(why=why)
        self.why = str(why)


class InvalidHandler(LogtoWebhooksError):
    """The handler {name} can't be registered: {problem}."""

    name: str
    problem: str


class InvalidMapping(LogtoWebhooksError):
    """The mapping of {table} can't be registered: {problem}."""

    table: str
    problem: str


class MapFileInvalid(LogtoWebhooksError):
    """{place}: {problem}."""

    place: str
    problem: str


class NoUsersTable(LogtoWebhooksError):
    """No table of users with an email was found, so write the file yourself, as in
    docs/how-to/your-own-tables-without-code.md. The tables: {names}."""

    names: str


class RowWaits(LogtoWebhooksError):
    """The job waits for its row in {table}: {reason}."""

    table: str
    reason: str


class UserNotReady(LogtoWebhooksError):
    """The user {id} has no row in {table} yet: {reason}. Answer 503 with Retry-After. If
    LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and LOGTO_M2M_APP_SECRET are set, such users are first read
    from Logto."""

    id: str
    table: str
    reason: str


class UserHasNoRow(LogtoWebhooksError):
    """The user {id} has no row in {table} and won't get one, because {reason}. Answer 403: a retry
    doesn't help."""

    id: str
    table: str
    reason: str


class TableIsReadOnly(LogtoWebhooksError):
    """A handler can read {table}, but can't write to it or lock it: all deliveries would have to
    wait for the handler. To lock only your own rows in a join, use FOR UPDATE OF your_table."""

    table: str


class HandlerMismatch(LogtoWebhooksError):
    """The handler {name} is registered for {event} in another release of the application, but not
    in this one. It wasn't called, and its job waits for a process of that release."""

    name: str
    event: str


class HandlerNotAwaited(LogtoWebhooksError):
    """The handler {name} returned an un-awaited {returned}. Make the handler an `async def`
    function, and await the {returned} in it."""

    name: str
    returned: str


class CalledFromEventLoop(LogtoWebhooksError):
    """`logto.call` would block the event loop of this thread. Use `await` instead."""


class HandlerUnknown(LogtoWebhooksError):
    """There is no handler named {name!r}. {known}."""

    name: object
    known: str

    def __init__(self, name: object, names: Sequence[str]) -> None:
        near = get_close_matches(str(name), names, n=1)
        others = [other for other in names if other not in near]
        listed = [f"{name} (did you mean this?)" for name in near] + others[:_MOST_NAMES]
        known = f"Known handlers: {', '.join(listed)}" if listed else "No handlers are registered"
        super().__init__(name=name, known=known)


class NotForRows(LogtoWebhooksError):
    """The handler {name} can't be run for existing rows, because it is for {events}. Only handlers
    of LocalUserCreated, LocalOrganizationCreated or LocalMemberAdded can."""

    name: str
    events: str


class NoLocalHandlers(LogtoWebhooksError):
    """{which} so a backfill would run no handlers. Nothing was done. To register your handlers,
    start your application, or `serve` or `worker` with --app. You can also backfill now, and later
    run: logto-webhooks handlers run NAME"""

    def __init__(self, names: Sequence[str]) -> None:
        which = "No handlers are registered,"
        if names:
            listed = ", ".join(names[:_MOST_NAMES])
            which = f"None of the registered handlers ({listed}) is for local events,"
        super().__init__(which=which)


class TransactionEnded(LogtoWebhooksError):
    """The handler committed or rolled back its transaction, or closed its session. Remove this
    call: logto-webhooks commits when the handler returns, and rolls back when it raises an
    exception. On SQLite, a constraint or trigger with ROLLBACK also ends the transaction."""


class WriterBusy(LogtoWebhooksError):
    """The handler already holds SQLite's only write transaction, so this call can't get another
    one. Pass the handler's session as session=, or use a handler without a transaction."""


class TimeLimitExceeded(LogtoWebhooksError):
    """The handler took longer than {seconds:g} s. Increase its time_limit, or make it faster."""

    seconds: float


class JobLost(LogtoWebhooksError):
    """The process ended or hung {times} times while the handler ran, so the job isn't retried.
    Fix the handler, then run: logto-webhooks jobs retry"""

    times: int


class ClaimsUnusable(LogtoWebhooksError):
    """The claims don't identify a user: {problem}. Pass the claims of a user's verified token."""

    problem: str


class UserIsDeletedError(LogtoWebhooksError):
    """The user {id} was deleted in Logto, but the token is still valid. Answer 401."""

    id: str


class ApiNotConfigured(LogtoWebhooksError):
    """Logto's Management API isn't configured, because these are missing: {names}. In Logto's
    console, create a machine-to-machine application, and assign it the role "Logto Management API
    access". Set LOGTO_M2M_APP_ID and LOGTO_M2M_APP_SECRET to its ID and secret, and LOGTO_ENDPOINT
    to Logto's address. To run the service without the API, set none of the three."""

    missing: tuple[str, ...]

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(missing=tuple(missing), names=", ".join(missing))


class ApplicationMissing(LogtoWebhooksError):
    """No tables are mapped. Pass --app module:name, or write the file logto-webhooks.toml."""


class ExtraMissing(LogtoWebhooksError):
    """{feature} needs {package}, which isn't installed. Install the extra "{extra}" of
    logto-webhooks, or run: pip install {package}"""

    feature: str
    extra: str
    package: str


class LogtoUnreachable(LogtoWebhooksError):
    """Can't reach Logto at {endpoint}: {problem}. Check LOGTO_ENDPOINT, and that Logto is
    running."""

    endpoint: str
    problem: str


class LogtoApiError(LogtoWebhooksError):
    """Logto at {endpoint} refused the request: {problem}. {hint}"""

    endpoint: str
    problem: str
    hint: str


class InvalidApiResponse(LogtoWebhooksError):
    """Logto's response about the {kind} {id} can't be used: {problem}."""

    kind: str
    id: str
    problem: str


class WrongTenant(LogtoWebhooksError):
    """LOGTO_ENDPOINT seems to be another Logto: it has neither the known users, nor a webhook that
    sent deliveries. Nothing was marked as deleted. Set LOGTO_ENDPOINT to the Logto that sends the
    webhooks."""


class WebhookUnknown(LogtoWebhooksError):
    """Can't select a webhook: {problem}. {hint}"""

    problem: str
    hint: str


class WebhookExists(LogtoWebhooksError):
    """The webhook {id} already sends to {url}. With a second one, each delivery would arrive twice.
    Use the existing webhook's key, or delete it in Logto's console first."""

    id: str
    url: str


class WebhookChanged(LogtoWebhooksError):
    """The webhook {name} was {what} in Logto while this command was using it. Check the webhooks
    with `logto-webhooks endpoint list`, then run the command again."""

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
    """Logto has no enabled webhook, so its log is empty. Use --tunnel-command, or create a webhook
    with any URL: logto-webhooks endpoint create --url URL"""


class AlreadyListening(LogtoWebhooksError):
    """Another `listen` {what}. Stop it first, or run this one {instead}."""

    what: str
    instead: str


class TunnelFailed(LogtoWebhooksError):
    """The tunnel {problem}. To find out why, run its command by itself: {command}"""

    problem: str
    command: str


class SignatureRejected(LogtoWebhooksError):
    """The signature is invalid: {reason}."""

    reason: str
    well_formed: bool = False  # one header, of the right shape, but of no known key


class NotADelivery(LogtoWebhooksError):
    """The signed body isn't a delivery from Logto: {problem}."""

    problem: str


class BodyTooLarge(LogtoWebhooksError):
    """The body is larger than {limit} bytes. To accept it, increase
    LOGTO_WEBHOOKS_MAX_BODY_BYTES."""

    limit: int


class BodyTooSlow(LogtoWebhooksError):
    """The body didn't arrive within {seconds:.0f} s."""

    seconds: float


class BodyIncomplete(LogtoWebhooksError):
    """The client disconnected before the whole body had arrived."""


class BodyReadBefore(LogtoWebhooksError):
    """Other code in the application read the request's body as a stream, so the webhook can't read
    it. Change that code to await request.body(), or to skip the webhook's path."""


class NoRoom(LogtoWebhooksError):
    """The memory for request bodies is full, and no memory became free in time."""


class UnknownPath(LogtoWebhooksError):
    """There is no webhook at {path!r}."""

    path: str


class MalformedEvent(LogtoWebhooksError):
    """{event} can't be applied, because a required field is malformed: {problem}. The body stays in
    the inbox."""

    event: str
    problem: str


class UnknownEventName(LogtoWebhooksError):
    """Unknown event {name!r}. {hint}"""

    name: str
    hint: str


class NotStarted(LogtoWebhooksError):
    """A webhook was answered 503, because logto-webhooks isn't running. Start it in your
    application's lifespan: include its router, or enter `logto.lifespan()`."""


class StartedElsewhere(LogtoWebhooksError):
    """This LogtoWebhooks object is already started on another event loop, and it can only use one
    at a time. Create an object for each event loop, with an engine of its own. From other threads,
    use its method call()."""


class SettingInvalid(LogtoWebhooksError):
    """{name} can't be used: {problem}."""

    name: str
    problem: str


class SigningKeyMissing(LogtoWebhooksError):
    """No signing key is set{where}. Set LOGTO_WEBHOOK_SIGNING_KEY to the webhook's signing key: in
    Logto's console, Webhooks > your webhook > Settings > Signing key. To try it without Logto,
    any text of 16 or more characters will do. Commands also read it from --signing-key or the file
    .env, but your own server doesn't read .env."""

    def __init__(self, empty: str | None = None) -> None:
        """`empty` is the variable that is set to nothing."""
        super().__init__(where=f": {empty} is empty" if empty else "")


class ServiceUnreachable(LogtoWebhooksError):
    """Can't reach {url}: {problem}. Check that `logto-webhooks serve` is running there."""

    url: str
    problem: str


class SigningKeyExists(LogtoWebhooksError):
    """{path} already contains a signing key, so no webhook was created. Remove the line
    LOGTO_WEBHOOK_SIGNING_KEY first, or leave out --env-file and add the new key yourself (separate
    several keys with commas)."""

    path: str


class FileExists(LogtoWebhooksError):
    """{path} already exists. Remove it first, or choose another file with --file."""

    path: str


class NotWritable(LogtoWebhooksError):
    """Can't write {path}: {problem}."""

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
    "ApplicationMissing",
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
    "MapFileInvalid",
    "NoAnswer",
    "NoEnabledWebhook",
    "NoLocalHandlers",
    "NoRoom",
    "NoUsersTable",
    "NotADelivery",
    "NotForRows",
    "NotStarted",
    "NotWritable",
    "RetryLater",
    "RowRejected",
    "SchemaMismatch",
    "SchemaUnknown",
    "ServiceUnreachable",
    "SettingInvalid",
    "SignatureRejected",
    "SigningKeyExists",
    "SigningKeyMissing",
    "StartedElsewhere",
    "StoreUnavailable",
    "TableIsReadOnly",
    "TimeLimitExceeded",
    "TimedOut",
    "TransactionEnded",
    "TunnelFailed",
    "UnknownEventName",
    "UnknownPath",
    "UserHasNoRow",
    "UserIsDeletedError",
    "UserNotReady",
    "WebhookChanged",
    "WebhookExists",
    "WebhookUnknown",
    "WriterBusy",
    "WrongTenant",
    "describe",
]
