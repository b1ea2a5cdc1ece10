"""`demo`: send a recorded history to a real service, and show the result."""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final

from msgspec import Struct
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from typer import Exit, Option

from logto_webhooks import server
from logto_webhooks.cli import output
from logto_webhooks.cli.trigger import send_requests
from logto_webhooks.database import open_database
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.database.store import Store
from logto_webhooks.errors import AddressUnavailable
from logto_webhooks.instrumentation import (
    DeliveryFailed,
    DeliveryStored,
    DeliverySynced,
    NotStored,
    RequestRefused,
    TelemetryEvent,
    logs,
)
from logto_webhooks.plural import Count
from logto_webhooks.records.merge import OUTCOMES
from logto_webhooks.runtime import Service, make_worker
from logto_webhooks.samples import history
from logto_webhooks.samples.history import FieldDifference, differences
from logto_webhooks.samples.request import SignedRequest, sign_request
from logto_webhooks.settings import Settings

PORT: Final = 8787
DUPLICATES: Final = 0.1
_ALL: Final = 1_000_000
_MOST_ROWS: Final = 8
# An event that only later versions of Logto send, which no recorded history has.
_LATER: Final = {"event": "Passkey.Created", "createdAt": "2026-11-24T03:18:31.533Z", "data": {}}


class _Mirror(Struct, frozen=True):
    """All records in the database at the end."""

    users: list[FoundRow]
    organizations: list[FoundRow]
    waiting: list[RefetchNeed]


def demo(
    once: Annotated[
        bool,
        Option(
            "--once",
            help="Exit after the summary, with code 1 if a record differs and isn't in doubt.",
        ),
    ] = False,
    name: Annotated[
        history.Name,
        Option("--history", help="The recorded history to send: people, calm, race or lossy."),
    ] = "calm",
    seed: Annotated[
        int | None, Option(help="Repeat the order of an earlier run. Default: random.")
    ] = None,
    port: Annotated[
        int | None,
        Option(min=0, max=65535, help="The port to listen on. Default: 8787, or any free port."),
    ] = None,
) -> None:
    """Send a recorded history and show the result.

    The history comes from a real Logto. Its deliveries are sent over HTTP in random order, some of
    them twice, to a service with a temporary database.
    """
    chosen_seed = seed if seed is not None else random.SystemRandom().randrange(10_000)
    with tempfile.TemporaryDirectory(prefix="logto-webhooks-demo-") as folder:
        wrong = asyncio.run(_demo(name, chosen_seed, port, Path(folder) / "demo.db", once))
    raise Exit(1 if wrong else 0)


async def _demo(name: history.Name, seed: int, port: int | None, file: Path, once: bool) -> int:
    """Return the number of values that differ from Logto's and aren't in doubt."""
    recorded = history.load(name)
    settings = Settings(
        signing_key=recorded.signing_key,
        database_url=f"sqlite:///{file}",
        port=PORT if port is None else port,
    )
    logs.configure("text", "warning")
    database = open_database(settings.database_url)
    outcomes = Counter[str]()

    def observe(event: TelemetryEvent) -> None:
        if isinstance(event, DeliverySynced):
            outcomes[event.outcome] += 1
        elif isinstance(event, DeliveryStored) and event.duplicate:
            outcomes["duplicate"] += 1
        elif isinstance(event, DeliveryFailed | RequestRefused | NotStored):
            outcomes[type(event).__name__] += 1

    service = Service(settings, database, observe)
    await database.open()
    listener = _listen(settings.host, port)
    url = settings.url_at(listener.getsockname()[1])
    running = server.Server(service.app, listener, service.hurry)
    serving = asyncio.create_task(running.run())
    try:
        later = sign_request(_LATER, recorded.signing_key)
        requests = _shuffle(recorded.deliveries, later, seed)
        await _send(requests, url, f"recorded history {name}, shuffled with seed {seed}")
        await make_worker(settings, database, observe).drain()
        mirror = await database.host.read(_read_mirror)
        different = differences(recorded.final, mirror.users, mirror.organizations, mirror.waiting)
        _show_summary(mirror, outcomes, different)
        if not once:
            _show_next_steps(settings, url, mirror)
            await serving
    finally:
        running.stop()
        await serving
    return sum(not difference.doubtful for difference in different)


def _listen(host: str, port: int | None) -> socket.socket:
    """Listen on `port`, or else on the default port, or on a free one if that is in use."""
    if port is not None:
        return server.listen(host, port)
    try:
        return server.listen(host, PORT)
    except AddressUnavailable:
        listener = server.listen(host, 0)
        output.say(f"Port {PORT} is in use. Using {listener.getsockname()[1]} instead.")
        return listener


