"""`LogtoWebhooks`: the settings, the handlers and the ASGI application in one object."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from logto_webhooks import ensure_user
from logto_webhooks.admin import Admin
from logto_webhooks.database import Database, Engine, wrap_engine
from logto_webhooks.ensure_user import OwnUsers, UserLookup
from logto_webhooks.errors import (
    CalledFromEventLoop,
    InvalidMapping,
    NotStarted,
    SettingInvalid,
    StartedElsewhere,
)
from logto_webhooks.event_loop import is_loop_running
from logto_webhooks.events.local import OrganizationRow, UserRow
from logto_webhooks.handlers import TIME_LIMIT_S, Function, HandlerOptions, What, parse_patterns
from logto_webhooks.ingest import WebhookResponse, asgi
from logto_webhooks.instrumentation import Observer, logs
from logto_webhooks.instrumentation.logs import fan_out
from logto_webhooks.jobs import Tests
from logto_webhooks.mapping.declare import EntityMapping, declare_entities
from logto_webhooks.mapping.declare_pairs import (
    MemberRoleRow,
    MemberRow,
    PairMapping,
    UserRoleRow,
    declare_member_roles,
    declare_members,
    declare_user_roles,
)
from logto_webhooks.mapping.report import warn_about_kept
from logto_webhooks.retries import MAX_ATTEMPTS
from logto_webhooks.runtime import Service
from logto_webhooks.settings import VARIABLES, MountedSettings, Settings, from_env, list_unknown

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from logto_webhooks.logto.api_responses import ApiResponse
    from logto_webhooks.logto.client import ManagementClient
    from logto_webhooks.records.record import Key

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")
logger = logging.getLogger("logto_webhooks")


class LogtoWebhooks(Admin):
    """Receives Logto's webhooks in an application and runs its handlers.

    Creating an instance reads no environment and opens nothing. `lifespan` starts it. Most commands
    are also methods: `status`, `users`, `explain_user`, `replay`, `recover`, `reconcile` ….
    """

    def __init__(
        self,
        *,
        signing_key: str = "",
        engine: Engine | None = None,
        database_url: str | None = None,
        path: str | None = None,
        observe: Observer = logs.observe,
        environment: Mapping[str, str] | None = None,
        **settings: Unpack[MountedSettings],
    ) -> None:
        """`signing_key` is one key, or several keys, separated by commas. Pass either your `engine`
        or a `database_url`. `path` is the webhook's, by default /api/webhooks/logto. Other settings
        are those of `MountedSettings`. If you pass an `environment`, missing settings are read from
        it when they are needed.

        Raises SettingInvalid, and TypeError for an unknown setting.
        """
        own = {"signing_key": signing_key or None, "database_url": database_url, "path": path}
        self._given: dict[str, Any] = {**own, **settings}
        self._environment = environment
        self._is_checked = False  # whether unknown settings in the environment were logged
        super().__init__(self._read_settings, engine)
        self._observe = fan_out(observe)
        self._service: Service | None = None
        self._alone = threading.Lock()
        self._lookups = WeakKeyDictionary[asyncio.AbstractEventLoop, UserLookup]()
        self._starting = threading.Lock()
        self._loops: list[asyncio.AbstractEventLoop] = []  # one for each entered lifespan
        if environment is None:
            self._settings()  # first report a misspelled setting, which may be the engine
            if (engine is None) == (database_url is None):
                problem = "pass either an engine or a database_url, for the application's database"
                raise SettingInvalid(name="LogtoWebhooks", problem=problem)
            self.handlers.fit(self.database.host.provides)
        elif engine is not None:  # its schema isn't known yet
            self.handlers.fit(wrap_engine(engine, None).host.provides)

    @classmethod
    def from_env(cls, *, path: str | None = None) -> LogtoWebhooks:
        """Create an instance that reads its settings from the environment when it starts. If a
        command runs it, it uses the command's settings, which include the file `.env`."""
        return cls(path=path, environment=os.environ)

    def _read_settings(self) -> Settings:
        """Read the settings. The first time, warn about misspelled ones in the environment."""
        environment = self._environment or {}
        if not self._is_checked:
            self._is_checked = True
            for unknown in list_unknown(environment):
                logger.warning("%s", unknown)
        return from_env(environment, **self._given)

    def run_by(self, settings: Settings, database: Database | None = None) -> None:
        """Use a command's settings instead of the environment's, and its database if it is the
        same. Does nothing unless `from_env` created this object."""
        if self._environment is None:
            return
        own = {name: value for name, value in self._given.items() if value is not None}
        sources = settings.sources | {name: name for name in own}
        merged = replace(settings, **own, sources=sources)
        self._settings = lambda: merged
        same = (merged.database_url, merged.schema) == (settings.database_url, settings.schema)
        self._database = database if same and self._engine is None else None

    def list_ignored(self, settings: Settings) -> list[str]:
        """Return the arguments that have another value in a command's settings, which the command
        uses instead. The database isn't among them."""
        if self._environment is not None:
            return []
        defaults = Settings()
        return [
            name
            for name, value in self._given.items()
            if name not in ("database_url", "schema")
            and value not in (None, getattr(defaults, name), getattr(settings, name))
        ]

    @property
    def path(self) -> str:
        """The webhook's path. Raises SettingInvalid."""
        # Only this setting is read: routes are made before the application starts, when others may
        # be missing.
        [variable] = VARIABLES["path"]
        value = (self._environment or {}).get(variable, "")
        return from_env({variable: value}, path=self._given["path"]).path

    @functools.cached_property
    def _paths(self) -> set[str]:
        return asgi.path_variants(self.path)

    @property
    def schema(self) -> str | None:
        """The PostgreSQL schema of the tables, or None for the default. Raises SettingInvalid."""
        return self._settings().schema

    @property
    def _api(self) -> ManagementClient | None:
        return None if self._service is None else self._service.api

    def on(
        self,
        *what: What,
        name: str | None = None,
        ordered: bool = True,
        max_attempts: int = MAX_ATTEMPTS,
        waits: Sequence[float] = (),
        time_limit: float = TIME_LIMIT_S,
        max_age: float | None = None,
        concurrency: int | None = None,
        test: bool = False,
        rerun: bool = True,
        unknown: bool = False,
    ) -> Callable[[Function], Function]:
        """Register a function for events: classes, names, or patterns such as "Organization.*".

        Returns the function unchanged. Times are in seconds. The type of a parameter determines its
        value; without a type, its name does (event, delivery, user, logger). `unknown` accepts
        names that this release doesn't know. Raises UnknownEventName, InvalidHandler.
        """
        tests: Tests = "too" if test else "no"
        patterns = parse_patterns(what, unknown=unknown, tests=tests)
        options = HandlerOptions(
            max_attempts=max_attempts,
            waits=tuple(waits) if isinstance(waits, Sequence) else waits,
            time_limit_s=time_limit,
            max_age_s=max_age,
            concurrency=concurrency,
        )

        def register(function: Function) -> Function:
            return self.handlers.add(
                function,
                patterns,
                name=name,
                ordered=ordered,
                tests=tests,
                rerun=rerun,
                options=options,
            )

        return register

    def on_test(self, *what: What, name: str | None = None) -> Callable[[Function], Function]:
        """Register a function for test payloads from Logto's console.

        Raises UnknownEventName, InvalidHandler.
        """
        patterns = parse_patterns(what or ("*",), unknown=False, tests="only")

        def register(function: Function) -> Function:
            return self.handlers.add(
                function, patterns, name=name, tests="only", options=HandlerOptions()
            )

        return register

    def map_users(
        self,
        target: Any,
        *,
        key: Any,
        columns: Mapping[Any, str | Callable[[UserRow], Any]],
        when_deleted: Literal["delete", "keep", "unlink"] | Mapping[Any, Any],
        link: Any = None,
        fill: Mapping[Any, str | Callable[[UserRow], Any]] | None = None,
        create_defaults: Mapping[Any, Any] | None = None,
        where: Callable[[UserRow], bool] | None = None,
        create: bool = True,
    ) -> None:
        """Keep your own table in sync with Logto's users, in the same transaction as `logto_users`.

        `target` is a mapped class or a Table. `key` is the column that holds Logto's ID, or a path
        into a JSON column. `columns` are kept equal: a column of `logto_users`, a path such as
        "profile.givenName", or a function of the row. `fill` is set only while a column is null,
        `create_defaults` only when a row is inserted. `link` finds existing rows without a key: a
        column, or a function of the row that returns a condition. `where` selects users; without
        `create`, no rows are inserted. `when_deleted` says what becomes of a deleted user's row;
        columns with values keep the row and set them. Raises InvalidMapping.
        """
        self._map(
            declare_entities(
                "user",
                target,
                key=key,
                columns=columns,
                when_deleted=when_deleted,
                link=link,
                fill=fill,
                create_defaults=create_defaults,
                where=where,
                create=create,
            )
        )

    def map_organizations(
        self,
        target: Any,
        *,
        key: Any,
        columns: Mapping[Any, str | Callable[[OrganizationRow], Any]],
        when_deleted: Literal["delete", "keep", "unlink"] | Mapping[Any, Any],
        link: Any = None,
        fill: Mapping[Any, str | Callable[[OrganizationRow], Any]] | None = None,
        create_defaults: Mapping[Any, Any] | None = None,
        where: Callable[[OrganizationRow], bool] | None = None,
        create: bool = True,
    ) -> None:
        """Keep your own table in sync with Logto's organizations. The arguments are those of
        `map_users`. Raises InvalidMapping."""
        self._map(
            declare_entities(
                "organization",
                target,
                key=key,
                columns=columns,
                when_deleted=when_deleted,
                link=link,
                fill=fill,
                create_defaults=create_defaults,
                where=where,
                create=create,
            )
        )

    def map_members(
        self,
        target: Any,
        *,
        organization: Any,
        user: Any,
        columns: Mapping[Any, str | Callable[[MemberRow], Any]] | None = None,
        create_defaults: Mapping[Any, Any] | None = None,
    ) -> None:
        """Keep your own table in sync with the memberships of Logto's organizations.

        `organization` and `user` are columns. A foreign key to the primary key of a mapped table
        holds the primary key of your own row, any other column Logto's ID. `columns` can depend on
        the member's roles. The row of a membership that is over is deleted. Raises InvalidMapping.
        """
        self._map(
            declare_members(
                target,
                organization=organization,
                user=user,
                columns=columns,
                create_defaults=create_defaults,
            )
        )

    def map_user_roles(
        self,
        target: Any,
        *,
        user: Any,
        role: Any,
        role_by: Any = None,
        columns: Mapping[Any, str | Callable[[UserRoleRow], Any]] | None = None,
        create_defaults: Mapping[Any, Any] | None = None,
        where: Callable[[UserRoleRow], bool] | None = None,
    ) -> None:
        """Keep a table of yours equal to the roles of Logto's users: one row for each.

        `user` is a column as in `map_members`. If `role` is a foreign key, it refers to the row of
        your table of roles that has the role's name in its column `name`; `role_by` is another
        column, or "id" if the foreign key holds Logto's role ID. Otherwise, `role` holds Logto's
        role ID, or with `role_by="name"` its name. `where` selects roles. The row of a role that
        the user no longer has is deleted. Raises InvalidMapping.
        """
        self._map(
            declare_user_roles(
                target,
                user=user,
                role=role,
                role_by=role_by,
                columns=columns,
                create_defaults=create_defaults,
                where=where,
            )
        )

    def map_member_roles(
        self,
        target: Any,
        *,
        role: Any,
        organization: Any = None,
        user: Any = None,
        member: Any = None,
        role_by: Any = None,
        columns: Mapping[Any, str | Callable[[MemberRoleRow], Any]] | None = None,
        create_defaults: Mapping[Any, Any] | None = None,
        where: Callable[[MemberRoleRow], bool] | None = None,
    ) -> None:
        """Keep a table of yours equal to the roles that members have in Logto's organizations: one
        row for each.

        Pass either `organization` and `user`, as in `map_members`, or `member`: a foreign key to
        the primary key of a table that `map_members` maps. The other arguments are those of
        `map_user_roles`. Raises InvalidMapping.
        """
        self._map(
            declare_member_roles(
                target,
                role=role,
                organization=organization,
                user=user,
                member=member,
                role_by=role_by,
                columns=columns,
                create_defaults=create_defaults,
                where=where,
            )
        )

    def _map(self, mapping: EntityMapping | PairMapping) -> None:
        if self.handlers.loop is not None:
            problem = "the application has already started: map tables before"
            raise InvalidMapping(table=mapping.name, problem=problem)
        self.mappings.add(mapping)
        warn_about_kept(mapping)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Receive deliveries, apply them, and run handlers while the context is open.

        Raises StoreUnavailable, SchemaMismatch, SettingInvalid, InvalidHandler, InvalidMapping,
        and StartedElsewhere if it is entered on another event loop, too.
        """
        if self._environment is None and not self._settings().uses_api:
            _warn_about_unread_credentials()
        with self._on_one_loop():
            service = Service(
                self._settings(),
                self.database,
                self._observe,
                self.handlers,
                mappings=self.mappings,
            )
            await service.open()
            async with service.running():
                before, self._service = self._service, service
                try:
                    yield
                finally:
                    self._service = before  # from an outer lifespan, if it was entered twice

    @contextlib.contextmanager
    def _on_one_loop(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with self._starting:
            if any(other is not loop and not other.is_closed() for other in self._loops):
                raise StartedElsewhere()
            self._loops.append(loop)
        try:
            yield
        finally:
            self._loops.remove(loop)

    async def answer(self, scope: Scope, receive: Receive) -> WebhookResponse | None:
        """Answer a request to the webhook's path. Returns None if its body never arrived."""
        if self._service is None:
            logger.error("%s", NotStarted())
            return WebhookResponse(503, {"error": "not_started"}, 5)
        return await self._service.webhook.answer(scope, receive)

    async def respond(self, request: Request) -> Response:
        """Answer a Starlette or FastAPI request. A dependency, middleware or a tool such as Sentry
        can read its body before."""
        return asgi.to_response(await self.answer(request.scope, asgi.receive_from(request)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the webhook as an ASGI application with its own lifespan.

        If middleware reads the body before, it must pass it on, as Starlette's BaseHTTPMiddleware
        does.
        """
        if scope["type"] == "lifespan":
            await asgi.run_lifespan(self.lifespan, receive, send)
        elif scope["type"] == "http":
            refusal = asgi.refuse_other_path(scope, self._paths)
            response = refusal or await self.answer(scope, receive)
            if response is not None:
                await asgi.send_response(send, response)

    async def ensure_user(self, claims: Mapping[str, Any], *, session: Any = None) -> UserRow:
        """Return the user for a verified token's claims. If the webhook hasn't arrived yet, create
        the user from the claims.

        With a `session` (AsyncSession, Session), this runs in its transaction. Without one, it runs
        in a separate transaction, and also uses the Management API's answer about the user, if the
        API is configured. Raises ClaimsUnusable, UserIsDeletedError, WriterBusy, SettingInvalid for
        a session that can't be used, StoreUnavailable.
        """
        if session is not None:
            # The usual case locks nothing: a request can keep its transaction open for long.
            find = partial(ensure_user.find_user, claims=claims)
            create = partial(ensure_user.ensure_user, claims=claims)
            within = self.database.host.within
            user: UserRow | None = await within(session, find, writes=False)
            return await within(session, create) if user is None else user
        row = await self._users_here().ensure(claims, self._api)
        self._wake()
        return row

    async def get_user(
        self, target: type[T], claims: Mapping[str, Any], *, session: AsyncSession | Session
    ) -> T:
        """Return your own object for a verified token's claims, loaded in your `session`. `target`
        is a class that `map_users` maps.

        If your row isn't there yet, the user and the row are written in the session's transaction,
        from the claims. If these lack what the row needs, and the Management API is configured, the
        user is read from Logto first. For a mapping with `link` or `where`, claims aren't enough.

        Raises UserNotReady if there is no row even so, UserHasNoRow if the mapping excludes the
        user, UserIsDeletedError, ClaimsUnusable, SettingInvalid, StoreUnavailable.
        """
        own = OwnUsers(self.database.host, self.mappings, target)
        return await own.get(claims, session, self._ask if self._api else None)

    async def _ask(self, key: Key) -> ApiResponse | None:
        return await self._users_here().ask(self._api, key) if self._api else None

    async def wait_for_user(self, logto_id: str, timeout_s: float = 5.0) -> UserRow:
        """Wait until a user's webhook is applied. With a timeout of 0, check once.

        Raises ClaimsUnusable for an invalid id, TimeoutError, UserIsDeletedError, StoreUnavailable.
        """
        return await self._users_here().wait(logto_id, timeout_s)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this object from synchronous code, in a thread other than the event
        loop's: `logto.call(logto.ensure_user(claims))`.

        Raises CalledFromEventLoop, and any exception of the coroutine.
        """
        if is_loop_running():
            work.close()
            raise CalledFromEventLoop()
        loop = self.handlers.loop
        if loop is not None:  # its connections can't be used on another
            return asyncio.run_coroutine_threadsafe(work, loop).result()
        with contextlib.closing(work):
            return asyncio.run(self._run_alone(work))

    async def _run_alone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on a new loop, and close the connections, because the next call can't use
        them on its loop."""
        if self.database.any_loop:
            return await work
        with self._alone:
            try:
                return await work
            finally:
                await self.close()
                if self._engine is not None and not isinstance(self._engine, sa.Engine):
                    await self._engine.dispose()

    def _users_here(self) -> UserLookup:
        loop = asyncio.get_running_loop()
        if not self.database.any_loop and any(other is not loop for other in self._loops):
            raise StartedElsewhere()  # its connections can't be used here
        if loop not in self._lookups:
            self._lookups[loop] = UserLookup(self.database.host)
        return self._lookups[loop]

    def _wake(self) -> None:
        if self._service is not None:
            self._service.wake()


def _warn_about_unread_credentials() -> None:
    """Warn if the environment has credentials for the Management API, which nobody reads."""
    variable = VARIABLES["app_id"][0]
    if os.environ.get(variable):
        logger.warning(
            "%s is set, but this LogtoWebhooks object doesn't read the environment, so it doesn't "
            "use Logto's API. To use it, pass environment=os.environ.",
            variable,
        )
