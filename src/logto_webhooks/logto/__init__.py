"""Logto's Management API."""

from logto_webhooks.logto.client import ManagementClient

__all__ = ["ManagementClient"]
