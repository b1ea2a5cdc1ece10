"""What must not pass: each line is refused by both type checkers, or they complain of the mark."""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.fastapi import router

engine = sa.create_engine("sqlite:///app.db")
logto = LogtoWebhooks(signing_key="k", engine=engine)

LogtoWebhooks("k", engine=engine)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
LogtoWebhooks(signing_key="k", engine=engine, shema="logto")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
LogtoWebhooks(signing_key="k", engine=engine, worker="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
LogtoWebhooks(signing_key=b"k", engine=engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
LogtoWebhooks(signing_key="k", engine="sqlite:///app.db")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
LogtoWebhooks.from_env(signing_key="k")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
router("/api/webhooks/logto")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@logto.on(events.User)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def of_a_record(event: events.UserCreated) -> None: ...


@logto.on(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def of_a_number(event: events.UserCreated) -> None: ...


@logto.on  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def without_parentheses(event: events.UserCreated) -> None: ...


@logto.on(events.UserCreated, retries=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue, reportUntypedFunctionDecorator]
def with_a_wrong_option(event: events.UserCreated) -> None: ...


@logto.on(events.UserCreated)
def of_a_wrong_attribute(event: events.UserCreated) -> None:
    assert event.email  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


@logto.on(events.LocalUserCreated)
def called_wrongly(event: events.LocalUserCreated) -> None: ...


called_wrongly("ana")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
logto.on(events.UserCreated)("no function")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
testing.App().deliver(b"{}")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def early() -> None:
    """Claims are a mapping."""
    await logto.ensure_user("ana")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await logto.get_user(events.UserCreated, {"sub": "ana"})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await logto.get_user("User", {"sub": "ana"}, session=engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
