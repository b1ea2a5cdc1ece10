"""Installing on a Logto that lived before: nobody is mailed about last week."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from logto_webhooks import Delivery, LogtoWebhooks
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import NOBODY, application
from tests.support.waiting import eventually

DAY_MS = 86_400_000


class Past:
    """A clock that goes a day behind until the installation."""

    behind = DAY_MS

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000 - self.behind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_what_was_before_runs_no_handler(kind: str, tmp_path: Path) -> None:
    """Of a day's log, of backfill, of a comparison and of reads; what comes after runs them."""
    clock = Past()
    ran: list[tuple[str, str]] = []

    async def run() -> None:
        async with FakeLogto(now=clock.now) as fake:
            fake.add_hook(NOBODY)  # nothing answers there: all is lost, and in Logto's log
            acme, ana = await a_days_history(fake)
            clock.behind = 0
            logto = application(kind, tmp_path, fake)
            logto.handlers = type(logto.handlers)()  # only the one below
            listen(logto, ran)
            await logto.migrate()
            if kind == "postgres":  # a schema that was emptied forgot when it was installed
                installed = clock.now()
                await logto.database.host.run(lambda store: store.set_installed_at(installed))
            async with logto.lifespan():
                await everything(logto)
                assert ran == []
                await asyncio.sleep(1.1)  # Logto's clock and log are in whole seconds
                fake.sign_in(ana)
                bo = fake.sign_up(primaryEmail="bo@example.com")["id"]
                fake.add_members(acme, [bo])
                await fake.settle()
                await everything(logto)
                await eventually(
                    lambda: _now(ran), lambda told: len(told) >= len(expected(acme, bo, ana))
                )
            # Whether PostRegister changes the row that User.Created made depends on their batches.
            told = [each for each in ran if each != ("LocalUserUpdated", f"user:{bo}")]
            assert sorted(told) == sorted(expected(acme, bo, ana))

    asyncio.run(run())


async def a_days_history(fake: FakeLogto) -> tuple[str, str]:
    """People signed up, changed, joined, left; returns an organization and a user."""
    acme = fake.create_organization(name="Acme")["id"]
    people = [fake.sign_up([acme], username=f"user{number}")["id"] for number in range(20)]
    for each in people[:10]:
        fake.sign_in(each)
        fake.set_custom_data(each, {"plan": "pro"})
    fake.remove_members(acme, people[:3])
    fake.delete_user(people[4])
    fake.assign_role(people[5], "admin")
    await fake.settle()
    return acme, people[6]


def listen(logto: LogtoWebhooks, ran: list[tuple[str, str]]) -> None:
    """One handler for all that Logto tells, one for all that changes here."""

    @logto.on("*", name="raw")
    def raw(delivery: Delivery) -> None:
        ran.append((delivery.event, delivery.subject))

    @logto.on("Local*", name="local")
    def local(delivery: Delivery) -> None:
        ran.append((delivery.event, delivery.subject))


async def everything(logto: LogtoWebhooks) -> None:
    """All ways in which something comes from Logto; then all that waits is done."""
    await logto.recover()
    await eventually(logto.status, lambda status: not status.deliveries["pending"])
    await logto.backfill()
    await logto.reconcile()
    await eventually(logto.status, lambda status: not status.refetch and not status.doubtful)
    await eventually(logto.known_handlers, lambda known: all(not each.waiting for each in known))


def expected(acme: str, bo: str, ana: str) -> list[tuple[str, str]]:
    """What may run: the new user's, the new member's, the sign-in's; each once."""
    return [
        ("PostSignIn", f"user:{ana}"),
        ("LocalUserUpdated", f"user:{ana}"),
        ("User.Created", f"user:{bo}"),
        ("PostRegister", f"user:{bo}"),
        ("LocalUserCreated", f"user:{bo}"),
        ("Organization.Membership.Updated", f"organization:{acme}"),
        ("LocalMemberAdded", f"user:{bo}"),
    ]


async def _now(ran: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return ran
