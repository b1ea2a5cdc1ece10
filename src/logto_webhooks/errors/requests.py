"""What a request or a delivery can be refused for."""

from __future__ import annotations

from logto_webhooks.errors.base import LogtoWebhooksError


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


class NotTheWebhook(LogtoWebhooksError):
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
