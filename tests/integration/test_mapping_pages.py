"""Who gets an existing row doesn't depend on the page of `mapping apply`."""

from __future__ import annotations

import os
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks import mapping
from logto_webhooks.apply import batch
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import records, users
from logto_webhooks.database.store import Store
from logto_webhooks.events import parse
from logto_webhooks.mapping import check, row_limits
from logto_webhooks.mapping.apply import apply_all, apply_step, retry_unsettled
from logto_webhooks.mapping.check import Difference
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import apply_twice, created, joined, names, states_of
from tests.integration.test_mapping_links import insert
from tests.support.mapped_application import KINDS, PLAN, Application
from tests.support.stores import Copy, StoreKind

ROWS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_OWN_ROWS", "2000"))


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of three records."""
    monkeypatch.setattr(mapping, "PAGE", 3)
    monkeypatch.setattr(check, "PAGE", 3)


def named(name: str, email: str) -> bytes:
    return make.user_created(id=name, email=email, at=1_000).body


async def find(application: Application) -> list[Difference]:
    pages = check.find_differences(application.host, application.mappings)
    return [difference async for page in pages for difference in page]


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("how", ["in the background", "by the command"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_two_users_want_is_nobodys(kind: StoreKind, how: str, tmp_path: Path) -> None:
    """They are on the first page and on the last."""

    async def live(application: Application) -> None:
        own = application.users
        sent = [named("u0000", "E@x"), *map(created, names(10)[1:9]), named("u0009", "e@x")]
        await Copy(application.host).take(sent)
        insert(application, "e@X", "u0004@X", "u0008@X")
        await application.map(link=own.c.email)
        if how == "in the background":
            while await apply_step(application.host, application.mappings) is not None:
                pass
        else:
            assert len(await find(application)) == 10
            [applied, *_] = [
                each for each in await apply_twice(application) if each.mapping == own.fullname
            ]
            assert (applied.records, applied.linked, applied.created) == (10, 2, 6)
            assert (applied.ambiguous, applied.refused) == (2, 0)
        assert await states_of(application.host, own) == {"ok": 8, "conflict": 2}
        linked = dict(application.rows(own, "email", "logto_user_id"))
        assert linked["e@X"] is None
        assert (linked["u0004@x"], linked["u0008@x"]) == ("u0004", "u0008")
        differences = await find(application)
        assert {each.logto_id for each in differences} == {"u0000", "u0009"}
        assert {each.reason for each in differences} == {
            "another user could be linked to the same row"
        }
        changed = make.user_data_updated(id="u0009", email="other@x", at=2_000).body
        await Copy(application.host).take([changed])
        await retry_unsettled(application.host, application.mappings)
        linked = dict(application.rows(own, "email", "logto_user_id"))
        assert (linked["E@x"], linked["other@x"]) == ("u0000", "u0009")

    Application.run(kind, tmp_path, live)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_user_waits_until_all_are_compared(kind: StoreKind, tmp_path: Path) -> None:
    """Somebody who isn't compared yet may want the same row."""

    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(application.host)
        await copy.take([*map(created, names(8)), named("u0009", "e@x")])
        insert(application, "e@x")
        await application.map(link=own.c.email)
        await copy.take([named("a", "e@x")])
        assert await states_of(application.host, own) == {"waiting": 1}
        await application.apply_all()
        assert await states_of(application.host, own) == {"ok": 8, "conflict": 2}

    Application.run(kind, tmp_path, live)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_came_later_are_compared_again(kind: StoreKind, tmp_path: Path) -> None:
    """Two users had none to be linked to before, and now want the same one."""

    async def live(application: Application) -> None:
        own = application.users
        await Copy(application.host).take(
            [named("u0000", "E@x"), *map(created, names(10)[1:9]), named("u0009", "e@x")]
        )
        await application.map(link=own.c.email, create=False)
        await application.apply_all()
        insert(application, "e@X", "u0004@x")
        [applied, *_] = [
            each for each in await apply_twice(application) if each.mapping == own.fullname
        ]
        assert (applied.linked, applied.ambiguous, applied.refused) == (1, 2, 0)
        linked = dict(application.rows(own, "email", "logto_user_id"))
        assert linked == {"e@X": None, "u0004@x": "u0004"}

    Application.run(kind, tmp_path, live)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_knows_what_earlier_pages_would_have_written(
    kind: StoreKind, tmp_path: Path
) -> None:
    """Unique values that rows of other pages take or give up, and members of refused users."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map()
        copy = Copy(host)
        await copy.take(map(created, names(12)))
        for name, email in (("u0000", "was0@x"), ("u0001", "u0010@x")):
            with application.engine.begin() as connection:
                where = own.c.logto_user_id == name
                connection.execute(sa.delete(own).where(own.c.logto_user_id == "u0010"))
                connection.execute(sa.update(own).where(where).values(email=email))
        host.project = None
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        await copy.take([team, joined("acme", ["u0000", "u0011", "v0"])])
        await copy.take([named("v0", "u0000@X"), named("v1", "same@x"), named("w9", "same@x")])
        await copy.take([make.user_data_updated(id="u0000", email="new@x", at=3_000).body])
        await host.run(lambda store: store.mappings.register(application.mappings.registered))
        host.project = application.mappings.write
        applied = {each.mapping: each for each in await apply_twice(application)}[own.fullname]
        assert applied.refused == 1
        assert applied.created == 3

    Application.run(kind, tmp_path, live)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_many_existing_rows_are_linked_as_the_rehearsal_said(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100: 99 can be linked, or are ambiguous or somebody else's. The environment sets how many
    rows there are."""
    monkeypatch.setattr(row_limits, "SHORT_STATEMENT_MS", 10_000)  # on a busy machine, too

    async def live(application: Application) -> None:
        own = application.users
        odd = ROWS // 200
        emails = [f"{n:07}@x.example" for n in range(ROWS)]
        linkable, ambiguous, others = emails[: -2 * odd], emails[-2 * odd : -odd], emails[-odd:]
        await store_users(application.host, emails)
        rows: list[dict[str, Any]] = [
            PLAN | {"email": email, "logto_user_id": None} for email in linkable
        ]
        rows += [PLAN | {"email": email.upper(), "logto_user_id": None} for email in ambiguous]
        rows += [PLAN | {"email": f" {email}", "logto_user_id": None} for email in ambiguous]
        rows += [PLAN | {"email": email, "logto_user_id": f"other {email}"} for email in others]
        with application.engine.begin() as connection:
            connection.execute(sa.insert(own), rows)
            connection.execute(sa.text(f"CREATE INDEX own_email ON {own} (lower(trim(email)))"))
        await application.map(link=own.c.email)
        counts = []
        del rows
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        for dry_run in (True, False):
            began = time.monotonic()
            [applied, *_] = [
                each
                for each in await apply_all(application.host, application.mappings, dry_run)
                if each.mapping == own.fullname
            ]
            took = time.monotonic() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{kind} {dry_run=}: {applied}, {took:.1f} s, {before} to {peak} MiB")
            counts.append(applied)
        assert counts[0] == counts[1]
        assert (applied.records, applied.linked) == (ROWS, ROWS - 2 * odd)
        assert (applied.ambiguous, applied.refused, applied.created) == (odd, odd, 0)
        states = await states_of(application.host, own)
        assert states == {"ok": ROWS - 2 * odd, "conflict": 2 * odd}

    Application.run(kind, tmp_path, live)


async def store_users(host: HandlerRunner, emails: list[str]) -> None:
    """Store users as a backfill does, as copies of one."""
    created = changes_from_event(parse(trust(named("template", "t@x"))))
    await host.run(partial(batch.apply_reads, changes=created, source=None))
    for start in range(0, len(emails), 1_000):
        part = dict(enumerate(emails[start : start + 1_000], start))
        await host.run(partial(copy_template, emails=part))
    await host.run(drop_template)


KEYS = ((records, "logto_id", "local_id"), (users, "logto_user_id", "id"))


def copy_template(store: Store, emails: dict[int, str]) -> None:
    for table, key, own_id in KEYS:
        [row] = store.execute(sa.select(table).where(table.c[key] == "template")).mappings()
        rows = [
            {**row, key: f"u{n:07}", own_id: f"00000000-0000-7000-8000-{n:012}"}
            | ({"email": email} if table is users else {})
            for n, email in emails.items()
        ]
        store.connection.execute(sa.insert(table), rows)


def drop_template(store: Store) -> None:
    for table, key, _ in KEYS:
        store.connection.execute(sa.delete(table).where(table.c[key] == "template"))
