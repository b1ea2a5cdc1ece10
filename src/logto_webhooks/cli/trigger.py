"""Send deliveries as Logto would: `trigger` and `sign`."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from logto_webhooks import canonical_json, signing_keys
from logto_webhooks.cli import output
from logto_webhooks.cli.http_sender import send_request
from logto_webhooks.cli.options import AsJson, check_url, with_settings
from logto_webhooks.errors import MalformedEvent, SettingInvalid
from logto_webhooks.events import parse
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.samples import scenarios
from logto_webhooks.samples.payloads import payload
from logto_webhooks.samples.request import FAULTS, Fault, Step, plan_faults, sign_request
from logto_webhooks.samples.scenarios import SCENARIOS
from logto_webhooks.samples.shapes import Json
from logto_webhooks.settings import Settings
from logto_webhooks.validation import check_choice

_FAULT_NAMES: Final[dict[Fault, str]] = {
    "duplicates": "duplicate",
    "reordering": "out of order",
    "loss": "lost",
    "wrong-signatures": "wrong signature",
    "slow-sending": "slow",
}


@with_settings("signing_key")
def sign(
    settings: Settings,
    file: Annotated[
        Path | None, typer.Argument(help="The file with the body. Default: standard input.")
    ] = None,
) -> None:
    """Print the value of Logto's signature header for a body."""
    try:
        body = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise SettingInvalid(name=str(file), problem=str(error.strerror).lower()) from None
    print(signing_keys.sign(body, settings.signing_keys[0]))


@with_settings("signing_key")
def trigger(
    settings: Settings,
    event: Annotated[
        str | None, typer.Argument(help="The event's name, such as User.Created.")
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(help=f"Send a series of deliveries instead: {', '.join(SCENARIOS)}."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Set a field: key=value. You can repeat it. Top-level keys of the payload are set "
            "there, others in the record. a.b sets a nested key. email is short for primaryEmail. "
            "Values may be JSON: isSuspended=true, addedUserIds='[\"ana\"]'."
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(
            help="The ID of the user, organization, role or scope; of the user in a scenario."
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Send this many, each about a different record.")
    ] = 1,
    faults: Annotated[
        str | None,
        typer.Option(help=f"Faults to simulate, separated by commas: all, {', '.join(FAULTS)}."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Repeat the IDs and faults of an earlier run. Default: random."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="The URL to send to. Default: `serve` on this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign and send a sample of any event, or a scenario.

    Fields that you don't set have sample values, always the same for an ID. The command doesn't
    remember what it sent before.
    """
    key, chosen_faults = settings.signing_keys[0], _parse_faults(faults)
    url = settings.url_at(settings.port) if to is None else check_url("--to", to)
    chosen_seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    payloads = _make_payloads(event, scenario, data or [], id, count, chosen_seed)
    requests = [sign_request(body, key) for body in payloads]
    steps = plan_faults(requests, chosen_faults, chosen_seed)
    report = _Report(chosen_seed, steps, as_json=as_json)
    asyncio.run(send_request(url, [step for step in steps if not step.lost], report.add_response))
    report.finish(summary=bool(chosen_faults or scenario))
    if report.has_unexpected:
        raise typer.Exit(1)


class _Report:
    """Prints each step when its response is there; as JSON, all of them at the end, in order."""

    def __init__(self, seed: int, steps: Sequence[Step], *, as_json: bool) -> None:
        self._seed = seed
        self._steps = steps
        self._responses: dict[tuple[int, tuple[Fault, ...]], Any] = {}
        self._as_json = as_json
        self._unexpected: set[int] = set()
        _warn_if_malformed(steps)
        for step in steps:
            if step.lost:
                self._print(step)

    @property
    def has_unexpected(self) -> bool:
        """Whether a response had another status than expected."""
        return bool(self._unexpected)

    def add_response(self, step: Step, response: Any) -> None:
        """Record a response."""
        self._responses[step.number, step.faults] = response
        if response.status_code != step.expected:
            self._unexpected.add(response.status_code)
        self._print(step, response.status_code, output.strip_controls(response.text))

    def finish(self, *, summary: bool) -> None:
        """Print the rest: the JSON, or a summary, and hints."""
        statuses = Counter(response.status_code for response in self._responses.values())
        lost = sum(step.lost for step in self._steps)
        if self._as_json:
            report = {
                "seed": self._seed,
                "deliveries": [self._to_json(step) for step in self._steps],
                "sent": len(self._responses),
                "answered": {str(status): count for status, count in sorted(statuses.items())},
                "lost": lost,
            }
            print(msgspec.json.encode(report).decode())
        elif summary:
            answered = [f"{count} answered {status}" for status, count in sorted(statuses.items())]
            counts = [f"{len(self._responses)} sent", *answered, f"{lost} lost on purpose"]
            output.say(f"seed {self._seed}: {', '.join(counts)}")
        hints = output.Hints("--to")
        for status in sorted(self._unexpected):
            hints.show(status)

    def _to_json(self, step: Step) -> dict[str, Any]:
        fields = {"number": step.number, "event": step.event, "faults": step.faults}
        if step.lost:
            return fields | {"status": None, "answer": None}
        response = self._responses[step.number, step.faults]
        return fields | {"status": response.status_code, "answer": _decode(response)}

    def _print(self, step: Step, *response: Any) -> None:
        if self._as_json:
            return
        faults = ", ".join(_FAULT_NAMES[fault] for fault in step.faults)
        words = [step.event, *([f"({faults})"] if faults else []), *response]
        output.out.print(*words, markup=False, soft_wrap=True)


def _warn_if_malformed(steps: Sequence[Step]) -> None:
    """Warn here: the response is 200 for all that is stored, whether the sync accepts it or not."""
    try:
        changes_from_event(parse(signing_keys.trust(steps[0].body)))
    except MalformedEvent as error:
        output.warn(str(error))


def _decode(response: Any) -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return response.text  # of a proxy, perhaps


def _make_payloads(
    event: str | None,
    scenario: str | None,
    data: list[str],
    id: str | None,
    count: int,
    seed: int,
) -> list[Json]:
    rng = random.Random(f"{seed} {scenario or event}")
    now = time.time_ns() // 1_000_000
    moments = range(now, now + count)
    if scenario is None and event is not None:
        fields = _parse_fields(data)
        return [payload(event, fields, at=at, rng=rng, id=id) for at in moments]
    if scenario is None or event is not None:
        raise SettingInvalid(name="--scenario", problem="give either it or an event")
    if data:
        raise SettingInvalid(name="--data", problem="it works with an event only")
    name = check_choice("--scenario", scenario, SCENARIOS)
    series = [scenarios.scenario(name, at=at, rng=rng, id=id) for at in moments]
    return [body for bodies in series for body in bodies]


def _parse_faults(names: str | None) -> set[Fault]:
    if names is None:
        return set()
    if names == "all":
        return set(FAULTS)
    return {check_choice("--faults", name.strip(), FAULTS) for name in names.split(",")}


def _parse_fields(pairs: list[str]) -> dict[str, Any]:
    """Parse `key=value`; a value may be JSON."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise SettingInvalid(name="--data", problem=f"{pair!r} isn't key=value")
        try:
            fields[name] = canonical_json.decode(text.encode())
        except UnicodeError:
            raise SettingInvalid(name="--data", problem=f"{name} isn't UTF-8 text") from None
        except ValueError:
            fields[name] = text
    return fields
