"""What users' own tests are made of."""

from __future__ import annotations

from typing import Any, assert_type

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from logto_webhooks import LogtoWebhooks, sign, testing
from logto_webhooks.database.records import FoundRow
from logto_webhooks.testing.fake import FakeLogto, Faults

app = testing.App(keys=["k"], clock=testing.FrozenClock())
delivered = app.deliver(
    testing.make.user_created(id="ana", email="ana@example.com", at=1),
    testing.make.event("Some.Event", key="k"),
    testing.make.console_test("User.Created"),
)
assert_type(delivered, testing.DeliveryResult)
assert_type(delivered.outcome, str | None)
assert_type(app.users("ana"), list[FoundRow])
assert_type(app.users("ana")[0].row, dict[str, Any])
assert_type(app.users("ana")[0].memberships, list[str])
assert_type(testing.make.post_sign_in(id="ana"), testing.SignedRequest)
assert_type(testing.make.first_sign_in(id="bo", email="bo@example.com"), testing.SignedRequest)
assert_type(sign(b"{}", testing.SIGNING_KEY), str)


def on_a_connection(logto: LogtoWebhooks, connection: sa.Connection) -> None:
    """An application under test."""
    tested = testing.app(logto, connection)
    assert_type(tested, testing.App)
    assert_type(tested.deliver(testing.make.sign_up(email="ana@example.com")).ran, list[str])
    assert_type(tested.tick(), list[testing.HandlerCall])
    tested.fail("mail", ConnectionError("away"), times=2)
    still = testing.app(logto, connection, clock=testing.FrozenClock(1), raise_errors=False)
    assert_type(still, testing.App)


async def on_an_async_connection(logto: LogtoWebhooks, connection: AsyncConnection) -> None:
    """The same, awaited."""
    tested = testing.app(logto, connection)
    assert_type(tested, testing.AsyncApp)
    assert_type(
        (await tested.deliver(testing.make.sign_up())).runs, tuple[testing.HandlerCall, ...]
    )


async def live() -> None:
    """A whole Logto."""
    async with FakeLogto(seed=1) as logto:
        assert_type(logto, FakeLogto)
        assert_type(logto.url, str)
        logto.faults = Faults(lost=0.3)
        assert_type(logto.create_user(primaryEmail="bo@example.com")["id"], Any)
        await logto.settle()
