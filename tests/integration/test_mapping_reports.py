"""What keeps rows of mapped tables from being written is said once, in the log and by `doctor`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, runtime
from logto_webhooks.doctor.faults import Finding, Level
from logto_webhooks.instrumentation import RowsNotWritten, TelemetryEvent
from logto_webhooks.mapping import report
from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.report import UnwrittenReporter
from logto_webhooks.testing import make
from tests.support import own_tables
from tests.support.mapped_application import KINDS
from tests.support.mapped_application import Application as Tables
from tests.support.mounted import live, send
from tests.support.own_tables import Application, EngineKind, User
from tests.support.stores import Copy, StoreKind
from tests.support.waiting import eventually


def has_line(caplog: pytest.LogCaptureFixture, *words: str) -> Callable[[], bool]:
    """Whether one warning has all these words."""
    return lambda: any(
        record.levelno == logging.WARNING and all(word in record.getMessage() for word in words)
        for record in caplog.records
    )


async def diagnose(logto: LogtoWebhooks) -> list[Finding]:
    findings = await logto.diagnose(["mappings"], application=logto)
    return [finding for finding in findings if finding.check == "mappings"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_reason_is_reported_once(kind: StoreKind, tmp_path: Path) -> None:
    """Again after it was gone. A record that is owed for a moment isn't reported."""

    async def go(tables: Tables) -> None:
        host = await tables.map()
        reports: list[TelemetryEvent] = []
        reporter = UnwrittenReporter(host, reports.append)
        own = tables.users
        taken = {"email": "a@x", "plan": "paid", "active": True}
        with tables.engine.begin() as connection:
            connection.execute(sa.insert(own), [taken, taken | {"email": "b@x"}])
        await Copy(host).take([make.user_created(id=n, email=f"{n}@x").body for n in "ab"])
        for _ in range(2):
            await reporter.report()
        reason = "another row has the value of email"
        expected = RowsNotWritten(own.fullname, "conflict", reason, 2)
        assert reports == [expected]
        with tables.engine.begin() as connection:
            connection.execute(sa.delete(own))
        await retry_unsettled(host, tables.mappings)
        await reporter.report()
        with tables.engine.begin() as connection:
            connection.execute(sa.delete(own))
            connection.execute(sa.insert(own).values(taken | {"id": 99}))
        await tables.apply_again()
        await reporter.report()
        assert reports == [expected, RowsNotWritten(own.fullname, "conflict", reason, 1)]

    Tables.run(kind, tmp_path, go)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nobody_writes_are_reported(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a process that doesn't have the mapping."""

    async def go(tables: Tables) -> None:
        host = await tables.map()
        host.project = None
        reports: list[TelemetryEvent] = []
        reporter = UnwrittenReporter(host, reports.append)
        await Copy(host).take([make.user_created(id="ana").body])
        await reporter.report()
        assert reports == []
        monkeypatch.setattr(report, "_OWED_S", 0)
        await reporter.report()
        reason = "it changed in a process that doesn't have this mapping"
        assert reports == [RowsNotWritten(tables.users.fullname, "owed", reason, 1)]

    Tables.run(kind, tmp_path, go)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", own_tables.KINDS)
def test_the_log_says_why_a_row_is_refused(
    kind: EngineKind,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of whom isn't said."""
    monkeypatch.setattr(runtime, "REPORT_S", 0.05)
    with Application(kind, tmp_path).opened() as app:
        app.map_users()
        app.write(lambda session: session.add(User(email="ana@example.com")))

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            words = ("mapping=own_users", "state=conflict", "another row has the value of email")

            async def look() -> bool:
                return has_line(caplog, *words)()

            await eventually(look)

        live(app.logto, body)
        lines = [r.getMessage() for r in caplog.records if "mapped table" in r.getMessage()]
        assert len(lines) == 1
        assert "ana" not in lines[0]


@pytest.mark.postgres
@pytest.mark.parametrize("kind", own_tables.KINDS)
@pytest.mark.parametrize("dropped", ["column", "table"])
def test_a_forgotten_migration_is_named(
    dropped: str, kind: EngineKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When the application starts, and by `doctor`, which doesn't speak of indexes."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()
        app.map_teams()
        statements = [f"DROP TABLE own_users {'' if kind == 'sqlite' else 'CASCADE'}"]
        if dropped == "column":
            statements.append("CREATE TABLE own_users (id INTEGER PRIMARY KEY, email TEXT)")
        for statement in statements:
            app.write(partial(Session.execute, statement=sa.text(statement)))
        problem = "The table own_users doesn't exist"
        if dropped == "column":
            problem = "The columns own_users.logto_id, own_users.name don't exist"

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            [finding] = await diagnose(logto)
            assert finding.code == "mapping_not_migrated"
            assert finding.text == f"{problem}."
            assert finding.do.startswith("Run your migrations.")

        live(app.logto, body)
        assert has_line(caplog, "run your migrations", "mapping=own_users", problem)()
        assert not has_line(caplog, "mapping=own_teams")()


def test_doctor_counts_rows_that_wait(tmp_path: Path) -> None:
    """With what they wait for. That is no fault."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail=None))

            async def look() -> bool:
                [finding] = await diagnose(logto)
                return finding.level == Level.OK and finding.text == (
                    "1 table is mapped. 1 row waits: 1 in own_users, because email is NOT NULL, "
                    "but Logto has no value."
                )

            await eventually(look)

        live(app.logto, body)


def test_doctor_counts_in_plain_words(tmp_path: Path) -> None:
    """One row, one table."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()
        app.write(lambda session: session.add(User(email="ana@example.com")))

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))

            async def look() -> bool:
                [finding] = await diagnose(logto)
                return finding.text == (
                    "1 row of the mapped table own_users couldn't be written. The first: ana in "
                    "own_users: another row has the value of email."
                )

            await eventually(look)

        live(app.logto, body)
