"""Handlers get the application's own objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.errors import InvalidHandler
from logto_webhooks.handlers import Function
from logto_webhooks.jobs import JobRow
from logto_webhooks.testing import make
from tests.support.mounted import all_over, live, send, until
from tests.support.own_tables import KINDS, Application, EngineKind, Note, Team, User
from tests.support.waiting import eventually


def on(app: Application, what: Any, sync: Callable[..., Any], awaited: Callable[..., Any]) -> None:
    """Register the handler that the engine is for."""
    app.logto.on(what, name="handler")(awaited if app.is_async else sync)


def add_note(user: User, session: Session) -> None:
    session.add(Note(text=f"{user.id} {user.email}"))


async def add_note_async(user: User, session: AsyncSession) -> None:
    session.add(Note(text=f"{user.id} {user.email}"))


def one_waits(reason: str) -> Callable[[list[JobRow]], bool]:
    """Whether, of two jobs, one is done and one waits for that reason."""
    return lambda jobs: (
        sorted(job.state for job in jobs) == ["done", "waiting"]
        and any(reason in (job.error or "") for job in jobs)
    )


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_user_is_there_in_the_handlers_session(kind: EngineKind, tmp_path: Path) -> None:
    """An object of the session, so what the handler changes is written with its job."""
    with Application(kind, tmp_path).opened() as app:

        def change(user: User, session: Session) -> None:
            add_note(user, session)
            user.name = "changed"

        async def change_async(user: User, session: AsyncSession) -> None:
            await add_note_async(user, session)
            user.name = "changed"

        on(app, events.LocalUserCreated, change, change_async)  # before the class is mapped
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            [job] = await until(all_over(1), logto)
            assert job.state == "done", job.error

        live(app.logto, body)
        [id_] = app.all(User.id)
        assert app.all(Note.text) == [f"{id_} ana@example.com"]
        assert app.all(User.name) == ["changed"]


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_waits_for_a_row_that_waits(kind: EngineKind, tmp_path: Path) -> None:
    """It says why, and its waiting isn't a failure."""
    with Application(kind, tmp_path).opened() as app:
        on(app, events.LocalUserCreated, add_note, add_note_async)
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail=None))
            [job] = await until(lambda jobs: any(job.error for job in jobs), logto)
            assert job.state == "waiting"
            assert job.error == (
                "The job waits for its row in own_users: email is NOT NULL, but Logto has no value."
            )
            assert (job.attempts, job.failures) == (0, 0)
            await send(client, make.user_data_updated(id="ana", primaryEmail="ana@example.com"))
            [job] = await until(all_over(1), logto)
            assert job.state == "done", job.error
            assert job.failures == 0

        live(app.logto, body)
        [id_] = app.all(User.id)
        assert app.all(Note.text) == [f"{id_} ana@example.com"]


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_excluded_users(kind: EngineKind, tmp_path: Path) -> None:
    """They are None where the annotation allows it, else their job is discarded."""
    with Application(kind, tmp_path).opened() as app:

        def note(user: User | None, session: Session) -> None:
            session.add(Note(text=str(user)))

        async def note_async(user: User | None, session: AsyncSession) -> None:
            session.add(Note(text=str(user)))

        on(app, events.LocalUserCreated, note, note_async)
        strict = add_note_async if app.is_async else add_note
        app.logto.on(events.LocalUserCreated, name="strict")(strict)
        app.map_users(where=lambda user: user.email != "eve@example.com")

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="eve", primaryEmail="eve@example.com"))
            jobs = await until(all_over(2), logto)
            states = {job.handler: (job.state, job.error) for job in jobs}
            assert states == {
                "handler": ("done", None),
                "strict": ("discarded", "it has no row in own_users: `where` excludes the user"),
            }

        live(app.logto, body)
        assert app.all(Note.text) == ["None"]


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_members_have_a_user_and_an_organization(kind: EngineKind, tmp_path: Path) -> None:
    """Both are those of the event, whoever its subject is."""
    with Application(kind, tmp_path).opened() as app:

        def welcome(member: User, team: Team, session: Session) -> None:
            session.add(Note(text=f"{member.email} in {team.name}"))

        async def welcome_async(member: User, team: Team, session: AsyncSession) -> None:
            session.add(Note(text=f"{member.email} in {team.name}"))

        app.map_users()
        app.map_teams()
        on(app, events.LocalMemberAdded, welcome, welcome_async)
        of_derived = welcome_async if app.is_async else welcome
        app.logto.on(events.OrganizationUserAdded, name="derived")(of_derived)

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(
                client,
                make.user_created(id="ana", primaryEmail="ana@example.com"),
                make.organization_created(id="acme", name="Acme"),
                make.organization_membership_updated(id="acme", addedUserIds=["ana"]),
            )
            for job in await until(all_over(2), logto):
                assert job.state == "done", job.error

        live(app.logto, body)
        assert app.all(Note.text) == ["ana@example.com in Acme"] * 2


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_user_whose_row_is_unlinked(kind: EngineKind, tmp_path: Path) -> None:
    """The row lost Logto's id in the transaction that made the job, but it is known."""
    with Application(kind, tmp_path).opened() as app:
        on(app, events.LocalUserDeleted, add_note, add_note_async)
        app.map_users(when_deleted="unlink")

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            await eventually(lambda: logto.wait_for_user("ana"))
            await send(client, make.user_deleted(id="ana"))
            [job] = await until(all_over(1), logto)
            assert job.state == "done", job.error

        live(app.logto, body)
        [id_] = app.all(User.id)
        assert app.all(Note.text) == [f"{id_} ana@example.com"]
        assert app.all(User.logto_id) == [None]