def _shuffle(
    deliveries: list[SignedRequest], later: SignedRequest, seed: int
) -> list[SignedRequest]:
    """Put the deliveries in random order, some of them twice, with the event of a later Logto."""
    rng = random.Random(seed)
    requests = deliveries + rng.sample(deliveries, int(len(deliveries) * DUPLICATES))
    requests.append(later)
    rng.shuffle(requests)
    return requests


async def _send(requests: list[SignedRequest], url: str, title: str) -> None:
    output.say(f"Sending {len(requests)} deliveries ({title}) to {url}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.make_console()) as progress:
        bar = progress.add_task("", total=len(requests))
        await send_requests(url, requests, lambda request, response: progress.advance(bar))


def _read_mirror(store: Store) -> _Mirror:
    return _Mirror(
        store.find("user", "", _ALL), store.find("organization", "", _ALL), store.waiting(_ALL)
    )


def _show_summary(
    mirror: _Mirror, outcomes: Counter[str], different: list[FieldDifference]
) -> None:
    users = [user.row for user in mirror.users if user.row["deleted_at"] is None]
    live = [record for record in mirror.organizations if record.row["deleted_at"] is None]
    members = [
        {"logto_organization_id": record.row["logto_organization_id"], "logto_user_id": user}
        for record in live
        for user in record.memberships
    ]
    _show_rows("logto_users", users)
    _show_rows("logto_organizations", [record.row for record in live])
    _show_rows("logto_organization_members", members)
    counts = {name: outcomes[name] for name in OUTCOMES} | outcomes
    output.print_table(
        "\nOutcomes of the deliveries",
        ("outcome", "count", ""),
        [(name, count, OUTCOMES.get(name, "")) for name, count in counts.items()],
    )
    doubtful = sorted((need for need in mirror.waiting if need.doubtful), key=lambda need: need.key)
    output.print_table(
        f"\nIn doubt until a refetch from Logto: {_count_kinds(doubtful)}",
        ("kind", "id", "values in doubt"),
        [(need.key.kind, need.key.id, need.reason.removeprefix("doubtful: ")) for need in doubtful],
    )
    output.print_table(
        f"\nDifferences from Logto's final state: {len(different)}",
        ("kind", "id", "field", "ours", "Logto's", "in doubt"),
        [
            (*row.key, row.field, row.ours, row.logto, "yes" if row.doubtful else "no")
            for row in different
        ],
        fold=True,
    )
    wrong = {difference.key for difference in different if not difference.doubtful}
    differing = {difference.key for difference in different if difference.doubtful}
    output.say(
        f"\n{Count(len(doubtful)):record is|records are} in doubt. "
        f"{Count(len(differing)):of them differs|of them differ} from Logto. "
        f"{Count(len(wrong)):other record differs|other records differ}."
    )


def _show_rows(name: str, rows: list[dict[str, Any]]) -> None:
    first = f", the first {_MOST_ROWS}" if len(rows) > _MOST_ROWS else ""
    output.print_list(name, rows[:_MOST_ROWS], f"\n{name}: {len(rows)} rows{first}")


def _count_kinds(doubtful: list[RefetchNeed]) -> str:
    kinds = Counter(need.key.kind for need in doubtful)
    counts = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(kinds.items())]
    return ", ".join(counts) or "nothing"


def _show_next_steps(settings: Settings, url: str, mirror: _Mirror) -> None:
    command = _own_command()
    email = next((user.row["email"] for user in mirror.users if user.row["email"]), "")
    variables = {
        "LOGTO_WEBHOOKS_DATABASE_URL": settings.database_url,
        "LOGTO_WEBHOOK_SIGNING_KEY": settings.signing_key,
        "LOGTO_WEBHOOKS_PORT": url.split(":")[2].split("/")[0],
    }
    if import_path := os.environ.get("PYTHONPATH"):
        folders = map(os.path.abspath, import_path.split(os.pathsep))
        variables["PYTHONPATH"] = os.pathsep.join(folders)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()] + [
        f"{command} users {shlex.quote(email)}",
        f"{command} trigger User.Created --data email=ana@example.com",
        f"{command} users ana@example.com",
        f"{command} status",
    ]
    output.say(
        f"\nStill listening on {url}\nTry in another terminal:\n\n"
        + "".join(f"  {line}\n" for line in lines)
        + "\nPress Ctrl-C to stop and delete the database."
    )


def _own_command() -> str:
    """Return how to run this program from another folder."""
    program = Path(sys.argv[0]).absolute()
    if program.name == "__main__.py":  # it was run with `python -m`
        return f"{shlex.quote(sys.executable)} -m logto_webhooks"
    return shlex.quote(str(program))
