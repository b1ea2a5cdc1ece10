"""Playing Logto: `trigger`."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Annotated, Any

import typer

from logto_webhooks.adapters.sender import send
from logto_webhooks.cli import given, options
from logto_webhooks.cli.played import Played
from logto_webhooks.core import canonical
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.samples import scenarios
from logto_webhooks.samples.faults import FAULTS, Fault, plan
from logto_webhooks.samples.payloads import Json, payload
from logto_webhooks.samples.scenarios import SCENARIOS
from logto_webhooks.samples.signed import signed
from logto_webhooks.service.given import one_of


def trigger(
    event: Annotated[
        str | None, typer.Argument(help="The event's name, such as User.Created.")
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(help=f"What several deliveries tell, instead: {', '.join(SCENARIOS)}."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A field, key=value; may be repeated. One of the payload's top goes there, any "
            "other into the record; a.b goes below a; email is short for primaryEmail. A value "
            "that is JSON is taken as such: isSuspended=true, addedUserIds='[\"ana\"]'."
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(help="The id of the user, organization, role or scope; a scenario's user."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many to send, each about another.")] = 1,
    faults: Annotated[
        str | None,
        typer.Option(help=f"What goes wrong on the way: all, or some of {', '.join(FAULTS)}."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same ids and faults as with this seed before; any if unset."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="The URL to send to; the local service's if unset.")
    ] = None,
    signing_key: options.SigningKey = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Sign and send a realistic payload of any event, or what a scenario makes Logto send.

    What isn't given has sample values, the same ones for an id: it doesn't know what was sent
    before.
    """
    settings = options.settings(env_file, signing_key=signing_key)
    key, wrong = settings.signing_keys[0], _faults(faults)
    url = settings.url_at(settings.port) if to is None else given.url("--to", to)
    chosen = random.SystemRandom().randrange(2**32) if seed is None else seed
    payloads = _payloads(event, scenario, data or [], id, count, chosen)
    steps = plan([signed(each, key) for each in payloads], wrong, chosen)
    played = Played(chosen, steps, as_json=as_json)
    sent = [each for each in steps if not each.lost]
    asyncio.run(send(url, sent, played.answered))
    played.end(summary=bool(wrong or scenario))
    if played.surprising:
        raise typer.Exit(1)


def _payloads(
    event: str | None,
    scenario: str | None,
    data: list[str],
    id: str | None,
    count: int,
    seed: int,
) -> list[Json]:
    rng = random.Random(f"{seed} {scenario or event}")
    moments = [time.time_ns() // 1_000_000 + each for each in range(count)]
    if scenario is None and event is not None:
        fields = _fields(data)
        return [payload(event, fields, at=at, rng=rng, id=id) for at in moments]
    if scenario is None or event is not None:
        raise SettingInvalid(name="--scenario", problem="give it, or an event")
    if data:
        raise SettingInvalid(name="--data", problem="a scenario takes none")
    name = one_of("--scenario", scenario, SCENARIOS)
    stories = [scenarios.scenario(name, at=at, rng=rng, id=id) for at in moments]
    return [each for story in stories for each in story]


def _faults(names: str | None) -> set[Fault]:
    if names is None:
        return set()
    if names == "all":
        return set(FAULTS)
    return {one_of("--faults", each.strip(), FAULTS) for each in names.split(",")}


def _fields(pairs: list[str]) -> dict[str, Any]:
    """Read `key=value`; a value that is JSON is taken as such."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise SettingInvalid(name="--data", problem=f"{pair!r} isn't key=value")
        try:
            fields[name] = canonical.decode(text.encode())
        except UnicodeError:
            raise SettingInvalid(name="--data", problem=f"{name} isn't UTF-8 text") from None
        except ValueError:
            fields[name] = text
    return fields
