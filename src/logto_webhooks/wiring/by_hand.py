"""What people do by hand to deliveries, jobs and handlers, as methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from logto_webhooks.core.inbox import DeliveryFilter, Kept
from logto_webhooks.core.jobs import JobFilter, JobRow
from logto_webhooks.core.lifecycle import JobMove, JobState
from logto_webhooks.core.ports import Store
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.service import given, manage
from logto_webhooks.service.manage import Known
from logto_webhooks.service.paging import AT_ONCE
from logto_webhooks.service.rehearse import perform
from logto_webhooks.service.replay import Replayed
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.databases import Database

T = TypeVar("T")
_UNCLEAR: Final = "give either their ids, or --handler NAME, for all its dead ones"


class ByHand(ABC):
    """What has settings and a database."""

    _settings: Callable[[], Settings]

    @property
    @abstractmethod
    def database(self) -> Database:
        """The database. Raises SettingInvalid."""

    async def deliveries(self, wanted: DeliveryFilter | None = None) -> list[Kept]:
        """List the inbox, the newest first."""
        sought = given.deliveries_wanted(wanted or DeliveryFilter())
        return await self._read(lambda store: store.inbox.search(sought))

    async def delivery(self, id: int) -> Kept | None:
        """Return one delivery with its body; None if there is none of this id."""
        [checked] = given.ids_of("delivery", [id])
        return await self._read(lambda store: store.inbox.get(checked))

    async def replay(
        self,
        ids: Sequence[int],
        *,
        handler: str | None = None,
        rerun: bool = False,
        sync_only: bool = False,
        dry_run: bool = False,
    ) -> Replayed:
        """Have deliveries applied again, and their jobs that are dead or discarded run again.

        With `rerun` those that are done, too; `sync_only` none. With a `handler` only its jobs:
        then only what was never applied is. `dry_run` says what would differ. Raises
        DeliveryUnknown, HandlerUnknown, and SettingInvalid for what is no id.
        """
        lag_ms, some = self._settings().lag_ms, given.ids_of("delivery", ids)

        def work(store: Store) -> Replayed:
            return manage.replay(
                store, some, lag_ms, handler=handler, rerun=rerun, sync_only=sync_only, tell=dry_run
            )

        await self.database.check()
        return await perform(self.database.host, work, dry_run)

    async def jobs(self, wanted: JobFilter | None = None) -> list[JobRow]:
        """List jobs of handlers, the newest first."""
        sought = given.jobs_wanted(wanted or JobFilter())
        return await self._read(lambda store: store.jobs.find(sought))

    async def retry_jobs(
        self, ids: Sequence[int] = (), *, handler: str | None = None, state: str | None = None
    ) -> int:
        """Run jobs again, at the end of their lines: by id, or all of a handler in a state, which
        is "dead" if none is named. What waits for its next attempt has it now.

        Returns how many will be; what runs just now is none of them. Raises JobUnknown,
        HandlerUnknown, and SettingInvalid for what is no id or state, or too much at once.
        """
        return await self._move(ids, handler, state, JobMove.REPEAT)

    async def discard_jobs(
        self, ids: Sequence[int] = (), *, handler: str | None = None, state: str | None = None
    ) -> int:
        """Give jobs up, those that run just now, too. Returns how many were. Raises as above."""
        return await self._move(ids, handler, state, JobMove.DISCARD)

    async def known_handlers(self) -> list[Known]:
        """List the handlers that any process has registered, with counts of their jobs."""
        return await self._read(manage.known)

    async def forget_handler(self, name: str) -> int | None:
        """Forget a handler whose code is gone, and discard what waits for it: so many jobs.

        Returns None if it isn't known.
        """
        checked = given.text_of("the handler", name)
        return await self._write(lambda store: manage.forget(store, checked))

    async def _move(
        self, ids: Sequence[int], handler: str | None, state: str | None, move: JobMove
    ) -> int:
        chosen = await self._chosen_jobs(ids, handler, state, move)
        moved = 0
        for start in range(0, len(chosen), AT_ONCE):  # a long transaction holds back who accepts
            piece = chosen[start : start + AT_ONCE]
            moved += await self._write(partial(_moved, ids=piece, move=move))
        return moved

    async def _chosen_jobs(
        self, ids: Sequence[int], handler: str | None, state: str | None, move: JobMove
    ) -> list[int]:
        named = given.ids_of("job", ids)
        if bool(named) is (handler is not None) or (named and state is not None):
            raise SettingInvalid(name="the choice of jobs", problem=_UNCLEAR)
        if handler is None:
            return await self._read(lambda store: manage.named_jobs(store, named))
        wanted = JobState.DEAD if state is None else state
        return await self._read(lambda store: manage.jobs_of(store, handler, wanted, move))

    async def _read(self, work: Callable[[Store], T]) -> T:
        await self.database.check()
        return await self.database.host.read(work)

    async def _write(self, work: Callable[[Store], T]) -> T:
        await self.database.check()
        return await self.database.host.run(work)


def _moved(store: Store, *, ids: Sequence[int], move: JobMove) -> int:
    return len(store.jobs.move(ids, move))
