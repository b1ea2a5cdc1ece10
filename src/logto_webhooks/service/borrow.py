"""What `listen` borrows of a Logto and gives back: a webhook for the session, or another's URL.

A note is written before anything is changed there, so what a kill leaves behind is given back by
the next command. A webhook of ours is found by its name: its id is known only once it is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

from msgspec import Struct

from logto_webhooks.core.hooks import Hook
from logto_webhooks.core.ports import Logto
from logto_webhooks.errors import LogtoRefused, LogtoUnreachable
from logto_webhooks.service.endpoint import hooks_of, made_of

PREFIX: Final = "logto-webhooks listen "
Tell = Callable[[str], None]


class Note(Struct, frozen=True, kw_only=True):
    """What is to be given back to the Logto at `endpoint`.

    Either the webhook called `session` is to be deleted, or, where there is a `hook`, that one's
    URL, if it still is `lent`, to be `url` again.
    """

    endpoint: str
    session: str
    hook: str = ""
    url: str = ""
    lent: str = ""


class Notes(Protocol):
    """Where notes are kept, one of a session."""

    def all(self) -> list[Note]:
        """All that are kept."""

    def write(self, note: Note) -> None:
        """Keep one: it is on disk when this returns."""

    def remove(self, note: Note) -> None:
        """Forget one."""


def is_borrowed(hook: Hook) -> bool:
    """Whether it is a webhook of some session's, and will be gone."""
    return hook.name.startswith(PREFIX)


async def tidy(logto: Logto, endpoint: str, notes: Notes, tell: Tell) -> None:
    """Give back what earlier sessions left. Raises LogtoUnreachable, LogtoRefused."""
    for note in notes.all():
        if note.endpoint == endpoint:
            for done in await _give_back(logto, notes, note):
                tell(f"Left behind by an earlier `listen`: {done}.")


@asynccontextmanager
async def temporary(
    logto: Logto, notes: Notes, note: Note, url: str, events: Sequence[str], tell: Tell
) -> AsyncIterator[Hook]:
    """A webhook as long as the block lasts. Raises KeyNotTold, LogtoUnreachable,
    LogtoRefused."""
    notes.write(note)
    made = await logto.create_hook(note.session, url, events)
    async with _returned(logto, notes, note, tell):
        yield made_of(made.content, note.session)


@asynccontextmanager
async def repointed(
    logto: Logto, notes: Notes, note: Note, hook: Hook, tell: Tell
) -> AsyncIterator[Hook]:
    """Another's webhook with the URL that is lent. Raises as above, and EndpointGone."""
    notes.write(note)
    async with _returned(logto, notes, note, tell):
        changed = await logto.change_hook(hook.id, {"config": hook.config | {"url": note.lent}})
        yield made_of(changed.content, hook.name)


@asynccontextmanager
async def _returned(logto: Logto, notes: Notes, note: Note, tell: Tell) -> AsyncIterator[None]:
    try:
        yield
    finally:
        try:
            for done in await _give_back(logto, notes, note):
                tell(f"{done[0].upper()}{done[1:]}.")
        except (LogtoUnreachable, LogtoRefused) as error:
            what = f"the URL of the webhook {note.hook}" if note.hook else note.session
            tell(f"{error} The next `listen` or `endpoint` in this folder gives back {what}.")


async def _give_back(logto: Logto, notes: Notes, note: Note) -> list[str]:
    """Returns what was done, for people."""
    found, _ = await hooks_of(logto)
    done = []
    for each in found:
        if note.hook and each.id == note.hook and each.url == note.lent:
            await logto.change_hook(each.id, {"config": each.config | {"url": note.url}})
            done.append(f"the webhook {each.name} leads to {note.url} again")
        elif not note.hook and each.name == note.session:
            await logto.delete_hook(each.id)
            done.append(f"the webhook {each.name!r} is deleted")
    notes.remove(note)
    return done
