"""Two releases of an application at once on PostgreSQL: the newer one changes a mapping or adds a
handler while the older one works."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks import mapping
from logto_webhooks.database import runner
from logto_webhooks.database.mapped_rows import MappingStore, RegisteredMapping
from logto_webhooks.database.mirror import RowFilter
from logto_webhooks.database.postgres import Postgres
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import mappings
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping, TimedOut
from logto_webhooks.handlers.existing import Pacer, run_for_existing
from logto_webhooks.jobs import JobFilter, RegisteredHandler
from logto_webhooks.mapping import Mappings, apply
from logto_webhooks.mapping.apply import apply_all, apply_step
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.mapped_application import Application
from tests.support.stores import Copy

pytestmark = pytest.mark.postgres


class Releases:
    """The older release, which runs, and the newer one, which isn't registered yet."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.older: Mappings = application.mappings
        own = application.users.c
        self.newer = application.declare(
            columns={
                own.email: "email",
                own.active: lambda user: not user.is_suspended,
                own.first_name: lambda user: "newer",
            }
        )
        url = postgres.server_url().set(drivername="postgresql+psycopg")
        self.engine = sa.create_engine(url)  # another process's
        self.host: HandlerRunner = Postgres(self.engine, postgres.schema()).host
        self.host.project = self.newer.write

    async def close(self) -> None:
        """End the newer release."""
        await self.host.close()
        self.engine.dispose()

    async def register_newer(self) -> None:
        """Start the newer release."""
        await self.host.run(partial(register, mappings=self.newer))

    def names(self) -> list[str]:
        """What the application's rows say."""
        rows = self.application.rows(self.application.users, "first_name")
        return [name for (name,) in rows]

    @contextmanager
    def writing_late(self) -> Iterator[tuple[threading.Event, threading.Event]]:
        """What the older release has written is committed only later. Yields what says that it was
        written, and what lets it commit."""
        written, may_commit = threading.Event(), threading.Event()

        def project(*args: Any) -> set[str]:
            names = self.older.write(*args)
            written.set()
            assert may_commit.wait(30)
            return names

        self.application.host.project = project
        yield written, may_commit
        self.application.host.project = self.older.write


def register(store: Store, mappings: Mappings) -> None:
    store.mappings.register(mappings.registered)


def created(user: str, at: int = 1_000) -> bytes:
    return make.user_created(id=user, email=f"{user}@x.example", at=at).body


def run(folder: Path, work: Callable[[Releases], Coroutine[Any, Any, None]]) -> None:
    """Run with the older release applied."""

    async def live(application: Application) -> None:
        await application.map()
        await application.apply_all()
        releases = Releases(application)
        try:
            await work(releases)
        finally:
            await releases.close()

    Application.run("postgres-thread", folder, live)


@pytest.mark.parametrize("by_command", [False, True])
def test_a_user_who_is_committed_late_gets_the_newer_columns(
    by_command: bool, tmp_path: Path
) -> None:
    """The newer mapping isn't applied while a transaction is open that knows only the older one."""

    async def work(releases: Releases) -> None:
        copy = Copy(releases.application.host)
        await copy.take([created("bo"), created("cy")])
        with releases.writing_late() as (written, may_commit):
            taking = asyncio.create_task(copy.take([created("ana", at=2_000)]))
            await asyncio.to_thread(written.wait)
            await releases.register_newer()
            applying = asyncio.create_task(apply_newer(releases))
            done, _ = await asyncio.wait({applying}, timeout=0.3)
            assert not done
            may_commit.set()
            await taking
        await applying
        assert releases.names() == ["newer"] * 3

    async def apply_newer(releases: Releases) -> None:
        if by_command:
            await apply_all(releases.host, releases.newer)
        while await apply_step(releases.host, releases.newer) is not None:
            pass

    run(tmp_path, work)


