"""A webhook that `listen` creates or repoints, and restores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec import Struct

from logto_webhooks import files
from logto_webhooks.errors import LogtoApiError, LogtoUnreachable, NotWritable
from logto_webhooks.logto.webhooks import Webhook, list_webhooks, parse_created

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

PREFIX: Final = "logto-webhooks listen "
Tell = Callable[[str], None]


class Lease(Struct, frozen=True, kw_only=True):
    """What is to be given back to the Logto at `endpoint`.

    Either the webhook called `session` is to be deleted, or, where there is a `hook`, that one's
    URL, if it still is `lent`, to be `url` again.
    """

    endpoint: str
    session: str
    hook: str = ""
    url: str = ""
    lent: str = ""


class LeaseStore(Protocol):
    """Where notes are kept, one of a session."""

    def all(self) -> list[Lease]:
        """All that are kept."""

    def write(self, note: Lease) -> None:
        """Keep one: it is on disk when this returns."""

    def remove(self, note: Lease) -> None:
        """Forget one."""


def is_temporary(hook: Webhook) -> bool:
    """Whether it is a webhook of some session's, and will be gone."""
    return hook.name.startswith(PREFIX)


async def restore_leases(
    logto: ManagementClient, endpoint: str, notes: LeaseStore, tell: Tell
) -> None:
    """Give back what earlier sessions left. Raises LogtoUnreachable, LogtoApiError."""
    for note in notes.all():
        if note.endpoint == endpoint:
            for done in await _give_back(logto, notes, note):
                tell(f"Left behind by an earlier `listen`: {done}.")


@asynccontextmanager
async def temporary_webhook(
    logto: ManagementClient,
    notes: LeaseStore,
    note: Lease,
    url: str,
    events: Sequence[str],
    tell: Tell,
) -> AsyncIterator[Webhook]:
    """A webhook as long as the block lasts. Raises KeyNotTold, LogtoUnreachable,
    LogtoApiError."""
    notes.write(note)
    made = await logto.create_hook(note.session, url, events)
    async with _returned(logto, notes, note, tell):
        yield parse_created(made.content, note.session)


@asynccontextmanager
async def repointed_webhook(
    logto: ManagementClient, notes: LeaseStore, note: Lease, hook: Webhook, tell: Tell
) -> AsyncIterator[Webhook]:
    """Another's webhook with the URL that is lent. Raises as above, and WebhookChanged."""
    notes.write(note)
    async with _returned(logto, notes, note, tell):
        changed = await logto.change_hook(hook.id, {"config": hook.config | {"url": note.lent}})
        yield parse_created(changed.content, hook.name)


@asynccontextmanager
async def _returned(
    logto: ManagementClient, notes: LeaseStore, note: Lease, tell: Tell
) -> AsyncIterator[None]:
    try:
        yield
    finally:
        try:
            for done in await _give_back(logto, notes, note):
                tell(f"{done[0].upper()}{done[1:]}.")
        except (LogtoUnreachable, LogtoApiError) as error:
            what = f"the URL of the webhook {note.hook}" if note.hook else note.session
            tell(f"{error} The next `listen` or `endpoint` in this folder gives back {what}.")


async def _give_back(logto: ManagementClient, notes: LeaseStore, note: Lease) -> list[str]:
    """Returns what was done, for people."""
    found, _ = await list_webhooks(logto)
    done = []
    for item in found:
        if note.hook and item.id == note.hook and item.url == note.lent:
            await logto.change_hook(item.id, {"config": item.config | {"url": note.url}})
            done.append(f"the webhook {item.name} leads to {note.url} again")
        elif not note.hook and item.name == note.session:
            await logto.delete_hook(item.id)
            done.append(f"the webhook {item.name!r} is deleted")
    notes.remove(note)
    return done


class LeaseFolder:
    """The notes of a folder; it is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> None:
        """Make the folder. Raises NotWritable."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            files.write(self._folder / ".gitignore", b"*\n")
        except OSError as error:
            raise NotWritable(path=self._folder, problem=error.strerror) from None

    def all(self) -> list[Lease]:
        """All that are kept; what isn't whole was never acted on."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            with suppress(OSError, msgspec.DecodeError):
                found.append(msgspec.json.decode(file.read_bytes(), type=Lease))
        return found

    def write(self, note: Lease) -> None:
        """Keep one: it is on disk when this returns. Raises NotWritable."""
        try:
            descriptor = files.open_for_writing(self._file(note), new=True)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(note))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NotWritable(path=self._folder, problem=error.strerror) from None

    def remove(self, note: Lease) -> None:
        """Forget one."""
        self._file(note).unlink(missing_ok=True)

    def _file(self, note: Lease) -> Path:
        digest = hashlib.sha256(note.session.encode()).hexdigest()
        return self._folder / f"{digest[:16]}.json"
