"""Events about users: administration, sign-up, sign-in, and account security."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from msgspec import UNSET, Struct, UnsetType

from logto_webhooks.events.base import Event, Id, Json, first_present, get_from, has_whole_record

# The shape of `data` depends on the route, never on its content: otherwise, anyone who can write
# customData could make it look like another user.
WHOLE_USER_ROUTES: Final = (
    "/users",
    "/users/:userId",
    "/users/:userId/password",
    "/users/:userId/is-suspended",
)
PART_ROUTES: Final = {
    "/users/:userId/custom-data": "customData",
    "/users/:userId/profile": "profile",
}


class User(Struct, frozen=True, kw_only=True, rename="camel"):
    """A user as Logto's API returns it. Times are in milliseconds since the epoch."""

    id: Id
    username: str | None = None
    primary_email: str | None = None
    primary_phone: str | None = None
    name: str | None = None
    avatar: str | None = None
    identities: Json = {}
    custom_data: Json | UnsetType = UNSET
    profile: Json | UnsetType = UNSET
    is_suspended: bool | UnsetType = UNSET
    last_sign_in_at: int | None = None
    created_at: int | None = None
    updated_at: int | None = None


class UserEvent(Event, frozen=True, kw_only=True):
    """An event about one user. `user` is None if this release doesn't know Logto's route."""

    strict: ClassVar[frozenset[str]] = frozenset(
        {"createdAt", "userId", "user", "customData", "profile"}
    )

    user_id: Id
    user: User | None = None

    @classmethod
    def shape(cls, payload: Json) -> Json:
        """Use `data` as what the route says; ignore it if the route is unknown."""
        data, route = payload.get("data"), payload.get("matchedRoute")
        part = PART_ROUTES.get(route) if isinstance(route, str) else None
        whole = data if has_whole_record(payload, WHOLE_USER_ROUTES) else None
        user_id = first_present(get_from(payload.get("params"), "userId"), get_from(whole, "id"))
        shaped: Json = {"userId": user_id, "user": whole, "customData": None, "profile": None}
        return shaped | ({part: data} if part else {})


class UserCreated(UserEvent, frozen=True, kw_only=True):
    """A user was created by an administrator, or signed up."""

    name: ClassVar[str] = "User.Created"


class UserDataUpdated(UserEvent, frozen=True, kw_only=True):
    """A user was changed. One of `user`, `custom_data` and `profile` has the new state. All three
    are None if this release doesn't know the route."""

    name: ClassVar[str] = "User.Data.Updated"
    custom_data: Json | None = None
    profile: Json | None = None


class UserSuspensionStatusUpdated(UserEvent, frozen=True, kw_only=True):
    """A user was suspended or unsuspended."""

    name: ClassVar[str] = "User.SuspensionStatus.Updated"


class UserDeleted(UserEvent, frozen=True, kw_only=True):
    """A user was deleted. `user` is the last state, if Logto sent it."""

    name: ClassVar[str] = "User.Deleted"
    strict: ClassVar[frozenset[str]] = frozenset({"createdAt", "userId"})


class InteractionEvent(Event, frozen=True, kw_only=True):
    """Somebody signed up, signed in or reset a password. `user` is the state after that."""

    strict: ClassVar[frozenset[str]] = frozenset({"createdAt", "userId", "user"})

    user_id: Id
    user: User | None = None
    user_ip: str | None = None


class PostRegister(InteractionEvent, frozen=True, kw_only=True):
    """Somebody signed up."""

    name: ClassVar[str] = "PostRegister"


class PostSignIn(InteractionEvent, frozen=True, kw_only=True):
    """Somebody signed in. After a single sign-on, Logto sends nothing else about the user."""

    name: ClassVar[str] = "PostSignIn"


class PostResetPassword(InteractionEvent, frozen=True, kw_only=True):
    """Somebody set a new password."""

    name: ClassVar[str] = "PostResetPassword"


class PostSignInAdaptiveMfaTriggered(InteractionEvent, frozen=True, kw_only=True):
    """A sign-in looked risky, and Logto asked for a second factor (Logto 1.38 and later)."""

    name: ClassVar[str] = "PostSignInAdaptiveMfaTriggered"


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
    `pre_revocation_active_grant_count` is the number of grants before.
    """

    name: ClassVar[str] = "Grant.LimitExceeded"

    user_id: str | None = None
    cimd_client_id: str | None = None
    revoked_grant_ids: list[str] = []
    max_allowed_grants: int | None = None
    pre_revocation_active_grant_count: int | None = None


class TrustedDeviceEvent(Event, frozen=True, kw_only=True):
    """An event about a device that a user trusts. `device` has its id, `userId`, `expiresAt`."""

    id_as: ClassVar[str | None] = "deviceId"
    data_as: ClassVar[str | None] = "device"

    device_id: str | None = None
    user_id: str | None = None
    device: dict[str, Any] | None = None

    @classmethod
    def shape(cls, payload: Json) -> Json:
        """Take the user from the device."""
        parts = (payload.get("data"), payload, payload.get("params"))
        user_id = first_present(*(get_from(part, "userId") for part in parts))
        return super().shape(payload) | {"userId": user_id}


class TrustedDeviceCreated(TrustedDeviceEvent, frozen=True, kw_only=True):
    """A user trusts a device (Logto after 1.42)."""

    name: ClassVar[str] = "TrustedDevice.Created"


class TrustedDeviceDeleted(TrustedDeviceEvent, frozen=True, kw_only=True):
    """A user no longer trusts a device (Logto after 1.42)."""

    name: ClassVar[str] = "TrustedDevice.Deleted"
