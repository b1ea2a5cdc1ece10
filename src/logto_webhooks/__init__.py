"""Receives Logto's webhooks and keeps an exact copy of Logto's users and organizations."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logto_webhooks import events, tables
    from logto_webhooks.admin import HandlerInfo
    from logto_webhooks.app import LogtoWebhooks
    from logto_webhooks.apply.replay import ReplayResult
    from logto_webhooks.database.mapped_rows import MappingCounts
    from logto_webhooks.database.records import FoundRow, RefetchNeed
    from logto_webhooks.deliveries import (
        DeliveryFilter,
        DeliveryState,
        MappingStatus,
        Status,
        StoredDelivery,
    )
    from logto_webhooks.doctor.faults import Finding
    from logto_webhooks.errors import (
        Discard,
        InvalidMapping,
        LogtoWebhooksError,
        RetryLater,
        UserHasNoRow,
        UserIsDeletedError,
        UserNotReady,
    )
    from logto_webhooks.events.local import OrganizationRow, UserRow
    from logto_webhooks.explain import Explained
    from logto_webhooks.handlers.existing import ExistingRows
    from logto_webhooks.jobs import Delivery, JobFilter, JobRow, JobState
    from logto_webhooks.logto.webhooks import RotationResult, TestResult, Webhook
    from logto_webhooks.mapping.check import Difference
    from logto_webhooks.mapping.declare_pairs import MemberRoleRow, MemberRow, UserRoleRow
    from logto_webhooks.mapping.tally import AppliedMapping
    from logto_webhooks.reconcile.fetch import UserComparison
    from logto_webhooks.reconcile.reconcile import ReconcileResult
    from logto_webhooks.reconcile.recover import RecoverResult
    from logto_webhooks.signing_keys import VerifiedBody, sign, verify

__all__ = [
    "AppliedMapping",
    "Delivery",
    "DeliveryFilter",
    "DeliveryState",
    "Difference",
    "Discard",
    "ExistingRows",
    "Explained",
    "Finding",
    "FoundRow",
    "HandlerInfo",
    "InvalidMapping",
    "JobFilter",
    "JobRow",
    "JobState",
    "LogtoWebhooks",
    "LogtoWebhooksError",
    "MappingCounts",
    "MappingStatus",
    "MemberRoleRow",
    "MemberRow",
    "OrganizationRow",
    "ReconcileResult",
    "RecoverResult",
    "RefetchNeed",
    "ReplayResult",
    "RetryLater",
    "RotationResult",
    "Status",
    "StoredDelivery",
    "TestResult",
    "UserComparison",
    "UserHasNoRow",
    "UserIsDeletedError",
    "UserNotReady",
    "UserRoleRow",
    "UserRow",
    "VerifiedBody",
    "Webhook",
    "events",
    "sign",
    "tables",
    "verify",
]

# Name -> its module, as above. It is imported on first use: SQLAlchemy and others start slowly.
_MODULES = {
    "AppliedMapping": "mapping.tally",
    "Delivery": "jobs",
    "DeliveryFilter": "deliveries",
    "DeliveryState": "deliveries",
    "Difference": "mapping.check",
    "Discard": "errors",
    "ExistingRows": "handlers.existing",
    "Explained": "explain",
    "Finding": "doctor.faults",
    "FoundRow": "database.records",
    "HandlerInfo": "admin",
    "InvalidMapping": "errors",
    "JobFilter": "jobs",
    "JobRow": "jobs",
    "JobState": "jobs",
    "LogtoWebhooks": "app",
    "LogtoWebhooksError": "errors",
    "MappingCounts": "database.mapped_rows",
    "MappingStatus": "deliveries",
    "MemberRoleRow": "mapping.declare_pairs",
    "MemberRow": "mapping.declare_pairs",
    "OrganizationRow": "events.local",
    "ReconcileResult": "reconcile.reconcile",
    "RecoverResult": "reconcile.recover",
    "RefetchNeed": "database.records",
    "ReplayResult": "apply.replay",
    "RetryLater": "errors",
    "RotationResult": "logto.webhooks",
    "Status": "deliveries",
    "StoredDelivery": "deliveries",
    "TestResult": "logto.webhooks",
    "UserComparison": "reconcile.fetch",
    "UserHasNoRow": "errors",
    "UserIsDeletedError": "errors",
    "UserNotReady": "errors",
    "UserRoleRow": "mapping.declare_pairs",
    "UserRow": "events.local",
    "VerifiedBody": "signing_keys",
    "Webhook": "logto.webhooks",
    "sign": "signing_keys",
    "verify": "signing_keys",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or `events` or `tables`, on first use."""
    if name in ("events", "tables"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
