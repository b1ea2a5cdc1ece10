"""What guards accounts: lockouts, limits, trusted devices. The sync doesn't need these events."""

from __future__ import annotations

from typing import Any, ClassVar

from logto_webhooks.events.base import Event, Json, first_present


class IdentifierLockout(Event, frozen=True, kw_only=True):
    """Too many wrong passwords or codes: `value` (of `type`: email, phone, …) is locked out."""

    name: ClassVar[str] = "Identifier.Lockout"

    type: str | None = None
    value: str | None = None


class MessageRateLimited(Event, frozen=True, kw_only=True):
    """Too many messages were requested for one `recipient`, an email address or a phone number.

    `action` is what Logto limited, such as VerificationCodeSend. Logto names no user.
    """

    name: ClassVar[str] = "Message.RateLimited"

    action: str | None = None
    recipient: str | None = None


class GrantLimitExceeded(Event, frozen=True, kw_only=True):
    """A user had more grants for one application than allowed, and Logto revoked the oldest.

    `application_id` is missing for an unregistered client, whose address is in `cimd_client_id`.
    `pre_revocation_active_grant_count` is how many there were.
    """

    name: ClassVar[str] = "Grant.LimitExceeded"

    user_id: str | None = None
    cimd_client_id: str | None = None
    revoked_grant_ids: list[str] = []
    max_allowed_grants: int | None = None
    pre_revocation_active_grant_count: int | None = None


class TrustedDeviceEvent(Event, frozen=True, kw_only=True):
    """An event about a device that a user trusts; `device` has its id, `userId`, `expiresAt`."""

    id_as: ClassVar[str | None] = "deviceId"
    data_as: ClassVar[str | None] = "device"

    device_id: str | None = None
    user_id: str | None = None
    device: dict[str, Any] | None = None

    @classmethod
    def shape(cls, payload: Json) -> Json:
        """Take the user from the device."""
        data, params = payload.get("data"), payload.get("params")
        user_id = first_present(
            data.get("userId") if isinstance(data, dict) else None,
            payload.get("userId"),
            params.get("userId") if isinstance(params, dict) else None,
        )
        return super().shape(payload) | {"userId": user_id}


class TrustedDeviceCreated(TrustedDeviceEvent, frozen=True, kw_only=True):
    """A user trusts a device (Logto after 1.42)."""

    name: ClassVar[str] = "TrustedDevice.Created"


class TrustedDeviceDeleted(TrustedDeviceEvent, frozen=True, kw_only=True):
    """A user no longer trusts a device (Logto after 1.42)."""

    name: ClassVar[str] = "TrustedDevice.Deleted"
