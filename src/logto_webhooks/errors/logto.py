"""What goes wrong between here and Logto."""

from __future__ import annotations

from logto_webhooks.errors.base import LogtoWebhooksError


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


class AnotherLogto(LogtoWebhooksError):
    """This Logto has neither a hook that sent something here nor the users known here, so
    none of them is taken for deleted. Set LOGTO_ENDPOINT to the Logto whose webhooks come here."""


class EndpointUnknown(LogtoWebhooksError):
    """It isn't clear which webhook is meant: {problem}. {hint}"""

    problem: str
    hint: str


class EndpointExists(LogtoWebhooksError):
    """The webhook {id} leads to {url} already; with another, each delivery would come twice.
    Use its key, or delete it in Logto's console first."""

    id: str
    url: str


class EndpointGone(LogtoWebhooksError):
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


class NothingLogged(LogtoWebhooksError):
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
