"""Makes and signs deliveries of any event: `make.user_created(email="ana@example.com")`.

Each function takes `id` (of the user, organization, role or scope), `at` (when Logto sent it, in
milliseconds since the epoch), `key` (the signing key) and any field that Logto sends. Top-level
fields change the payload, other fields the record. An unknown field raises SettingInvalid.

Without `at`, the delivery has the current time, some seconds ahead and after all earlier
deliveries, so that it is newer than the installation. Users and organizations are new if the event
creates them, or if a user registers. Otherwise, they were created three days earlier.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from logto_webhooks import events
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.samples import scenarios, shapes
from logto_webhooks.samples.payloads import payload
from logto_webhooks.samples.request import SignedRequest, sign_request
from logto_webhooks.testing.clock import MOMENTS

SIGNING_KEY: Final = "a-key-for-tests-and-nothing-else"

_random = random.Random(0)


def event(
    name: str,
    /,
    *,
    id: str | None = None,
    at: int | None = None,
    key: str = SIGNING_KEY,
    **fields: Any,
) -> SignedRequest:
    """Make a delivery of the event with this name. Raises UnknownEventName, SettingInvalid."""
    return sign_request(payload(name, fields, at=_pick_moment(at), rng=_random, id=id), key)


def sign_up(
    *,
    id: str | None = None,
    organizations: Sequence[str] = (),
    at: int | None = None,
    key: str = SIGNING_KEY,
    **fields: Any,
) -> list[SignedRequest]:
    """Make the deliveries of a user who registers and joins `organizations` just in time."""
    at = _pick_moment(at)
    sent = scenarios.sign_up(fields, at=at, rng=_random, id=id, organizations=organizations)
    return [sign_request(body, key) for body in sent]


def first_sign_in(
    *, id: str | None = None, at: int | None = None, key: str = SIGNING_KEY, **fields: Any
) -> SignedRequest:
    """Make the PostSignIn of a new user. As with single sign-on, there is no User.Created."""
    body = scenarios.first_sign_in(fields, at=_pick_moment(at), rng=_random, id=id)
    return sign_request(body, key)


def console_test(
    name: str = "User.Created", *, at: int | None = None, key: str = SIGNING_KEY
) -> SignedRequest:
    """Make a test payload, as from Logto's console."""
    return sign_request(shapes.console_test(name, "sample-webhook", _pick_moment(at)), key)


def _pick_moment(at: int | None) -> int:
    if at is not None and type(at) is not int:
        raise SettingInvalid(name="at", problem=f"it must be milliseconds since 1970, not {at!r}")
    return MOMENTS.next() if at is None else at


post_register = partial(event, events.PostRegister.name)
post_sign_in = partial(event, events.PostSignIn.name)
post_sign_in_adaptive_mfa_triggered = partial(event, events.PostSignInAdaptiveMfaTriggered.name)
post_reset_password = partial(event, events.PostResetPassword.name)
user_created = partial(event, events.UserCreated.name)
user_deleted = partial(event, events.UserDeleted.name)
user_data_updated = partial(event, events.UserDataUpdated.name)
user_suspension_status_updated = partial(event, events.UserSuspensionStatusUpdated.name)
role_created = partial(event, events.RoleCreated.name)
role_deleted = partial(event, events.RoleDeleted.name)
role_data_updated = partial(event, events.RoleDataUpdated.name)
role_scopes_updated = partial(event, events.RoleScopesUpdated.name)
scope_created = partial(event, events.ScopeCreated.name)
scope_deleted = partial(event, events.ScopeDeleted.name)
scope_data_updated = partial(event, events.ScopeDataUpdated.name)
organization_created = partial(event, events.OrganizationCreated.name)
organization_deleted = partial(event, events.OrganizationDeleted.name)
organization_data_updated = partial(event, events.OrganizationDataUpdated.name)
organization_membership_updated = partial(event, events.OrganizationMembershipUpdated.name)
organization_user_added = partial(event, events.OrganizationUserAdded.name)
organization_user_removed = partial(event, events.OrganizationUserRemoved.name)
organization_role_created = partial(event, events.OrganizationRoleCreated.name)
organization_role_deleted = partial(event, events.OrganizationRoleDeleted.name)
organization_role_data_updated = partial(event, events.OrganizationRoleDataUpdated.name)
organization_role_scopes_updated = partial(event, events.OrganizationRoleScopesUpdated.name)
organization_scope_created = partial(event, events.OrganizationScopeCreated.name)
organization_scope_deleted = partial(event, events.OrganizationScopeDeleted.name)
organization_scope_data_updated = partial(event, events.OrganizationScopeDataUpdated.name)
identifier_lockout = partial(event, events.IdentifierLockout.name)
message_rate_limited = partial(event, events.MessageRateLimited.name)
grant_limit_exceeded = partial(event, events.GrantLimitExceeded.name)
trusted_device_created = partial(event, events.TrustedDeviceCreated.name)
trusted_device_deleted = partial(event, events.TrustedDeviceDeleted.name)