@pytest.mark.parametrize(
    "change",
    [
        sa.update(User).values(logto_id="bo"),
        sa.update(User).values(email="carl@example.com"),
        sa.delete(User),
    ],
    ids=["is somebody else's", "is another row with its primary key", "was deleted"],
)
def test_the_former_row_of_a_deleted_user(change: sa.Executable, tmp_path: Path) -> None:
    """No job gets a row that the application has given to somebody else, or waits for one that it
    deleted: none is written again for a deleted user."""
    with Application("sqlite", tmp_path).opened() as app:
        on(app, events.LocalUserDeleted, add_note, add_note_async)

        @app.logto.on(events.LocalUserDeleted, name="lenient")
        def lenient(user: User | None, session: Session) -> None:
            session.add(Note(text="None" if user is None else "lenient"))

        app.map_users(when_deleted="unlink")

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            await eventually(lambda: logto.wait_for_user("ana"))
            await send(client, make.user_deleted(id="ana"))
            jobs = await until(all_over(2), logto)
            assert [job.state for job in jobs] == ["done", "done"]
            app.write(lambda session: session.execute(change))
            await logto.retry_jobs([job.id for job in jobs])
            jobs = await until(all_over(2), logto)
            assert {job.handler: (job.state, job.error) for job in jobs} == {
                "handler": (
                    "discarded",
                    "it has no row in own_users: the user was deleted in Logto",
                ),
                "lenient": ("done", None),
            }

        live(app.logto, body)
        assert sorted(app.all(Note.text)) == ["1 ana@example.com", "None", "lenient"]


def test_a_row_that_the_application_deleted(tmp_path: Path) -> None:
    """The job waits until it is made again; what may be None is None."""
    with Application("sqlite", tmp_path).opened() as app:
        on(app, events.OrganizationUserAdded, add_note, add_note_async)

        @app.logto.on(events.OrganizationUserAdded, name="lenient")
        def lenient(user: User | None, session: Session) -> None:
            session.add(Note(text=str(user)))

        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            await eventually(lambda: logto.wait_for_user("ana"))
            app.write(lambda session: session.execute(sa.delete(User)))
            joins = make.organization_membership_updated(id="acme", addedUserIds=["ana"])
            await send(client, joins)
            await until(one_waits("deleted here"), logto)
            assert app.all(Note.text) == ["None"]
            await send(client, make.user_data_updated(id="ana", primaryEmail="a@example.com"))
            await until(all_over(2), logto)

        live(app.logto, body)
        [id_] = app.all(User.id)
        assert app.all(Note.text) == [f"{id_} a@example.com", "None"]


def test_an_event_without_a_user(tmp_path: Path) -> None:
    """None, and so for an organization."""
    with Application("sqlite", tmp_path).opened() as app:

        @app.logto.on("*", name="any")
        def note(user: User | None, team: Team | None, session: Session) -> None:
            session.add(Note(text=f"{user and user.email} {team and team.name}"))

        app.map_users()
        app.map_teams()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.organization_created(id="acme", name="Acme"))
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            await send(client, make.role_created(id="role"))
            await until(all_over(3), logto)

        live(app.logto, body)
        assert app.all(Note.text) == ["None Acme", "None None", "ana@example.com None"]


def test_a_user_who_is_not_known_yet(tmp_path: Path) -> None:
    """None where the annotation allows it, else the job waits."""
    with Application("sqlite", tmp_path).opened() as app:
        on(app, events.OrganizationUserAdded, add_note, add_note_async)

        @app.logto.on(events.OrganizationUserAdded, name="lenient")
        def lenient(user: User | None, session: Session) -> None:
            session.add(Note(text=str(user)))

        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            joins = make.organization_membership_updated(id="acme", addedUserIds=["ana"])
            await send(client, joins)
            await until(one_waits("isn't known"), logto)
            await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
            await until(all_over(2), logto)

        live(app.logto, body)
        assert app.all(Note.text) == ["1 ana@example.com", "None"]


