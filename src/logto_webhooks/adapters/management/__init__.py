"""Logto's Management API over HTTP: within a budget, with its own token, patient."""

from logto_webhooks.adapters.management.client import Management

__all__ = ["Management"]
