"""Send deliveries as Logto would: `trigger` and `sign`."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import httpx2
import msgspec
from typer import Argument, Exit, Option

from logto_webhooks import canonical_json, signing_keys
from logto_webhooks.cli import output
from logto_webhooks.cli.options import AsJson, check_url, with_settings
from logto_webhooks.errors import (
    LogtoWebhooksError,
    MalformedEvent,
    ServiceUnreachable,
    SettingInvalid,
)
from logto_webhooks.events import parse
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.samples import scenarios
from logto_webhooks.samples.payloads import payload
from logto_webhooks.samples.request import (
    FAULTS,
    Fault,
    SignedRequest,
    Step,
    plan_faults,
    sign_request,
)
from logto_webhooks.samples.scenarios import SCENARIOS
from logto_webhooks.samples.shapes import Json
from logto_webhooks.settings import Settings
from logto_webhooks.validation import check_choice, strip_url

Request = TypeVar("Request", bound=SignedRequest)

TIMEOUT_S: Final = 10.0  # as Logto's
PAUSE_S: Final = 0.05  # between the pieces of a body
_FAULT_NAMES: Final[dict[Fault, str]] = {
    "duplicates": "duplicate",
    "reordering": "out of order",
    "loss": "lost",
    "wrong-signatures": "wrong signature",
    "slow-sending": "slow",
}


class EventMissing(LogtoWebhooksError):
    """Give an event, such as User.Created, or --scenario NAME."""


@with_settings("signing_key")
def sign(
    settings: Settings,
    file: Annotated[
        Path | None, Argument(help="The file with the body. Default: standard input.")
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
    event: Annotated[str | None, Argument(help="The event's name, such as User.Created.")] = None,
    scenario: Annotated[
        str | None,
        Option(help=f"Send a series of deliveries instead: {', '.join(SCENARIOS)}."),
    ] = None,
    data: Annotated[
        list[str] | None,
        Option(
            help="Set a field: key=value. You can repeat this option. Top-level keys change the "
            "payload, other keys the record. a.b sets a nested key. email means primaryEmail. "
            "Values can be JSON: isSuspended=true, addedUserIds='[\"ana\"]'."
        ),
    ] = None,
    id: Annotated[
        str | None,
        Option(
            help="The ID of the user, organization, role or scope. In a scenario, the user's ID."
        ),
    ] = None,
    count: Annotated[
        int, Option(min=1, help="Send this many deliveries, each about a different record.")
    ] = 1,
    faults: Annotated[
        str | None,
        Option(help=f"Faults to simulate, separated by commas: all, {', '.join(FAULTS)}."),
    ] = None,
    seed: Annotated[
        int | None, Option(help="Repeat the IDs and faults of an earlier run. Default: random.")
    ] = None,
    to: Annotated[
        str | None, Option(help="The URL to send to. Default: `serve` on this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a signed sample of any event, or a scenario.

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
    asyncio.run(send_requests(url, [step for step in steps if not step.lost], report.add_response))
    report.finish(summary=bool(chosen_faults or scenario))
    if report.unexpected:
        raise Exit(1)


class _Report:
    """Prints each step when its response arrives; as JSON, all steps at the end, in order."""

    def __init__(self, seed: int, steps: Sequence[Step], *, as_json: bool) -> None:
        self.unexpected: set[int] = set()  # statuses
        self._seed = seed
        self._steps = steps
        self._responses: dict[tuple[int, tuple[Fault, ...]], httpx2.Response] = {}
        self._as_json = as_json
        _warn_if_malformed(steps)
        for step in steps:
            if step.lost:
                self._print(step)

    def add_response(self, step: Step, response: httpx2.Response) -> None:
        """Record a response."""
        self._responses[step.number, step.faults] = response
        if response.status_code != step.expected:
            self.unexpected.add(response.status_code)
        self._print(step, response.status_code, response.text)

    def finish(self, *, summary: bool) -> None:
        """Print the JSON or a summary, and hints."""
        statuses = Counter(response.status_code for response in self._responses.values())
        sent, lost = len(self._responses), sum(step.lost for step in self._steps)
        if self._as_json:
            report = {
                "seed": self._seed,
                "deliveries": [self._to_builtins(step) for step in self._steps],
                "sent": sent,
                "answered": {str(status): count for status, count in sorted(statuses.items())},
                "lost": lost,
            }
            print(msgspec.json.encode(report).decode())
        elif summary:
            answered = [f"{count} answered {status}" for status, count in sorted(statuses.items())]
            counts = ", ".join([f"{sent} sent", *answered, f"{lost} lost on purpose"])
            output.say(f"seed {self._seed}: {counts}")
        for status in sorted(self.unexpected):
            output.show_hint(status, "--to")

    def _to_builtins(self, step: Step) -> dict[str, Any]:
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
        output.say(" ".join(map(str, words)))


def _warn_if_malformed(steps: Sequence[Step]) -> None:
    """Warn about a malformed payload: the response is 200 even if the sync can't apply it."""
    try:
        changes_from_event(parse(signing_keys.trust(steps[0].body)))
    except MalformedEvent as error:
        output.warn(str(error))


def _decode(response: httpx2.Response) -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return response.text  # perhaps from a proxy


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
    if scenario is None:
        raise EventMissing()
    if event is not None:
        raise SettingInvalid(name="--scenario", problem="use either a scenario or an event")
    if data:
        raise SettingInvalid(name="--data", problem="it needs an event, not a scenario")
    name = check_choice("--scenario", scenario, SCENARIOS)
    ends = scenarios.LONGEST_MS + count  # ms from the first beginning, so that nothing is to come
    series = [scenarios.scenario(name, at=at - ends, rng=rng, id=id) for at in moments]
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
            if text[:1] in ('"', "[", "{"):
                problem = f"{name} isn't valid JSON; put the whole value in single quotes"
                raise SettingInvalid(name="--data", problem=problem) from None
            fields[name] = text
    return fields


async def send_requests(
    url: str,
    requests: Iterable[Request],
    add_response: Callable[[Request, httpx2.Response], None],
    concurrency: int = 10,
) -> None:
    """Post each request once, in order, at most `concurrency` at a time, as Logto does.

    `add_response` is called with each response, whatever its status. Raises ServiceUnreachable.
    """
    waiting = iter(requests)

    async def send(client: httpx2.AsyncClient) -> None:
        for request in waiting:
            add_response(request, await _post(client, url, request))

    try:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send(client))
    except* (httpx2.HTTPError, httpx2.InvalidURL, OverflowError) as errors:
        first = errors.exceptions[0]
        problem = str(first) or type(first).__name__
        raise ServiceUnreachable(url=strip_url(url), problem=problem) from None


async def _post(client: httpx2.AsyncClient, url: str, request: SignedRequest) -> httpx2.Response:
    if request.pieces == 1:
        return await client.post(url, content=request.body, headers=request.headers)
    # Without a length, the body would be sent chunked, which Logto never does.
    headers = [*request.headers, ("content-length", str(len(request.body)))]
    return await client.post(url, content=_send_slowly(request), headers=headers)


async def _send_slowly(request: SignedRequest) -> AsyncIterator[bytes]:
    size = -(-len(request.body) // request.pieces)
    for start in range(0, len(request.body), size):
        yield request.body[start : start + size]
        await asyncio.sleep(PAUSE_S)