def test_in_a_test_without_a_server(tmp_path: Path) -> None:
    """As in service, and what waits is shown."""
    with Application("sqlite", tmp_path).opened() as app:
        on(app, events.LocalUserCreated, add_note, add_note_async)
        app.map_users()
        tested = testing.app(app.logto)
        User.metadata.create_all(tested.connection)
        waits = tested.deliver(make.user_created(id="ana", primaryEmail=None))
        assert [call.state for call in waits.runs] == ["waiting"]
        tested.deliver(make.user_data_updated(id="ana", primaryEmail="ana@example.com"))
        assert [call.state for call in tested.tick()] == ["done"]
        assert tested.connection.scalar(sa.select(Note.text)) == "1 ana@example.com"


@pytest.mark.filterwarnings("error")
def test_a_handler_that_fails_in_a_test(tmp_path: Path) -> None:
    """Its own error is reported, without warnings, and what it wrote is undone."""

    def fail(user: User, session: Session) -> None:
        add_note(user, session)
        session.flush()
        raise ValueError("not today")

    with Application("sqlite", tmp_path).opened() as app:
        app.logto.on(events.LocalUserCreated)(fail)
        app.map_users()
        tested = testing.app(app.logto, raise_errors=False)
        User.metadata.create_all(tested.connection)
        [call] = tested.deliver(make.user_created(id="ana", primaryEmail="ana@example.com")).runs
        assert repr(call.error) == "ValueError('not today')"
        assert tested.connection.scalar(sa.select(Note.text)) is None


def takes_no_session(user: User) -> None: ...


def takes_a_connection(user: User, connection: sa.Connection) -> None: ...


async def is_awaited(user: User) -> None: ...


def takes_both(user: User, session: Session) -> None: ...


def takes_a_team(team: Team, session: Session) -> None: ...


def takes_a_note(note: Note, session: Session) -> None: ...


def may_be_none(user: User | None, session: Session) -> None: ...


@pytest.mark.parametrize(
    ("function", "what", "says"),
    [
        (takes_no_session, events.UserCreated, "add the parameter session: Session"),
        (takes_a_connection, events.UserCreated, "use Session instead of Connection"),
        (is_awaited, events.UserCreated, "write `def` instead of `async def`, and add"),
        (takes_both, "*", "not every event has a user, so write User | None"),
        (takes_a_team, events.UserCreated, "an organization, so write Team | None"),
        (takes_both, events.GrantLimitExceeded, "not every event has a user"),
        (takes_both, events.LocalUserDeleted, "use the event's fields instead"),
        (may_be_none, events.LocalUserDeleted, "use the event's fields instead"),
        (takes_both, events.UserDeleted, 'when_deleted="delete" deletes the row'),
        (takes_both, "LocalUser*", "write User | None"),
        (takes_a_team, events.LocalOrganizationDeleted, 'when_deleted="delete"'),
    ],
)
@pytest.mark.parametrize("first", ["mapping", "handler"])
def test_what_cannot_be_filled_is_refused(
    function: Function, what: Any, says: str, first: str, tmp_path: Path
) -> None:
    """When registering if the class is mapped by then, else at the start; and what to write."""
    with Application("sqlite", tmp_path).opened() as app:

        def register_and_start() -> None:
            if first == "mapping":
                app.map_users()
                app.map_teams()
            app.logto.on(what)(function)
            assert first == "handler"
            app.map_users()
            app.map_teams()
            testing.app(app.logto)

        with pytest.raises(InvalidHandler, match=says.replace("|", r"\|")) as refused:
            register_and_start()
        assert "\n" not in str(refused.value)


def test_a_class_that_is_never_mapped_is_refused_at_the_start(tmp_path: Path) -> None:
    """It may be mapped after the handler was registered, but not after the start."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()
        app.logto.on(events.UserCreated)(takes_a_note)

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None: ...

        with pytest.raises(InvalidHandler, match="call map_users or map_organizations"):
            live(app.logto, body)


@pytest.mark.parametrize("what", ["LocalUser*", "LocalUserCreated", "User.*", "*"])
def test_what_may_be_none_is_accepted(what: str, tmp_path: Path) -> None:
    """For events with and without a row."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()
        app.logto.on(what)(may_be_none)
        assert len(app.logto.handlers) == 1
