"""What became of deliveries that were sent on purpose: a line each, or JSON."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import typer

from logto_webhooks import canonical_json
from logto_webhooks.cli import arguments, options, output
from logto_webhooks.cli.http_sender import send_request
from logto_webhooks.cli.output import Hints
from logto_webhooks.errors import MalformedEvent, SettingInvalid
from logto_webhooks.events import parse
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.samples import scenarios
from logto_webhooks.samples.faults import FAULTS, Fault, Step, plan_faults
from logto_webhooks.samples.payloads import Json, payload
from logto_webhooks.samples.request import sign_request
from logto_webhooks.samples.scenarios import SCENARIOS
from logto_webhooks.signing_keys import trust
from logto_webhooks.validation import check_choice

_BEFELL: Final[dict[Fault, str]] = {
    "duplicates": "duplicate",
    "reordering": "out of order",
    "loss": "lost",
    "wrong-signatures": "wrong signature",
    "slow-sending": "slow",
}


class PlayedRequest:
    """Prints each step once it is answered; as JSON, all of them at the end, as planned."""

    def __init__(self, seed: int, steps: Sequence[Step], *, as_json: bool) -> None:
        self._seed = seed
        self._steps = steps
        self._answers: dict[tuple[int, tuple[Fault, ...]], Any] = {}
        self._as_json = as_json
        self._unexpected: set[int] = set()
        _warn(steps)
        for each in steps:
            if each.lost:
                self._print(each)

    @property
    def surprising(self) -> bool:
        """Whether an answer was another than is expected."""
        return bool(self._unexpected)

    def answered(self, step: Step, response: Any) -> None:
        """Note an answer."""
        self._answers[step.number, step.faults] = response
        if response.status_code != step.expected:
            self._unexpected.add(response.status_code)
        self._print(step, response.status_code, output.strip_controls(response.text))

    def end(self, *, summary: bool) -> None:
        """Print what is left to say."""
        statuses = Counter(each.status_code for each in self._answers.values())
        lost = sum(each.lost for each in self._steps)
        if self._as_json:
            told = {
                "seed": self._seed,
                "deliveries": [self._told(each) for each in self._steps],
                "sent": len(self._answers),
                "answered": {str(status): count for status, count in sorted(statuses.items())},
                "lost": lost,
            }
            print(msgspec.json.encode(told).decode())
        elif summary:
            answers = [f"{count} answered {status}" for status, count in sorted(statuses.items())]
            counts = [f"{len(self._answers)} sent", *answers, f"{lost} lost on purpose"]
            output.out.print(
                f"seed {self._seed}: {', '.join(counts)}", markup=False, soft_wrap=True
            )
        hints = Hints("--to")
        for status in sorted(self._unexpected):
            hints.tell(status)

    def _told(self, step: Step) -> dict[str, Any]:
        told = {"number": step.number, "event": step.event, "faults": step.faults}
        if step.lost:
            return told | {"status": None, "answer": None}
        response = self._answers[step.number, step.faults]
        return told | {"status": response.status_code, "answer": _decoded(response)}

    def _print(self, step: Step, *answer: Any) -> None:
        if self._as_json:
            return
        befell = ", ".join(_BEFELL[each] for each in step.faults)
        words = [step.event, *([f"({befell})"] if befell else []), *answer]
        output.out.print(*words, markup=False, soft_wrap=True)


def _warn(steps: Sequence[Step]) -> None:
    """Say so if the sync will not take it: the answer can't, it is 200 once it is stored."""
    try:
        changes_from_event(parse(trust(steps[0].body)))
    except MalformedEvent as error:
        output.warn(str(error))


def _decoded(response: Any) -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return response.text  # of a proxy, perhaps


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
    url = settings.url_at(settings.port) if to is None else arguments.check_url("--to", to)
    chosen = random.SystemRandom().randrange(2**32) if seed is None else seed
    payloads = _payloads(event, scenario, data or [], id, count, chosen)
    steps = plan_faults([sign_request(each, key) for each in payloads], wrong, chosen)
    played = PlayedRequest(chosen, steps, as_json=as_json)
    sent = [each for each in steps if not each.lost]
    asyncio.run(send_request(url, sent, played.answered))
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
    name = check_choice("--scenario", scenario, SCENARIOS)
    stories = [scenarios.scenario(name, at=at, rng=rng, id=id) for at in moments]
    return [each for story in stories for each in story]


def _faults(names: str | None) -> set[Fault]:
    if names is None:
        return set()
    if names == "all":
        return set(FAULTS)
    return {check_choice("--faults", each.strip(), FAULTS) for each in names.split(",")}


def _fields(pairs: list[str]) -> dict[str, Any]:
    """Read `key=value`; a value that is JSON is taken as such."""
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
