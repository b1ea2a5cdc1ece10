"""FakeLogto: a Logto that tests start, change and break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Final

import msgspec

from logto_webhooks.clock import SystemClock
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name, Recorded
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake import log as delivery_log
from logto_webhooks.testing.fake.actions import Actions
from logto_webhooks.testing.fake.app import FakeApp, TokenRoutes, serve
from logto_webhooks.testing.fake.routes import ApiRoutes
from logto_webhooks.testing.fake.sender import TIMEOUT_S, Faults, Sender
from logto_webhooks.testing.fake.state import FakeState, LazyUsers
from logto_webhooks.testing.make import SIGNING_KEY

_MINUTE_MS: Final = 60_000


class FakeLogto(Actions):
    """A Logto on 127.0.0.1 while the context is open. Use it only from its event loop.

    >>> async def test(app_url: str) -> None:
    ...     async with FakeLogto(seed=1) as logto:
    ...         logto.add_hook(app_url)
    ...         ana = logto.create_user(primaryEmail="ana@example.com")
    ...         await logto.settle()

    `now` is in milliseconds since the epoch. With `ties`, a user's `updatedAt` is up to 20 ms
    before now, as with Logto's transactions, so that times can be equal or go back. `at_once` is
    the number of webhooks to send at the same time. With 1, they stay in order. If you enter the
    context again, it has the same records and address, like a Logto after a restart.
    """

    def __init__(
        self,
        *,
        signing_key: str = SIGNING_KEY,
        now: Callable[[], int] | None = None,
        seed: int = 0,
        ties: bool = False,
        at_once: int = 10,
        timeout_s: float = TIMEOUT_S,
        port: int = 0,
        state: FakeState | None = None,
    ) -> None:
        self.app_id = "fake-logto-app"
        self.app_secret = "fake-logto-app-secret"
        self.url: str = ""
        self._port = port
        self._at_once = at_once
        clock, state = now or SystemClock().now, state or FakeState()
        self._deliveries = Sender(state, clock, seed, timeout_s)
        self._tokens = TokenRoutes(self.app_id, self.app_secret, clock, seed)
        super().__init__(state, clock, seed, ties, self._deliveries.queue, signing_key)
        routes = ApiRoutes(state, self, clock, self._deliveries.test).routes()
        self._front = FakeApp(routes, self._tokens, lambda: self.faults, clock, seed)
        self._stack = AsyncExitStack()

    @classmethod
    def from_history(
        cls,
        name: Name,
        *,
        log: Sequence[Json] | None = None,
        now: Callable[[], int] | None = None,
    ) -> FakeLogto:
        """Create a FakeLogto in the final state of a recorded history, with its webhook, records
        and log.

        `log` contains the recorded entries, newest first; by default, they are derived from the
        deliveries. Unless you pass a clock, its time is one minute after the end.
        """
        hook, deliveries, final = history.read(name)
        log = log or _make_log(deliveries)
        state = FakeState()
        for user in final.users:
            state.users.add(user)
        for organization in final.organizations:
            state.add_organization(organization)
        for organization_id, members in final.members.items():
            roles = {member["id"]: member["organizationRoles"] for member in members}
            state.members[organization_id] = roles
        state.add_hook(hook)
        state.log(hook["id"]).hold(log)
        clock = now or (lambda: log[0]["createdAt"] + _MINUTE_MS)
        return cls(signing_key=hook["signingKey"], now=clock, state=state)

    @property
    def faults(self) -> Faults:
        """The faults of webhooks and API answers from now on."""
        return self._deliveries.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._deliveries.faults = faults

    @property
    def hooks(self) -> list[Json]:
        """The webhooks, newest first."""
        return self._state.all_hooks()

    def populate(self, users: int | Sequence[Json]) -> None:
        """Add many users without sending anything: a number of them, or a sequence, oldest first.

        A sequence can create each user on access. All must be older than the users that you create
        afterwards.
        """
        if isinstance(users, int):
            users = LazyUsers(users, self._now())
        self._state.users.hold(users)

    def populate_log(self, hook_id: str, entries: Sequence[Json]) -> None:
        """Add many entries to a webhook's log, newest first, and older than all later ones."""
        self._state.logs[hook_id].hold(entries)

    def set_role(self, has: bool) -> None:
        """Assign or remove the application's role with the Management API's scope, from its next
        token on."""
        self._tokens.has_role = has

    def revoke_tokens(self) -> None:
        """Revoke all access tokens."""
        self._tokens.revoke()

    def kill(self) -> None:
        """Forget all deliveries that weren't sent yet. They are in no log."""
        self._deliveries.kill()

    async def settle(self) -> None:
        """Wait until every queued delivery was attempted."""
        await self._deliveries.settle()

    async def __aenter__(self) -> FakeLogto:
        self.url = await self._stack.enter_async_context(serve(self._front, self._port))
        self._port = int(self.url.rpartition(":")[2])
        sending = asyncio.create_task(self._deliveries.run(self._at_once))
        self._stack.push_async_callback(_stop, sending)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _make_log(deliveries: Sequence[Recorded]) -> list[Json]:
    """Make the log of a history. Each attempt ended when the delivery was received. Tests from the
    console aren't logged."""
    newest_first = sorted(deliveries, key=lambda delivery: delivery.received_at, reverse=True)
    entries = []
    for number, delivery in enumerate(newest_first):
        payload = msgspec.json.decode(delivery.body, type=Json)
        if payload["userAgent"] != "fake-user-agent":
            is_success = delivery.answered == 200
            entries.append(
                delivery_log.entry(
                    f"{number:021}",
                    payload,
                    delivery.received_at,
                    delivery_log.log_response(delivery.answered, b"ok"),
                    None if is_success else f"HTTPError: status {delivery.answered}",
                )
            )
    return entries
