"""Being early: an application that meets a user before the webhook did."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from logto_webhooks.core import answers, claims, local
from logto_webhooks.core.events.local import UserRow
from logto_webhooks.core.ports import Host, Logto, Store
from logto_webhooks.core.record import Change, Key, Record
from logto_webhooks.errors import LogtoRefused, LogtoUnreachable, UserDeleted
from logto_webhooks.service import sync
from logto_webhooks.service.clocks import clocks

POLL_S: Final = 0.1


def ensure(store: Store, told: Mapping[str, Any], more: Change | None = None) -> UserRow:
    """Return the user whom claims name, made of them if there is none; `more` is what Logto
    answered about the user.

    Raises ClaimsUnusable, UserDeleted.
    """
    change = claims.change_of(told)
    record = store.lock([change.key])[change.key]
    is_gone = record.deleted_at is not None
    told_by = more if is_gone or more is not None else change  # no claims bring anybody back
    if told_by is not None and (is_gone or not record.complete):
        sync.learn(store, [told_by], "ensure_user")
        record = store.lock([change.key])[change.key]
    return _row(record)


async def asked(logto: Logto, host: Host, told: Mapping[str, Any]) -> Change | None:
    """Ask Logto about a user who isn't known here, or who may be back after a deletion; None if
    there is no need, or it can't be asked now.

    Raises ClaimsUnusable, AnswerMalformed, StoreUnavailable.
    """
    key = claims.change_of(told).key
    record = (await host.read(lambda store: store.inbox.known(key))).get(key) or Record(key)
    if record.complete if record.deleted_at is None else not _may_be_back(record, told):
        return None
    try:
        answered = await logto.user(key.id)
    except (LogtoUnreachable, LogtoRefused):
        return None
    if answered.content is None:
        return None  # who has a token was there: let the webhook tell
    return answers.about_user(key.id, answered.content, (await clocks(host))(answered))


async def known(host: Host, key: Key) -> UserRow | None:
    """The row of a user; None if there is none (yet). Raises UserDeleted, StoreUnavailable."""
    record = (await host.read(lambda store: store.inbox.known(key))).get(key)
    if record is None or not (record.complete or record.deleted_at is not None):
        return None
    return _row(record)


async def wait_for(host: Host, user_id: str, timeout_s: float) -> UserRow:
    """Look, and wait until a user is known here. Raises ClaimsUnusable for what is no id,
    TimeoutError, UserDeleted, StoreUnavailable."""
    key = claims.change_of({"sub": user_id}).key
    row = await known(host, key)
    async with asyncio.timeout(max(0, timeout_s)):
        while row is None:  # whoever applies it may be another process
            await asyncio.sleep(POLL_S)
            row = await known(host, key)
    return row


def _may_be_back(record: Record, told: Mapping[str, Any]) -> bool:
    """Whether something later tells of a deleted user: Logto, or a token issued after that."""
    issued_at = told.get("iat")
    if isinstance(issued_at, int | float) and issued_at * 1000 > (record.deleted_at or 0):
        return True
    return bool(record.doubts)


def _row(record: Record) -> UserRow:
    row = local.user_row(record)
    if record.deleted_at is not None or row is None:
        raise UserDeleted(id=record.key.id)
    return row
