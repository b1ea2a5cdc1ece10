"""Logto's webhooks, received durably, and an exact copy of Logto's users and organizations."""

from logto_webhooks.core import events
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.signature import VerifiedBody, sign, verify
from logto_webhooks.errors import LogtoWebhooksError

__all__ = ["Delivery", "LogtoWebhooksError", "VerifiedBody", "events", "sign", "verify"]
