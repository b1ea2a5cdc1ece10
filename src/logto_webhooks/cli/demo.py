"""`demo`: a recorded history, sent to a real service, and what came out of it."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import Struct
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from logto_webhooks import server
from logto_webhooks.cli import output
from logto_webhooks.cli.http_sender import send_request
from logto_webhooks.database import open_database
from logto_webhooks.errors import AddressUnavailable
from logto_webhooks.instrumentation import logs
from logto_webhooks.instrumentation.events import (
    DeliveryFailed,
    DeliveryStored,
    DeliverySynced,
    NotStored,
    RequestRefused,
    TelemetryEvent,
)
from logto_webhooks.interfaces import FoundRow, RefetchNeed, Store
from logto_webhooks.records.outcome import OUTCOMES
from logto_webhooks.runtime import Service, make_worker
from logto_webhooks.samples import history
from logto_webhooks.samples.diff import Difference, differences
from logto_webhooks.samples.request import SignedRequest, sign_request
from logto_webhooks.settings import Settings

PORT = 8787
DUPLICATES = 0.1
_ALL = 1_000_000
_SHOWN = 8
# No recorded history has one: an event that only a later Logto will send.
_LATER = {"event": "Passkey.Created", "createdAt": "2026-11-24T03:18:31.533Z", "data": {}}


class Mirror(Struct, frozen=True):
    """All that the database holds at the end."""

    users: list[FoundRow]
    organizations: list[FoundRow]
    waiting: list[RefetchNeed]


def demo(
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Leave after the summary; exit code 1 if a record differs, undoubted.",
        ),
    ] = False,
    name: Annotated[
        history.Name,
        typer.Option(
            "--history", help="The recorded history to send: people, calm, race or lossy."
        ),
    ] = "calm",
    seed: Annotated[int | None, typer.Option(help="For the same order again.")] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="The port to listen on; 8787 by default, or any free one."
        ),
    ] = None,
) -> None:
    """Send a recorded history of a real Logto, shuffled, and show what came out.

    It goes over HTTP, some of it twice, to a service with a database that is removed in the end.
    """
    chosen = seed if seed is not None else random.SystemRandom().randrange(10_000)
    with tempfile.TemporaryDirectory(prefix="logto-webhooks-demo-") as folder:
        unexplained = asyncio.run(_demo(name, chosen, port, Path(folder) / "demo.db", once))
    raise typer.Exit(1 if unexplained else 0)


async def _demo(name: history.Name, seed: int, port: int | None, file: Path, once: bool) -> int:
    """Return how many differences no doubt explains."""
    recorded = history.load(name)
    settings = Settings(
        signing_key=recorded.signing_key,
        database_url=f"sqlite:///{file}",
        port=PORT if port is None else port,
    )
    logs.configure("text", "warning")
    database = open_database(settings.database_url)
    outcomes = Counter[str]()
    observe = partial(_count, outcomes)
    service = Service(settings, database, observe)
    await database.open()
    listener = _listen(settings.host, port)
    url = settings.url_at(listener.getsockname()[1])
    running = server.Server(service.app, listener)
    serving = asyncio.create_task(running.run())
    try:
        later = sign_request(_LATER, recorded.signing_key)
        sent = _shuffled(recorded.deliveries, later, seed)
        await _play(sent, url, f"recorded history {name}, shuffled with seed {seed}")
        await make_worker(settings, database, observe).drain()
        mirror = await database.host.read(_mirror)
        found = differences(recorded.final, mirror.users, mirror.organizations, mirror.waiting)
        _summary(mirror, outcomes, found)
        if not once:
            _next_steps(settings, url, mirror)
            await serving
    finally:
        running.stop()
        await serving
    return sum(not difference.doubtful for difference in found)


def _listen(host: str, port: int | None) -> socket.socket:
    """Listen on `port`, or on the usual one, or on any free one if that is taken."""
    if port is not None:
        return server.listen(host, port)
    try:
        return server.listen(host, PORT)
    except AddressUnavailable:
        listener = server.listen(host, 0)
        free = listener.getsockname()[1]
        output.out.print(f"Port {PORT} is in use; using {free} instead.", markup=False)
        return listener


def _shuffled(
    deliveries: list[SignedRequest], later: SignedRequest, seed: int
) -> list[SignedRequest]:
    """Any order, some twice, and one of a `later` Logto."""
    rng = random.Random(seed)
    sent = deliveries + rng.sample(deliveries, int(len(deliveries) * DUPLICATES))
    sent.append(later)
    rng.shuffle(sent)
    return sent


def _count(outcomes: Counter[str], report: TelemetryEvent) -> None:
    if isinstance(report, DeliverySynced):
        outcomes[report.outcome] += 1
    elif isinstance(report, DeliveryStored) and report.duplicate:
        outcomes["duplicate"] += 1
    elif isinstance(report, DeliveryFailed | RequestRefused | NotStored):
        outcomes[type(report).__name__] += 1


async def _play(sent: list[SignedRequest], url: str, what: str) -> None:
    output.out.print(
        f"Sending {len(sent)} deliveries ({what}) to {url}", markup=False, soft_wrap=True
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.out) as progress:
        bar = progress.add_task("", total=len(sent))
        await send_request(url, sent, lambda each, response: progress.advance(bar))


def _mirror(store: Store) -> Mirror:
    return Mirror(
        store.find("user", "", _ALL), store.find("organization", "", _ALL), store.waiting(_ALL)
    )


def _summary(mirror: Mirror, outcomes: Counter[str], found: list[Difference]) -> None:
    _show_rows(mirror)
    known = {name: outcomes[name] for name in OUTCOMES} | outcomes
    output.table("\nWhat became of the deliveries", ("outcome", "count", ""), _explained(known))
    doubtful = sorted((each for each in mirror.waiting if each.doubtful), key=lambda each: each.key)
    output.table(
        f"\nIn doubt, because only Logto could tell: {_counted(doubtful)}",
        ("kind", "id", "which of its values"),
        [(each.key.kind, each.key.id, each.reason.removeprefix("doubtful: ")) for each in doubtful],
    )
    output.table(
        f"\nDifferences from what Logto itself said at the end: {len(found)}",
        ("kind", "id", "field", "ours", "Logto's", "in doubt"),
        [(each.key.kind, each.key.id, *_values(each)) for each in found],
        fold=True,
    )
    wrong = {each.key for each in found if not each.doubtful}
    differing = {each.key for each in found if each.doubtful}
    output.out.print(
        f"\n{len(doubtful)} records in doubt, of which {len(differing)} differ from Logto. "
        f"{len(wrong)} others differ.",
        markup=False,
        soft_wrap=True,
    )


def _show_rows(mirror: Mirror) -> None:
    users = [each.row for each in mirror.users if each.row["deleted_at"] is None]
    live = [each for each in mirror.organizations if each.row["deleted_at"] is None]
    _rows("logto_users", ("logto_user_id", "username", "email", "name", "is_suspended"), users)
    columns = ("logto_organization_id", "name", "description", "custom_data")
    _rows("logto_organizations", columns, [each.row for each in live])
    ends = ("logto_organization_id", "logto_user_id")
    pairs = [(each.row[ends[0]], user) for each in live for user in each.memberships]
    members = [dict(zip(ends, pair, strict=True)) for pair in pairs]
    _rows("logto_organization_members", ends, members)


def _explained(counts: dict[str, int]) -> list[tuple[str, int, str]]:
    return [(name, count, OUTCOMES.get(name, "")) for name, count in counts.items()]


def _rows(name: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    more = f", of which the first {_SHOWN}" if len(rows) > _SHOWN else ""
    cells = [[row[column] for column in columns] for row in rows[:_SHOWN]]
    output.table(f"\n{name}: {len(rows)} rows{more}", columns, cells)


def _counted(doubtful: list[RefetchNeed]) -> str:
    kinds = Counter(each.key.kind for each in doubtful)
    plural = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(kinds.items())]
    return ", ".join(plural) or "nothing"


def _values(each: Difference) -> tuple[str, str, str, str]:
    return each.field, each.ours, each.logto, "yes" if each.doubtful else "no"


def _next_steps(settings: Settings, url: str, mirror: Mirror) -> None:
    command = sys.argv[0]
    email = next((each.row["email"] for each in mirror.users if each.row["email"]), "")
    output.out.print(
        f"\nStill listening on {url}\nTry in another terminal:\n\n"
        f"  export LOGTO_WEBHOOKS_DATABASE_URL={settings.database_url}\n"
        f"  export LOGTO_WEBHOOK_SIGNING_KEY={settings.signing_key}\n"
        f"  export LOGTO_WEBHOOKS_PORT={url.split(':')[2].split('/')[0]}\n"
        f"  {command} users {email}\n"
        f"  {command} trigger User.Created --data email=ana@example.com\n"
        f"  {command} users ana@example.com\n"
        f"  {command} status\n\n"
        "Ctrl-C ends it, and removes its database.",
        markup=False,
        soft_wrap=True,
    )
