"""FakeLogto: what a test starts, changes and breaks."""

from __future__ import annotations

import asyncio
import string
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Final

from logto_webhooks.samples import shapes
from logto_webhooks.samples.history import Name
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake import from_history
from logto_webhooks.testing.fake.actions import Actions
from logto_webhooks.testing.fake.app import FakeApp, served
from logto_webhooks.testing.fake.faults import Faults
from logto_webhooks.testing.fake.numbered import LazyUsers
from logto_webhooks.testing.fake.routes import ApiRoutes, HookRoutes
from logto_webhooks.testing.fake.sender import TIMEOUT_S, Sender
from logto_webhooks.testing.fake.state import FakeState
from logto_webhooks.testing.fake.tokens import TokenRoutes
from logto_webhooks.testing.make import SIGNING_KEY

_MINUTE_MS: Final = 60_000


class FakeLogto(Actions):
    """A Logto on 127.0.0.1 while the context lasts; all is used from its event loop.

    >>> async def test(app_url: str) -> None:
    ...     async with FakeLogto(seed=1) as logto:
    ...         logto.add_hook(app_url)
    ...         ana = logto.create_user(primaryEmail="ana@example.com")
    ...         await logto.settle()

    `now` is in milliseconds since the epoch. With `ties`, a user's `updatedAt` is the start of
    Logto's transaction, up to 20 ms before now: it ties, and goes back. `at_once` is how many
    webhooks are on their way at a time; with 1 they keep their order. Entered again after it was
    left, it has the same records and address, as after a restart.
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
        self.signing_key = signing_key
        self.app_id = "fake-logto-app"
        self.app_secret = "fake-logto-app-secret"
        self.url: str = ""
        self._port = port
        self._at_once = at_once
        clock, state = now or _now, state or FakeState()
        self._deliveries = Sender(state, clock, seed, timeout_s)
        self._tokens = TokenRoutes(self.app_id, self.app_secret, clock, seed)
        super().__init__(state, clock, seed, ties, self._deliveries.queue)
        hooks = HookRoutes(state, self, clock, self._deliveries.test)
        routes = [*ApiRoutes(state).routes(), *hooks.routes()]
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
        """Create a Logto at the end of a recorded history, with its webhook, records and log.

        `log` contains the recorded entries, newest first; by default, they are made from the
        deliveries. Unless you give a clock, its clock stands one minute after the end.
        """
        state, ended_at = from_history.load(name, log)
        [hook] = state.hooks.values()
        clock = now or (lambda: ended_at + _MINUTE_MS)
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

    def add_hook(
        self,
        url: str,
        *,
        events: Sequence[str] = shapes.EVENTS,
        signing_key: str | None = None,
        name: str | None = None,
    ) -> Json:
        """Create a webhook for events, by default for all of them."""
        key = self.signing_key if signing_key is None else signing_key
        made = shapes.hook(self._new_id(21), self._now(), url, list(events), key, name)
        self._state.add_hook(made)
        return made

    def change_hook(self, hook_id: str, **fields: object) -> Json:
        """Replace fields of a webhook, including the whole `config`, as Logto does. Raises
        KeyError, TypeError."""
        changed = shapes.changed(self._state.hooks[hook_id], fields)
        self._state.hooks[hook_id] = changed
        return changed

    def delete_hook(self, hook_id: str) -> None:
        """Delete a webhook and its log. Queued deliveries are still sent. Raises KeyError."""
        self._state.drop_hook(hook_id)

    def rotate_signing_key(self, hook_id: str) -> Json:
        """Give a webhook a new key at once. Queued deliveries keep the old one. Raises KeyError."""
        key = "".join(self._random.choices(string.ascii_letters + string.digits, k=32))
        return self.change_hook(hook_id, signingKey=key)

    def populate(self, users: int | Sequence[Json]) -> None:
        """Add many users without sending anything: a number of them, or a sequence, oldest first.

        A sequence can create each user on access. All must be older than the users that you create
        afterwards.
        """
        many = LazyUsers(users, self._now()) if isinstance(users, int) else users
        self._state.users.hold(many)

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
        self.url = await self._stack.enter_async_context(served(self._front, self._port))
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


def _now() -> int:
    return time.time_ns() // 1_000_000
