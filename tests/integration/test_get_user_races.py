"""First requests of users while the worker applies deliveries about the same users."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx2
import pytest

from logto_webhooks import LogtoWebhooks
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from tests.integration.test_get_user import Seen, get
from tests.support.mounted import live, send, soon
from tests.support.own_tables import Application, EngineKind, Team, User
from tests.support.waiting import eventually

SERVERS: tuple[EngineKind, ...] = ("psycopg", "asyncpg", "psycopg awaited")
PEOPLE = 10
REQUESTS = 40  # at once
CHANGES = 4  # of each user


def email(person: int, change: int) -> str:
    return f"{person}-{change}@x.example"


@pytest.mark.postgres
@pytest.mark.parametrize("kind", SERVERS)
def test_many_first_requests_and_deliveries_at_once(kind: EngineKind, tmp_path: Path) -> None:
    """Each user has one row, which all requests got, and which is as the last delivery says. No
    request fails, and nothing stays in doubt or owed."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()
        app.map_teams()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            rng = random.Random(kind)
            for turn in range(3):
                began = soon()
                people = [f"t{turn}p{n}" for n in range(PEOPLE)]
                sent = [make.organization_created(id=f"team{turn}", name="Team", at=began)]
                for n, person in enumerate(people):
                    # The user's own time, in the delivery, is the only order.
                    sent.append(make.user_created(id=person, email=email(n, 0), at=began))
                    for change in range(1, CHANGES):
                        at = began + 1_000 * change
                        address = f"{turn}{email(n, change)}"
                        changed = make.user_data_updated(
                            id=person, at=at, email=address, updatedAt=at
                        )
                        sent.append(changed)
                rng.shuffle(sent)
                asked = [people[n % PEOPLE] for n in range(REQUESTS)]
                rng.shuffle(asked)

                async def ask(person: str, turn: int = turn) -> tuple[str, Seen]:
                    await asyncio.sleep(rng.random() / 10)
                    claims = {"sub": person, "email": f"{turn}-{person}@token", "name": "Token"}
                    return person, await get(app, claims)

                async def deliver(part: int, sent: list[SignedRequest] = sent) -> None:
                    await send(client, *sent[part::4])

                async with asyncio.timeout(60):
                    delivering = asyncio.gather(*map(deliver, range(4)))
                    seen = await asyncio.gather(*map(ask, asked))
                    await delivering
                by_person: dict[str, set[int]] = {}
                for person, (id_, logto_id, _) in seen:
                    assert logto_id == person
                    by_person.setdefault(person, set()).add(id_)
                assert {len(ids) for ids in by_person.values()} == {1}
                await eventually(logto.status, lambda status: not status.deliveries["pending"])
                status = await logto.status()
                assert (status.deliveries["dead"], status.doubtful) == (0, 0)
                await eventually(
                    logto.mapping_counts,
                    lambda counts: not any(each.owed or each.conflict for each in counts),
                )
                last = {f"{turn}{email(n, CHANGES - 1)}" for n in range(PEOPLE)}
                assert last <= set(app.all(User.email))
                assert len(app.all(User.id)) == PEOPLE * (turn + 1)
                assert len(app.all(Team.id)) == turn + 1

        live(app.logto, body)
