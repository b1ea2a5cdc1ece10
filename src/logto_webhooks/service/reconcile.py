"""All records beside all that Logto lists: what differs is mended, and told.

Users are listed newest first by offset, so they shift between pages while people sign up or go:
who was missed is among those of which Logto wasn't asked since the beginning, as are those who are
gone. Each of them is asked about alone before it is believed; so no listing, empty or cut off,
deletes anybody.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.core import answers
from logto_webhooks.core.answers import Span
from logto_webhooks.core.log import RECONCILE
from logto_webhooks.core.mirror import row_of
from logto_webhooks.core.ports import Answered, Host, Logto, Progress, Store
from logto_webhooks.core.record import Change, Key, Kind, Record
from logto_webhooks.errors import AnswerMalformed
from logto_webhooks.service import members, sync
from logto_webhooks.service.clocks import When, clocks
from logto_webhooks.service.rehearse import perform

PIECE: Final = 200  # records that are asked about in one go
MOST: Final = 1_000  # differences that are told one by one


class Drift(Struct, frozen=True):
    """A record that differed, and in which columns; `deleted` and `missing` are whole records."""

    kind: Kind
    id: str
    fields: tuple[str, ...]


class Reconciled(Struct, kw_only=True):
    """What a look at all records found."""

    users: int = 0
    organizations: int = 0
    members: int = 0
    drifted: int = 0
    drifts: list[Drift] = []
    doubts: list[str] = []  # what can't be told


class Reconciliation:
    """Compares everything, within the API's budget."""

    def __init__(self, logto: Logto, host: Host) -> None:
        self._logto = logto
        self._host = host
        self._found = Reconciled()
        self._dry = False
        self._listed: set[Key] = set()  # in a dry run, which notes nowhere who was asked about
        self._progress: Callable[[Reconciled], None] = lambda found: None

    async def run(
        self, dry_run: bool = False, progress: Callable[[Reconciled], None] = lambda found: None
    ) -> Reconciled:
        """Look at all; with `dry_run` change nothing.

        Raises LogtoUnreachable, LogtoRefused, StoreUnavailable.
        """
        self._found, self._dry, self._progress = Reconciled(), dry_run, progress
        self._listed = set()
        began = await self._users()
        await self._organizations()
        if not dry_run:
            done = Progress(began, self._found.drifted)
            await self._host.run(lambda store: store.progress(RECONCILE, done))
        return self._found

    async def one_user(self, user_id: str, dry_run: bool = False) -> Reconciled:
        """Look at one user alone. Raises as `run`, and AnswerMalformed."""
        self._found, self._dry = Reconciled(users=1), dry_run
        await self._ask(Key("user", user_id), await clocks(self._host))
        return self._found

    async def _users(self) -> int:
        """Compare all users; return since when (ms, Logto's clock)."""
        when, seen, began = await clocks(self._host), set[str](), None
        async for page in self._logto.users():
            span = when(page)
            began = span.at if began is None else began
            items = self._items("user", page)
            told = {each: item for each, item in items.items() if each not in seen}
            await self._learn(self._told(answers.about_user, told, span))
            self._found.users += len(told)
            seen = set(items)  # a shift repeats the page before
            self._progress(self._found)
        began = began or 0
        await self._rest("user", began, self._found.users, when)
        return began

    async def _organizations(self) -> None:
        when, began = await clocks(self._host), None
        async for page in self._logto.organizations():
            span = when(page)
            began = span.at if began is None else began
            items = self._items("organization", page)
            await self._learn(self._told(answers.about_organization, items, span))
            self._found.organizations += len(items)
            for each in items:
                await self._members(each, when)
            self._progress(self._found)
        await self._rest("organization", began or 0, self._found.organizations, when)

    async def _members(self, organization_id: str, when: When) -> None:
        try:
            pieces = await members.changes(self._logto, self._host, organization_id, when)
        except AnswerMalformed as error:
            self._found.doubts.append(str(error))
            return
        for piece in pieces:
            self._found.members += sum(change.key.kind == "membership" for change in piece)
            await self._learn(piece)

    async def _rest(self, kind: Kind, began: int, listed: int, when: When) -> None:
        unlisted = 0
        async for key in self._unread(kind, began):
            unlisted += key not in self._listed
            if unlisted > listed:
                # Everybody gone is less likely than another Logto, or a listing that was cut off.
                problem = f"this Logto lists fewer {kind}s than are known and it doesn't list"
                self._found.doubts.append(f"{problem}: none was deleted; is LOGTO_ENDPOINT right?")
                return
        async for key in self._unread(kind, began):
            if key in self._listed:
                continue
            try:
                await self._ask(key, when)
            except AnswerMalformed as error:
                self._found.doubts.append(str(error))

    async def _unread(self, kind: Kind, began: int) -> AsyncIterator[Key]:
        after = ""
        while True:
            look = partial(_unread, kind=kind, after=after, began=began)
            keys = await self._host.read(look)
            for key in keys:
                yield key
            if not keys:
                return
            after = keys[-1].id

    async def _ask(self, key: Key, when: When) -> None:
        if key.kind == "user":
            answered = await self._logto.user(key.id)
            change = answers.about_user(key.id, answered.content, when(answered))
        else:
            answered = await self._logto.organization(key.id)
            change = answers.about_organization(key.id, answered.content, when(answered))
        await self._learn([change])

    def _items(self, kind: Kind, page: Answered) -> dict[str, Any]:
        items = {}
        for item in page.content:
            try:
                items[answers.id_of(item, kind)] = item
            except AnswerMalformed as error:
                self._found.doubts.append(str(error))
        return items

    def _told(
        self, about: Callable[[str, Any, Span], Change], items: dict[str, Any], span: Span
    ) -> list[Change]:
        changes = []
        for logto_id, item in items.items():
            try:
                changes.append(about(logto_id, item, span))
            except AnswerMalformed as error:
                self._found.doubts.append(str(error))
        return changes

    async def _learn(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        changed = await perform(self._host, lambda store: sync.learn(store, changes), self._dry)
        if self._dry:
            self._listed |= {change.key for change in changes}
        for before, after in changed:
            if fields := differing(before, after):
                self._found.drifted += 1
                if len(self._found.drifts) < MOST:
                    self._found.drifts.append(Drift(after.key.kind, after.key.id, fields))


def _unread(store: Store, *, kind: Kind, after: str, began: int) -> list[Key]:
    return store.keys(kind, PIECE, after=after, unread_since=began)


def differing(before: Record, after: Record) -> tuple[str, ...]:
    """Name the columns of the mirror in which two states of a record differ."""
    old, new = row_of(before), row_of(after)
    if old is None or new is None:
        return () if old is new else ("missing" if old is None else "deleted",)
    changed = [name for name, value in new.items() if old[name] != value]
    return tuple(name for name in changed if name != "updated_at")
