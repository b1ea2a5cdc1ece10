"""What is set in a way that can't be, and what is in the way here."""

from __future__ import annotations

from logto_webhooks.errors.base import LogtoWebhooksError


class SettingInvalid(LogtoWebhooksError):
    """{name} can't be used: {problem}."""

    name: str
    problem: str


class SigningKeyMissing(LogtoWebhooksError):
    """No signing key. Set LOGTO_WEBHOOK_SIGNING_KEY to the hook's signing key, which stands in
    Logto's console under Webhooks > your webhook > Settings > Signing key. Commands take it from
    --signing-key or a file .env, too, an application only from its environment."""


class Unreachable(LogtoWebhooksError):
    """{url} can't be reached: {problem}. Is `logto-webhooks serve` running there?"""

    url: str
    problem: str


class KeyInTheWay(LogtoWebhooksError):
    """{path} holds a signing key already and is left as it is, and no webhook was made. Remove the
    line LOGTO_WEBHOOK_SIGNING_KEY first, or leave out --env-file and put the key there by hand
    (several are separated by commas)."""

    path: str


class FileInTheWay(LogtoWebhooksError):
    """{path} exists and is left as it is. Remove it first, or name another file with --file."""

    path: str


class NotWritable(LogtoWebhooksError):
    """{path} can't be written: {problem}."""

    path: str
    problem: str


class PortTaken(LogtoWebhooksError):
    """Can't listen on {host}:{port}: {problem}. Choose another with {option}."""

    host: str
    port: int
    problem: str
    option: str
