"""Playing Logto: `trigger` and `sign`."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from logto_webhooks.adapters.sender import send
from logto_webhooks.cli import options, tables
from logto_webhooks.core import canonical
from logto_webhooks.core.events import parse
from logto_webhooks.core.projection import plan
from logto_webhooks.core.signature import sign as sign_body
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import MalformedEvent, SettingInvalid
from logto_webhooks.samples.payloads import payload
from logto_webhooks.samples.signed import Signed, signed
from logto_webhooks.settings import Settings


def trigger(
    event: Annotated[str, typer.Argument(help="The event's name, such as User.Created.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A field, key=value; may be repeated. One of the payload's top goes there, any "
            "other into the record; a.b goes below a; email is short for primaryEmail. A value "
            "that is JSON is taken as such: isSuspended=true, addedUserIds='[\"ana\"]'."
        ),
    ] = None,
    id: Annotated[
        str | None, typer.Option(help="The id of the user, organization, role or scope.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many to send, each about another.")] = 1,
    to: Annotated[
        str | None, typer.Option(help="The URL to send to; the local service's if unset.")
    ] = None,
    signing_key: options.SigningKey = None,
    env_file: options.EnvFile = None,
) -> None:
    """Sign and send a realistic payload of any event, as Logto would.

    What isn't given has sample values, the same ones for an id: it doesn't know what was sent
    before. PostSignIn, for one, has the whole user: give again what shall stay as it is.
    """
    settings = options.settings(env_file, signing_key=signing_key)
    key, fields = settings.signing_keys[0], _fields(data or [])
    rng = random.SystemRandom()
    now = time.time_ns() // 1_000_000
    deliveries = [
        signed(payload(event, fields, at=now + index, rng=rng, id=id), key)
        for index in range(count)
    ]
    _warn(deliveries[0])
    refused: list[int] = []

    def answered(each: Signed, response: Any) -> None:
        tables.out.print(each.event, response.status_code, response.text, markup=False)
        if response.status_code != 200:
            refused.append(response.status_code)

    asyncio.run(send(to or local_url(settings), deliveries, answered))
    if refused:
        raise typer.Exit(1)


def sign(
    file: Annotated[
        Path | None, typer.Argument(help="The file with the body; standard input if left out.")
    ] = None,
    signing_key: options.SigningKey = None,
    env_file: options.EnvFile = None,
) -> None:
    """Print the value of Logto's signature header for a body."""
    settings = options.settings(env_file, signing_key=signing_key)
    try:
        body = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise SettingInvalid(name=str(file), problem=str(error.strerror).lower()) from None
    print(sign_body(body, settings.signing_keys[0]))


def _warn(delivery: Signed) -> None:
    """Say so if the sync will not take it: the answer can't, it is 200 once it is stored."""
    try:
        plan(parse(vouch(delivery.body)))
    except MalformedEvent as error:
        tables.err.print(f"warning: {error}", markup=False, soft_wrap=True)


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


def local_url(settings: Settings) -> str:
    """Where `serve` listens with these settings."""
    return f"http://{settings.host}:{settings.port}{settings.path}"
