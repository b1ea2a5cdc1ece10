"""A webhook as Logto's API tells of it, which one people mean, and to what it must listen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from logto_webhooks.core.events.base import Json
from logto_webhooks.core.events.catalog import BY_NAME, DERIVED
from logto_webhooks.core.events.local import LOCAL
from logto_webhooks.core.events.organizations import OrganizationEvent
from logto_webhooks.core.events.users import InteractionEvent, UserEvent
from logto_webhooks.core.making import wants
from logto_webhooks.errors import EndpointUnknown

SYNCED: Final = (UserEvent, InteractionEvent, OrganizationEvent)
# No released Logto lets a webhook subscribe to these.
LATER: Final = frozenset({"TrustedDevice.Created", "TrustedDevice.Deleted"})


class Hook(Struct, frozen=True, kw_only=True, rename="camel"):
    """A webhook; `config` is whole, because a change replaces it."""

    id: str
    name: str = ""
    events: list[str] = []
    config: Json = {}
    signing_key: str = ""
    enabled: bool = True

    def __repr__(self) -> str:
        """Without the key, and without headers, which may hold another."""
        return f"Hook(id={self.id!r}, name={self.name!r}, url={self.url!r})"

    @property
    def url(self) -> str:
        """Where it leads."""
        return str(self.config.get("url", ""))

    def leads_to(self, url: str) -> bool:
        """Whether it is the same address, with a slash in the end or without."""
        return self.url.rstrip("/") == url.rstrip("/")


def hook_of(content: Any) -> Hook | None:
    """Read an answer; None if it isn't a webhook. A key that isn't a text is left out."""
    if isinstance(content, dict) and not isinstance(content.get("signingKey"), str):
        content = {name: value for name, value in content.items() if name != "signingKey"}
    try:
        return msgspec.convert(content, Hook)
    except msgspec.ValidationError:
        return None


def is_url(text: str) -> bool:
    """Whether it is an address that can be posted to."""
    if any(each.isspace() or not each.isprintable() for each in text):
        return False  # what reads it would take it for another
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def named(hooks: Sequence[Hook], query: str) -> Hook:
    """Find one by id, else by name, else by URL. Raises EndpointUnknown."""
    several = False
    for found in (
        [each for each in hooks if each.id == query],
        [each for each in hooks if each.name == query],
        [each for each in hooks if each.leads_to(query)],
    ):
        if len(found) == 1:
            return found[0]
        several = several or bool(found)
    raise _unclear(hooks, f"{'several have' if several else 'none has'} the name or URL {query!r}")


def ours(hooks: Sequence[Hook], keys: Collection[str], public_url: str | None) -> Hook:
    """The one that has our key, or our URL; else the only one. Raises EndpointUnknown."""
    here = [each for each in hooks if is_ours(each, keys, public_url)]
    if len(here or hooks) == 1:
        return (here or hooks)[0]
    raise _unclear(
        hooks, f"{'several have' if here else 'none has'} the key or URL that is set here"
    )


def is_ours(hook: Hook, keys: Collection[str], public_url: str | None) -> bool:
    """Whether its key, or its URL, is the one that is set here."""
    has_our_key = hook.signing_key != "" and hook.signing_key in keys
    return has_our_key or (public_url is not None and hook.leads_to(public_url))


def subscription(patterns: Iterable[str] = ()) -> list[str]:
    """The events that the sync needs, and those that handlers of such patterns get.

    An event that no released Logto has is among them only if it is named.
    """
    patterns = list(patterns)
    unknown = [each for each in patterns if not {"*", "?"} & set(each) and each not in BY_NAME]
    return [
        *(name for name in BY_NAME if name not in DERIVED and _needed(name, patterns)),
        *(each for each in unknown if each not in LOCAL),
    ]


def _needed(name: str, patterns: Sequence[str]) -> bool:
    if name in patterns or issubclass(BY_NAME[name], SYNCED):
        return True
    return name not in LATER and any(wants(pattern, name) for pattern in patterns)


def _unclear(hooks: Sequence[Hook], problem: str) -> EndpointUnknown:
    if not hooks:
        hint = "Make one: logto-webhooks endpoint create --url URL"
        return EndpointUnknown(problem="Logto has none", hint=hint)
    listed = ", ".join(f"{each.id} ({each.name}, {each.url})" for each in hooks)
    return EndpointUnknown(problem=problem, hint=f"Name one by its id; Logto has: {listed}.")