def test_a_transaction_that_stays_open_holds_nothing_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a while, the newer mapping is applied beside it, with a warning that says so."""
    monkeypatch.setattr(runner, "OPEN_S", 0.2)

    async def work(releases: Releases) -> None:
        copy = Copy(releases.application.host)
        await copy.take([created("bo")])
        with releases.writing_late() as (written, may_commit):
            taking = asyncio.create_task(copy.take([created("ana", at=2_000)]))
            await asyncio.to_thread(written.wait)
            await releases.register_newer()
            while await apply_step(releases.host, releases.newer) is not None:
                pass
            assert releases.names() == ["newer"]
            may_commit.set()
            await taking
        assert "what it creates may be left out" in caplog.text
        await apply_all(releases.host, releases.newer)
        assert releases.names() == ["newer", "newer"]

    run(tmp_path, work)


def test_several_new_mappings_wait_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before each page: a transaction of the application can stay open for long."""
    waits: list[None] = []

    async def wait(host: HandlerRunner) -> None:
        waits.append(None)

    monkeypatch.setattr(apply, "await_open_transactions", wait)
    monkeypatch.setattr(mapping, "PAGE", 2)

    async def work(releases: Releases) -> None:
        teams = [make.organization_created(id=name).body for name in ("acme", "best")]
        await Copy(releases.application.host).take([*teams, *map(created, "abcdefg")])
        waits.clear()
        # All mappings are new.
        await releases.host.run(lambda store: store.connection.execute(sa.delete(mappings)))
        mapped = releases.application.declare()
        releases.host.project = mapped.write
        await releases.host.run(partial(register, mappings=mapped))
        while await apply_step(releases.host, mapped) is not None:
            pass
        assert len(waits) == 1
        registered = await releases.host.read(lambda store: store.mappings.registered())
        assert {own.applied_to for own in registered.values()} == {None}

    run(tmp_path, work)


def test_an_older_release_applies_no_newer_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was registered after the older one looked at what is registered."""

    async def work(releases: Releases) -> None:
        await Copy(releases.application.host).take([created(name) for name in ("ana", "bo")])
        lock_unapplied, loop = MappingStore.lock_unapplied, asyncio.get_running_loop()

        def register_first(self: MappingStore, wanted: Any) -> RegisteredMapping | None:
            monkeypatch.undo()
            asyncio.run_coroutine_threadsafe(releases.register_newer(), loop).result(30)
            return lock_unapplied(self, wanted)

        monkeypatch.setattr(MappingStore, "lock_unapplied", register_first)
        await apply_step(releases.application.host, releases.older)
        while await apply_step(releases.host, releases.newer) is not None:
            pass
        assert releases.names() == ["newer", "newer"]

    run(tmp_path, work)


def test_a_mapping_is_replaced_only_between_the_transactions_of_a_command(tmp_path: Path) -> None:
    """Else the older release's command could say that the newer mapping is applied."""

    async def work(releases: Releases) -> None:
        [older, *_] = releases.older.registered
        engine = postgres.sync_engine().execution_options(
            schema_translate_map={None: postgres.schema()}
        )
        with engine.begin() as connection:
            assert Store(connection).mappings.hold(older)
            with pytest.raises(TimedOut):
                await releases.register_newer()
        await releases.register_newer()
        with engine.begin() as connection:
            assert not Store(connection).mappings.hold(older)
        with pytest.raises(InvalidMapping, match="newer release"):
            await apply_all(releases.application.host, releases.older)

    run(tmp_path, work)


def test_a_new_handler_gets_users_who_are_committed_late(tmp_path: Path) -> None:
    """Their transaction knows nothing of the handler, so it runs for the existing rows only when
    that is over."""
    new = RegisteredHandler(name="new", patterns=("LocalUserCreated",))

    async def work(releases: Releases) -> None:
        copy = Copy(releases.application.host)
        await copy.take([created("bo")])
        with releases.writing_late() as (written, may_commit):
            taking = asyncio.create_task(copy.take([created("ana", at=2_000)]))
            await asyncio.to_thread(written.wait)
            await releases.host.run(lambda store: store.jobs.register([new]))
            running = asyncio.create_task(
                run_for_existing(
                    releases.host,
                    new,
                    RowFilter(),
                    Pacer(1_000),
                    dry_run=False,
                    progressed=lambda *progress: None,
                )
            )
            done, _ = await asyncio.wait({running}, timeout=0.3)
            assert not done
            may_commit.set()
            await taking
        await running
        jobs = await releases.host.read(lambda store: store.jobs.find(JobFilter()))
        assert sorted(job.subject for job in jobs) == ["user:ana", "user:bo"]

    run(tmp_path, work)
