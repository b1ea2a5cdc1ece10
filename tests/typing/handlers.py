"""Handlers of every form keep their own type."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from logging import Logger, LoggerAdapter
from typing import Any, assert_type

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from logto_webhooks import Delivery, Discard, LogtoWebhooks, RetryLater, UserRow, events

logto = LogtoWebhooks.from_env()
assert_type(logto, LogtoWebhooks)


@logto.on(events.LocalUserCreated)
async def by_session(event: events.LocalUserCreated, session: AsyncSession) -> None:
    assert_type(event.user, UserRow)
    assert_type(event.user.email, str | None)


@logto.on(events.LocalUserUpdated)
def by_sync_session(event: events.LocalUserUpdated, session: Session) -> int:
    assert_type(event.changes, dict[str, tuple[Any, Any]])
    return len(event.changes)


@logto.on(events.UserCreated, "User.Deleted", waits=(1, 2.5), time_limit=5, max_age=60)
async def by_connection(
    event: events.UserCreated | events.UserDeleted, connection: AsyncConnection
) -> None:
    assert_type(event.user_id, str)
    assert_type(event.user, events.User | None)
    if event.event == "x":
        raise RetryLater("why", after_s=60)
    raise RetryLater(60)


@logto.on(events.PostSignIn, name="audit", ordered=False, concurrency=2, rerun=False)
def by_sync_connection(
    event: events.PostSignIn, connection: Connection, delivery: Delivery
) -> None:
    assert_type(delivery.idempotency_key, str)
    assert_type(delivery.id, int | None)
    raise Discard("of no use")


@logto.on("Organization.User.Added", max_attempts=3, test=True)
async def by_everything_else(
    event: events.OrganizationUserAdded,
    user: UserRow | None,
    logger: LoggerAdapter[Logger],
) -> str:
    assert_type(event.organization_id, str)
    return user.id if user else "nobody"


@logto.on("*", "Newer.Event", unknown=True)
def of_anything(event: events.Event) -> None:
    assert_type(event.event, str)


@logto.on("*", name="again")
@logto.on(events.LocalMemberAdded, events.LocalMemberRemoved)
async def registered_twice(event: events.LocalMemberAdded | events.LocalMemberRemoved) -> None:
    assert_type(event.user_id, str)


@logto.on_test()
def of_tests(event: events.TestPayload, delivery: Delivery) -> None: ...


@logto.on("Local*", waits=[1, 60])
def of_the_record(event: events.LocalEvent, session: Session | None = None) -> None:
    assert_type(session, Session | None)


class Greeter:
    """A method that is bound is a function like others."""

    async def greet(self, event: events.LocalUserCreated) -> None: ...


Later = Coroutine[Any, Any, None]
session_handler: Callable[[events.LocalUserCreated, AsyncSession], Later] = by_session
sync_handler: Callable[[events.LocalUserUpdated, Session], int] = by_sync_session
bound: Callable[[events.LocalUserCreated], Later] = logto.on("LocalUserCreated")(Greeter().greet)
assert_type(
    by_sync_session(
        events.LocalUserUpdated(
            source="log", user=UserRow(id="1", logto_user_id="ana"), changes={}
        ),
        Session(),
    ),
    int,
)
