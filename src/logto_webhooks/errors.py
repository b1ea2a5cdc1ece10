"""Every error of the product. The docstring is the message; its data are attributes."""

from __future__ import annotations

import inspect


class LogtoWebhooksError(Exception):
    """Something in logto-webhooks went wrong."""

    def __init__(self, **data: object) -> None:
        super().__init__(*data.values())
        self.__dict__.update(data)

    def __str__(self) -> str:
        template = inspect.cleandoc(type(self).__doc__ or type(self).__name__)
        return " ".join(template.format(**self.__dict__).split())


def described(error: Exception) -> str:
    """Name an error without what it may quote of a payload or a statement."""
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    return f"unexpected {type(error).__name__}"


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


class NotTheWebhook(LogtoWebhooksError):
    """There is no webhook at {path!r}."""

    path: str


class MalformedEvent(LogtoWebhooksError):
    """{event} can't be applied, because a field that the sync needs is not as expected: {problem}.
    The body is kept in the inbox."""

    event: str
    problem: str


class StoreUnavailable(LogtoWebhooksError):
    """The database can't be used now: {problem}."""

    problem: str


class RowRejected(LogtoWebhooksError):
    """The database refuses a row of this batch: {problem}."""

    problem: str


class ClaimLost(LogtoWebhooksError):
    """Another worker took over {count} deliveries after this one's lease had run out."""

    count: int


class SchemaMismatch(LogtoWebhooksError):
    """The database's schema is at {found}, this release needs {needed}.
    Run: logto-webhooks migrate"""

    found: str
    needed: str


class SettingInvalid(LogtoWebhooksError):
    """{name} can't be used: {problem}."""

    name: str
    problem: str


class SigningKeyMissing(LogtoWebhooksError):
    """No signing key. Set LOGTO_WEBHOOK_SIGNING_KEY (or --signing-key) to the hook's signing key,
    which stands in Logto's console under Webhooks > your webhook > Settings > Signing key."""


class UnknownEventName(LogtoWebhooksError):
    """Logto has no event named {name!r}. {hint}"""

    name: str
    hint: str


class Unreachable(LogtoWebhooksError):
    """{url} can't be reached: {problem}. Is `logto-webhooks serve` running there?"""

    url: str
    problem: str


class ApiNotConfigured(LogtoWebhooksError):
    """Logto's Management API isn't configured. Set LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and
    LOGTO_M2M_APP_SECRET: a machine-to-machine application of Logto's console that has the role
    "Logto Management API access"."""


class LogtoUnreachable(LogtoWebhooksError):
    """Logto at {endpoint} can't be asked now: {problem}."""

    endpoint: str
    problem: str


class LogtoRefused(LogtoWebhooksError):
    """Logto at {endpoint} refuses: {problem}. {hint}"""

    endpoint: str
    problem: str
    hint: str


class AnswerMalformed(LogtoWebhooksError):
    """What Logto answers about the {kind} {id} can't be used: {problem}."""

    kind: str
    id: str
    problem: str


class NotStarted(LogtoWebhooksError):
    """A webhook came before logto-webhooks was started, and was answered 503. Let the
    application's lifespan start it: include its router, or enter `logto.lifespan()`."""


class ClaimsUnusable(LogtoWebhooksError):
    """The claims name no user of Logto: {problem}. Give those of a verified token, with its sub."""

    problem: str


class UserDeleted(LogtoWebhooksError):
    """The user {id} was deleted in Logto; its token outlived it. Answer as for no token at all."""

    id: str


class RetryLater(LogtoWebhooksError):
    """Raise it in a handler: try again later; after so many seconds, if that is given."""

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__(after_s=after_s)
        self.after_s = None if after_s is None else float(after_s)


class Discard(LogtoWebhooksError):
    """Raise it in a handler: nothing is to be done, and nothing to be tried again."""

    def __init__(self, why: str) -> None:
        super().__init__(why=why)
        self.why = str(why)


class HandlerRefused(LogtoWebhooksError):
    """The handler {name} can't be registered: {problem}."""

    name: str
    problem: str


class HandlerNotAwaited(LogtoWebhooksError):
    """The handler {name} returned what nobody runs, of type {returned}. Make it an `async def` that
    awaits it, or let it do its work before it returns."""

    name: str
    returned: str


class CalledOnTheLoop(LogtoWebhooksError):
    """`logto.call` would stop the event loop that runs on this thread. Write `await` instead."""


class SessionNeeded(LogtoWebhooksError):
    """The handler holds the only transaction in which SQLite is written, and would wait for
    itself. Let that be used: give `ensure_user` the handler's own, session=session."""


class HandlerUnknown(LogtoWebhooksError):
    """No handler is called {name!r}; there are: {known}."""

    name: object
    known: str


class DeliveryUnknown(LogtoWebhooksError):
    """No delivery has the id {id}; nothing was done."""

    id: int


class TransactionEnded(LogtoWebhooksError):
    """The handler committed or rolled back the transaction that it was given. Leave that to
    logto-webhooks: it commits when the handler returns, and rolls back when it raises."""


class TimeLimitExceeded(LogtoWebhooksError):
    """The handler took longer than {seconds:g} s. Raise its time_limit, or let it do less."""

    seconds: float


class JobLost(LogtoWebhooksError):
    """The process ended, or was stuck, {times} times while the handler ran, so it isn't tried
    again by itself. Mend it, then: logto-webhooks jobs retry."""

    times: int


class AnotherLogto(LogtoWebhooksError):
    """This Logto has neither a hook that sent something here nor the users known here, so
    none of them is taken for deleted. Set LOGTO_ENDPOINT to the Logto whose webhooks come here."""


class EndpointUnknown(LogtoWebhooksError):
    """It isn't clear which webhook is meant: {problem}. Name one by its id; Logto has: {known}."""

    problem: str
    known: str


class EndpointExists(LogtoWebhooksError):
    """The webhook {id} leads to {url} already; with another, each delivery would come twice.
    Use its key, or delete it in Logto's console first."""

    id: str
    url: str


class KeyInTheWay(LogtoWebhooksError):
    """{path} holds a signing key already and is left as it is, and no webhook was made. Remove the
    line LOGTO_WEBHOOK_SIGNING_KEY first, or leave out --env-file and put the key there by hand
    (several are separated by commas)."""

    path: str


class NothingLogged(LogtoWebhooksError):
    """Logto has no enabled webhook to read the log of, so it logs nothing. Make one, whose address
    need not answer: logto-webhooks endpoint create --url URL. Or give --tunnel-command."""


class EndpointGone(LogtoWebhooksError):
    """The webhook {name} was {what} in Logto while it was in use. See what there is with
    `logto-webhooks endpoint list`, then run this again."""

    name: str
    what: str


class AlreadyListening(LogtoWebhooksError):
    """Another `listen` {what}. End that one first, or run this one {instead}."""

    what: str
    instead: str


class TunnelFailed(LogtoWebhooksError):
    """The tunnel {problem}. Run its command by itself to see why: {command}"""

    problem: str
    command: str


class FileInTheWay(LogtoWebhooksError):
    """{path} exists and is left as it is. Remove it first, or name another file with --file."""

    path: str


class NotWritable(LogtoWebhooksError):
    """{path} can't be written: {problem}."""

    path: str
    problem: str


class PortTaken(LogtoWebhooksError):
    """Can't listen on {host}:{port}: {problem}. Choose another with --host or --port."""

    host: str
    port: int
    problem: str
