"""Generated lives through generated tables: each row is right or says why not, and the
application's own rows stay as they are."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from logto_webhooks.ensure_user import OwnUsers, ensure_user
from logto_webhooks.errors import UserHasNoRow, UserIsDeletedError, UserNotReady
from logto_webhooks.mapping.apply import apply_all, retry_unsettled
from tests.support.generated_schemas import ShapedApplication, draw_application
from tests.support.mapped_application import learn
from tests.support.own_changes import OwnChanges
from tests.support.people_with_roles import Claims, PeopleWithRoles, Told
from tests.support.stores import Copy, StoreKind
from tests.support.wrong_rows import find_wrong, find_wrong_links, read_state

SEEDS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_SCHEMAS", "4"))
STEPS = 40


class Life:
    """The life of an application, which is told what happened to people."""

    def __init__(self, application: ShapedApplication, rng: random.Random) -> None:
        self._application = application
        self._rng = rng
        self._copy = Copy(application.host)
        self._people = PeopleWithRoles(rng)
        self._changes = OwnChanges(application, rng)
        self._is_mapped = False
        self._wrong: list[str] = []

    async def live(self) -> list[str]:
        """Live for a while. Return what is wrong in the end."""
        for _ in range(self._rng.randint(0, 5)):
            self._changes.add_user()
        told = self._draw_told()
        # Some people were there before the tables are mapped.
        before = self._rng.choice([0, self._rng.randint(0, len(told))])
        await self._tell(told[:before])
        await self._watch(self._map)
        left = told[before:]
        while left:
            size = self._rng.randint(1, 6)
            piece, left = left[:size], left[size:]
            await self._watch(partial(self._tell, piece))
            for _ in range(self._rng.randint(0, 4)):
                self._changes.change()
            if self._rng.random() < 0.1:
                await self._watch(self._apply)
        await self._tell([self._people.list_last_answers()])
        for settle in (self._retry, self._apply, self._retry):
            await self._watch(settle)
        return self._wrong + await find_wrong(self._application, self._changes, self._people)

    def _draw_told(self) -> list[Told]:
        """Draw what is told, sometimes in any order, and some of it twice."""
        for _ in range(self._rng.randint(3, STEPS)):
            self._people.step()
        told = list(self._people.told)
        if self._rng.random() < 0.6:
            told += [each for each in told if self._rng.random() < 0.1]
            self._rng.shuffle(told)
        return told + self._people.list_last_changes()

    async def _tell(self, told: Sequence[Told]) -> None:
        await self._copy.take([each for each in told if isinstance(each, bytes)])
        for each in told:
            if isinstance(each, Claims):
                await self._use_token(each)
            elif not isinstance(each, bytes):
                await learn(self._application.host, each)

    async def _use_token(self, claims: Claims) -> None:
        own = self._application
        if self._is_mapped and self._rng.random() < 0.5:
            with suppress(UserHasNoRow, UserIsDeletedError, UserNotReady):
                await self._get_user(claims)
        else:
            with suppress(UserIsDeletedError):
                await own.host.run(partial(ensure_user, claims=claims.values))

    async def _get_user(self, claims: Claims) -> None:
        """Get the object of a user, as a request of the application does."""
        own = self._application
        with Session(own.engine) as session:
            getter = OwnUsers(own.host, own.mappings, own.user_class)
            person = await getter.get(claims.values, session, None)
            found = session.scalar(sa.select(own.user_id).where(*_is_row(own.users, person)))
            if found != claims.values["sub"]:
                self._wrong.append(f"{claims} get the row of {found}")
            session.commit()

    async def _map(self) -> None:
        self._is_mapped = True
        await self._application.map_tables(*self._application.declare_all().all)
        await self._application.apply_all()

    async def _apply(self) -> None:
        await apply_all(self._application.host, self._application.mappings)

    async def _retry(self) -> None:
        await retry_unsettled(self._application.host, self._application.mappings)

    async def _watch(self, step: Callable[[], Awaitable[None]]) -> None:
        """Do a step, and note which rows it links wrongly."""
        if self._application.shape.link is None:
            await step()
            return
        before = await read_state(self._application)
        await step()
        after = await read_state(self._application)
        self._wrong += find_wrong_links(self._application, before, after)


def _is_row(table: sa.Table, of: object) -> list[sa.ColumnElement[bool]]:
    return [column == getattr(of, column.key) for column in table.primary_key]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", ["sqlite", "postgres-thread"])
def test_rows_are_right_or_say_why_not(kind: StoreKind, seed: int, tmp_path: Path) -> None:
    """Whatever the tables are like, and whatever the application does beside."""
    rng = random.Random(seed)

    async def run() -> list[str]:
        application = draw_application(kind, rng)
        application.create(tmp_path)
        try:
            return await Life(application, rng).live()
        finally:
            await application.close()

    assert asyncio.run(run()) == []
