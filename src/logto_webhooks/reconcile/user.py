"""Compare one user with Logto."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from logto_webhooks.apply import batch
from logto_webhooks.database.dry_run import run_or_rehearse
from logto_webhooks.database.store import Store, TransactionRunner
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.logto.clock_skew import SpanClock
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.records.merge import merge
from logto_webhooks.records.projection import Part, child_rows, project
from logto_webhooks.records.record import (
    RESTORED,
    UNKNOWN_CHANGE,
    Absent,
    ApiRead,
    Change,
    Key,
    Record,
    RefetchRequest,
)

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

_ALL: Final = 2**31
_ALL_OF_A_USER: Final = (UNKNOWN_CHANGE, RESTORED)  # the user, and the roles and memberships


class UserComparison(Struct, frozen=True, kw_only=True):
    """A user here and in Logto, by column. None if the user doesn't exist there (any more)."""

    ours: dict[str, Any] | None
    logto: dict[str, Any] | None
    differ: list[str]


async def fetch_roles(logto: ManagementClient, user_id: str, when: SpanClock) -> ApiRead:
    """What the list of a user's roles says. Raises InvalidApiResponse, LogtoUnreachable,
    LogtoApiError."""
    pages = [page async for page in logto.roles_of(user_id)]
    items = [item for page in pages for item in page.content]
    span = Span(when(pages[0]).at, when(pages[-1]).end)
    return api_responses.read_roles(user_id, items, span)


async def user_changes(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> list[Change]:
    """Ask all about one user. Raises InvalidApiResponse, LogtoUnreachable, LogtoApiError,
    StoreUnavailable."""
    answered = await logto.user(user_id)
    user = api_responses.read_user(user_id, answered.content, when(answered))
    if answered.content is None:
        return [user]
    return [user, *await belongings(logto, host, user_id, when)]


async def belongings(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> list[Change]:
    """Ask which roles and memberships a user has. Raises as `user_changes`."""
    key = Key("user", user_id)
    roles = await fetch_roles(logto, user_id, when)
    organizations = await logto.organizations_of(user_id)
    span = when(organizations)
    if organizations.content is None:  # deleted in the meantime
        return [roles, Absent(key, span.at)]
    present = api_responses.pairs_of_user(user_id, organizations.content)

    def known_of(store: Store) -> list[Key]:
        return store.keys("membership", _ALL, of=key)

    pairs = sorted(present.keys() | await host.read(known_of))
    all_told = api_responses.all_told(user_id, Span(roles.at, span.end))
    return [roles, *api_responses.read_pairs(pairs, present, span), all_told]


async def compare_user(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> UserComparison:
    """Compare. Where something differs, note that Logto must be asked again, which mends it.
    Raises as `user_changes`, and WrongTenant."""
    told = await user_changes(logto, host, user_id, when)
    if any(isinstance(change, Absent) for change in told):
        await TenantCheck(logto, host).ensure_same_tenant(by_records=False)
    keys = sorted({change.key for change in told} | {Key("user", user_id)})
    known = await run_or_rehearse(host, lambda store: store.lock(keys), dry=True)
    theirs = {key: Record(key) for key in keys}
    for change in told:
        theirs[change.key] = merge(theirs[change.key], change)
    ours, logtos = _shown(known.values()), _shown(theirs.values())
    names = (ours or {}).keys() | (logtos or {}).keys()
    both = (ours or {}, logtos or {})
    differ = sorted(name for name in names if both[0].get(name) != both[1].get(name))
    differ = [name for name in differ if name != "updated_at"]
    if differ:
        at = max(change.at for change in told if isinstance(change, ApiRead | Absent))
        needs = [RefetchRequest(Key("user", user_id), why, at) for why in _ALL_OF_A_USER]
        await host.run(lambda store: batch.apply_reads(store, needs, None))
    return UserComparison(ours=ours, logto=logtos, differ=differ)


def _shown(known: Iterable[Record]) -> dict[str, Any] | None:
    records = list(known)
    [user] = [record for record in records if record.key.kind == "user"]
    row = project(user)
    if row is None or user.deleted_at is not None:
        return None
    memberships: dict[str, list[str]] = {}
    for record in records:
        if record.key.kind == "membership" and project(record):
            organization = record.key.organization_and_user[0].id
            memberships[organization] = _names(record, "member_roles")
    return row | {"roles": _names(user, "roles"), "organizations": memberships}


def _names(record: Record, part: Part) -> list[str]:
    return sorted(row["name"] for row in child_rows(record).get(part, []))
