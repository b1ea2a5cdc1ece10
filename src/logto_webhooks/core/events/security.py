"""What guards accounts: lockouts, limits, trusted devices. The sync doesn't need these events."""

from __future__ import annotations

from typing import Any, ClassVar

from logto_webhooks.core.events.base import Event


class IdentifierLockout(Event, frozen=True, kw_only=True):
    """Too many wrong passwords or codes: `value` (of `type`: email, phone, …) is locked out."""

    name: ClassVar[str] = "Identifier.Lockout"

    type: str | None = None
    value: str | None = None


class MessageRateLimited(Event, frozen=True, kw_only=True):
    """Too many messages were asked for; what Logto says of it is in `payload`."""

    name: ClassVar[str] = "Message.RateLimited"


class GrantLimitExceeded(Event, frozen=True, kw_only=True):
    """An application holds too many grants of one user; the rest is in `payload`."""

    name: ClassVar[str] = "Grant.LimitExceeded"


class TrustedDeviceEvent(Event, frozen=True, kw_only=True):
    """An event about a device that a user trusts."""

    id_as: ClassVar[str | None] = "deviceId"
    data_as: ClassVar[str | None] = "device"

    device_id: str | None = None
    user_id: str | None = None
    device: dict[str, Any] | None = None


class TrustedDeviceCreated(TrustedDeviceEvent, frozen=True, kw_only=True):
    """A user trusts a device (Logto after 1.42)."""

    name: ClassVar[str] = "TrustedDevice.Created"


class TrustedDeviceDeleted(TrustedDeviceEvent, frozen=True, kw_only=True):
    """A user no longer trusts a device (Logto after 1.42)."""

    name: ClassVar[str] = "TrustedDevice.Deleted"
