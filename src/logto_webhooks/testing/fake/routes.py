"""The routes of the Management API that are about users, organizations and roles."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logto_webhooks.samples import shapes
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake import payloads
from logto_webhooks.testing.fake.responses import (
    answer,
    is_paged,
    list_response,
    not_found,
    paged,
    read_id,
    refuse,
    unknown,
)
from logto_webhooks.testing.fake.sender import SendResult
from logto_webhooks.testing.fake.state import FakeState


class ApiRoutes:
    """Answers from the state."""

    def __init__(self, state: FakeState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        """The routes, each below `/api`."""
        return [
            Route("/api/status", self._status),
            Route("/api/users", self._users),
            Route("/api/users/{id}", self._user),
            Route("/api/users/{id}/roles", self._roles),
            Route("/api/roles", self._all_roles),
            Route("/api/roles/{id}/users", self._holders),
            Route("/api/users/{id}/organizations", self._user_organizations),
            Route("/api/organizations", self._organizations),
            Route("/api/organizations/{id}", self._organization),
            Route("/api/organizations/{id}/users", self._organization_users),
        ]

    async def _status(self, request: Request) -> Response:
        return Response(status_code=204)

    async def _users(self, request: Request) -> Response:
        return paged(request, len(self._state.users), self._state.users.page)

    async def _user(self, request: Request) -> Response:
        found = self._state.users.get(read_id(request))
        return not_found() if found is None else answer(found)

    async def _roles(self, request: Request) -> Response:
        if self._state.users.get(read_id(request)) is None:
            return not_found()
        return list_response(request, self._state.user_roles.get(read_id(request), []))

    async def _all_roles(self, request: Request) -> Response:
        return list_response(request, self._state.all_roles())

    async def _holders(self, request: Request) -> Response:
        role_id = read_id(request)
        total = self._state.holders(role_id, 0, 0)[1]
        return paged(request, total, lambda *at: self._state.holders(role_id, *at)[0])

    async def _user_organizations(self, request: Request) -> Response:
        if self._state.users.get(read_id(request)) is None:
            return not_found()
        return answer(self._state.user_organizations(read_id(request)))

    async def _organizations(self, request: Request) -> Response:
        return list_response(request, self._state.all_organizations())

    async def _organization(self, request: Request) -> Response:
        found = self._state.organizations.get(read_id(request))
        return unknown("organizations", read_id(request)) if found is None else answer(found)

    async def _organization_users(self, request: Request) -> Response:
        organization_id = read_id(request)
        total = len(self._state.members.get(organization_id, ()))
        return paged(
            request,
            total,
            lambda offset, size: self._state.organization_users(organization_id, offset, size),
        )


T = TypeVar("T", bound=Struct)
SendTest = Callable[[str, Json, str], Awaitable[SendResult]]  # url, payload, signing key
_DAY_MS: Final = 86_400_000


class Keeper(Protocol):
    """What makes and changes webhooks."""

    def add_hook(self, url: str, *, events: Sequence[str], name: str | None) -> Json:
        """Make one."""

    def change_hook(self, hook_id: str, **fields: object) -> Json:
        """Replace fields."""

    def delete_hook(self, hook_id: str) -> None:
        """Delete one."""

    def rotate_signing_key(self, hook_id: str) -> Json:
        """Give one a new key."""


class _Config(Struct, omit_defaults=True):
    url: str
    headers: dict[str, str] | None = None


class _New(Struct):
    config: _Config
    name: str = ""
    events: list[str] | None = None


class _Changed(Struct, omit_defaults=True):
    config: _Config | None = None
    name: str | None = None
    events: list[str] | None = None
    enabled: bool | None = None


class _Test(Struct):
    events: list[str]
    config: _Config


class HookRoutes:
    """Answers from the state, and changes it."""

    def __init__(
        self, state: FakeState, keeper: Keeper, now: Callable[[], int], send_test: SendTest
    ) -> None:
        self._state = state
        self._keeper = keeper
        self._now = now
        self._send_test = send_test

    def routes(self) -> list[Route]:
        """The routes, each below `/api`."""
        one = "/api/hooks/{id}"
        return [
            Route("/api/hooks", self._all),
            Route("/api/hooks", self._made, methods=["POST"]),
            Route(one, self._one),
            Route(one, self._changed, methods=["PATCH"]),
            Route(one, self._deleted, methods=["DELETE"]),
            Route(f"{one}/signing-key", self._rotated, methods=["PATCH"]),
            Route(f"{one}/test", self._test, methods=["POST"]),
            Route(f"{one}/recent-logs", self._recent_logs),
        ]

    async def _all(self, request: Request) -> Response:
        hooks = self._state.all_hooks()
        return list_response(request, hooks) if is_paged(request) else answer(hooks)

    async def _one(self, request: Request) -> Response:
        found = self._state.hooks.get(read_id(request))
        return unknown("hooks", read_id(request)) if found is None else answer(found)

    async def _made(self, request: Request) -> Response:
        wanted = await _read(request, _New)
        if wanted is None:
            return _invalid()
        if wanted.events is None:
            message = "You need to provide at least one event."
            return refuse(400, "hook.missing_events", message)
        if unsent := _unsent(wanted.events):
            return unsent
        made = self._keeper.add_hook(wanted.config.url, events=wanted.events, name=wanted.name)
        return answer(self._keeper.rotate_signing_key(made["id"]), 201)

    async def _changed(self, request: Request) -> Response:
        wanted = await _read(request, _Changed)
        if wanted is None:
            return _invalid()
        if unsent := _unsent(wanted.events or []):
            return unsent
        if read_id(request) not in self._state.hooks:
            return unknown("hooks", read_id(request))
        fields: Json = msgspec.to_builtins(wanted)
        return answer(self._keeper.change_hook(read_id(request), **fields))

    async def _deleted(self, request: Request) -> Response:
        if read_id(request) not in self._state.hooks:
            return not_found()
        self._keeper.delete_hook(read_id(request))
        return Response(status_code=204)

    async def _rotated(self, request: Request) -> Response:
        if read_id(request) not in self._state.hooks:
            return unknown("hooks", read_id(request))
        return answer(self._keeper.rotate_signing_key(read_id(request)))

    async def _test(self, request: Request) -> Response:
        hook = self._state.hooks.get(read_id(request))
        if hook is None:
            return unknown("hooks", read_id(request))
        wanted = await _read(request, _Test)
        if wanted is None or not wanted.events:
            return _invalid()
        if unsent := _unsent(wanted.events):
            return unsent
        for event in wanted.events:
            payload = payloads.console_test(event, hook["id"], self._now())
            outcome = await self._send_test(wanted.config.url, payload, hook["signingKey"])
            if outcome.error:
                return _test_failed(outcome)
        return Response(status_code=204)

    async def _recent_logs(self, request: Request) -> Response:
        start, end = (request.query_params.get(name) for name in ("start_time", "end_time"))
        for name, given in (("start_time", start), ("end_time", end)):
            if given is not None and not (given.isascii() and given.isdigit()):
                return refuse(400, "guard.invalid_input", f"The request {name} is invalid.")
        if start and end and int(end) <= int(start):
            message = "`end_time` must be after `start_time`."
            return refuse(400, "log.invalid_time_window", message)
        now = self._now()
        window = self._state.log(read_id(request)).window(
            int(start) if start else now - _DAY_MS, int(end) if end else now + 1
        )
        return paged(request, len(window), window.page)


async def _read(request: Request, shape: type[T]) -> T | None:
    try:
        return msgspec.json.decode(await request.body(), type=shape)
    except msgspec.DecodeError:
        return None


def _invalid(**told: Any) -> Response:
    return refuse(400, "guard.invalid_input", "The request body is invalid.", **told)


def _unsent(events: list[str]) -> Response | None:
    """What is said of the first event that no webhook of this Logto can have."""
    known = shapes.EVENTS
    for place, event in enumerate(events):
        if event not in known:
            expected = " | ".join(f"'{each}'" for each in known)
            message = f"Invalid enum value. Expected {expected}, received '{event}'"
            code = "invalid_enum_value"
            issue: Json = {"received": event, "code": code, "options": list(known)}
            issue |= {"path": ["events", place], "message": message}
            details = f'Error in key path "events.{place}": ({code}) {message}'
            return _invalid(data={"issues": [issue], "name": "ZodError"}, details=details)
    return None


def _test_failed(outcome: SendResult) -> Response:
    if outcome.response is None:
        message = f"Failed to send test payload: {outcome.error}"
        return refuse(422, "hook.send_test_payload_failed", message)
    told = outcome.response
    data = {"responseStatus": told["statusCode"], "responseBody": str(told["body"])}
    code, message = "hook.endpoint_responded_with_error", "Endpoint responded with error."
    return refuse(422, code, message, data)
