"""What goes wrong with handlers, and what they raise themselves."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

from logto_webhooks.errors.base import LogtoWebhooksError

_MOST_NAMES: Final = 12


class RetryLater(LogtoWebhooksError):
    """Raise it in a handler: try again later; after so many seconds, if that is given."""

    after_s: float | None = None  # of a subclass that doesn't say it, too

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__(after_s=after_s)
        self.after_s = None if after_s is None else float(after_s)


class Discard(LogtoWebhooksError):
    """Raise it in a handler: nothing is to be done, and nothing to be tried again."""

    why: str = "no reason given"

    def __init__(self, why: str = why) -> None:
        super().__init__(why=why)
        self.why = str(why)


class HandlerRefused(LogtoWebhooksError):
    """The handler {name} can't be registered: {problem}."""

    name: str
    problem: str


class HandlerNotFor(LogtoWebhooksError):
    """The handler {name} is for {event} in another release, but not in this one, so it wasn't
    called. It is tried again, there or here."""

    name: str
    event: str


class HandlerNotAwaited(LogtoWebhooksError):
    """The handler {name} returned what nobody runs, of type {returned}. Make it an `async def` that
    awaits it, or let it do its work before it returns."""

    name: str
    returned: str


class CalledOnTheLoop(LogtoWebhooksError):
    """`logto.call` would stop the event loop that runs on this thread. Write `await` instead."""


class HandlerUnknown(LogtoWebhooksError):
    """No handler is called {name!r}; {known}."""

    name: object
    known: str

    def __init__(self, name: object, names: Sequence[str]) -> None:
        near = get_close_matches(str(name), names, n=1)
        others = [each for each in names if each not in near]
        told = [f"{each} (did you mean that?)" for each in near] + others[:_MOST_NAMES]
        known = f"there are: {', '.join(told)}" if told else "there is none"
        super().__init__(name=name, known=known)


class TransactionEnded(LogtoWebhooksError):
    """The handler committed or rolled back the transaction that it was given. Leave that to
    logto-webhooks: it commits when the handler returns, and rolls back when it raises."""


class WriterHeld(LogtoWebhooksError):
    """The handler has SQLite's one writer, so it can't wait for another transaction: do that in
    its own, with session=, or in a handler that asks for none."""


class TimeLimitExceeded(LogtoWebhooksError):
    """The handler took longer than {seconds:g} s. Raise its time_limit, or let it do less."""

    seconds: float


class JobLost(LogtoWebhooksError):
    """The process ended, or was stuck, {times} times while the handler ran, so it isn't tried
    again by itself. Mend it, then: logto-webhooks jobs retry."""

    times: int


class ClaimsUnusable(LogtoWebhooksError):
    """The claims name no user of Logto: {problem}. Give those of a verified token, with its sub."""

    problem: str


class UserDeleted(LogtoWebhooksError):
    """The user {id} was deleted in Logto; its token outlived it. Answer as for no token at all."""

    id: str
