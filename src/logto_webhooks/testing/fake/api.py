"""The routes of the Management API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logto_webhooks.testing.fake import payloads
from logto_webhooks.testing.fake.answers import answer, is_paged, not_found, paged, refuse, unknown
from logto_webhooks.testing.fake.deliveries import Outcome
from logto_webhooks.testing.fake.shapes import Json
from logto_webhooks.testing.fake.state import State

_DAY_MS: Final = 86_400_000


SendTest = Callable[[str, Json, str], Awaitable[Outcome]]  # url, payload, signing key


class _Config(Struct):
    url: str


class _Test(Struct):
    events: list[str]
    config: _Config


class Api:
    """Answers from the state."""

    def __init__(
        self,
        state: State,
        now: Callable[[], int],
        send_test: SendTest,
        rotate: Callable[[str], Json],
    ) -> None:
        self._state = state
        self._now = now
        self._send_test = send_test
        self._rotate = rotate

    def routes(self) -> list[Route]:
        """The routes, each below `/api`."""
        log = "/api/hooks/{id}/recent-logs"
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
            Route("/api/hooks", self._hooks),
            Route("/api/hooks/{id}", self._hook),
            Route("/api/hooks/{id}/signing-key", self._rotated, methods=["PATCH"]),
            Route("/api/hooks/{id}/test", self._test, methods=["POST"]),
            Route(log, self._recent_logs),
        ]

    async def _status(self, request: Request) -> Response:
        return Response(status_code=204)

    async def _users(self, request: Request) -> Response:
        return paged(request, len(self._state.users), self._state.users.page)

    async def _user(self, request: Request) -> Response:
        found = self._state.users.get(_id(request))
        return not_found() if found is None else answer(found)

    async def _roles(self, request: Request) -> Response:
        if self._state.users.get(_id(request)) is None:
            return not_found()
        return _listed(request, self._state.user_roles.get(_id(request), []))

    async def _all_roles(self, request: Request) -> Response:
        return _listed(request, self._state.all_roles())

    async def _holders(self, request: Request) -> Response:
        role_id = _id(request)
        total = self._state.holders(role_id, 0, 0)[1]
        return paged(request, total, lambda *at: self._state.holders(role_id, *at)[0])

    async def _user_organizations(self, request: Request) -> Response:
        if self._state.users.get(_id(request)) is None:
            return not_found()
        return answer(self._state.user_organizations(_id(request)))

    async def _organizations(self, request: Request) -> Response:
        return _listed(request, self._state.all_organizations())

    async def _organization(self, request: Request) -> Response:
        found = self._state.organizations.get(_id(request))
        return unknown("organizations", _id(request)) if found is None else answer(found)

    async def _organization_users(self, request: Request) -> Response:
        organization_id = _id(request)
        total = len(self._state.members.get(organization_id, ()))
        return paged(
            request,
            total,
            lambda offset, size: self._state.organization_users(organization_id, offset, size),
        )

    async def _hooks(self, request: Request) -> Response:
        hooks = self._state.all_hooks()
        return _listed(request, hooks) if is_paged(request) else answer(hooks)

    async def _hook(self, request: Request) -> Response:
        found = self._state.hooks.get(_id(request))
        return unknown("hooks", _id(request)) if found is None else answer(found)

    async def _rotated(self, request: Request) -> Response:
        if _id(request) not in self._state.hooks:
            return unknown("hooks", _id(request))
        return answer(self._rotate(_id(request)))

    async def _test(self, request: Request) -> Response:
        hook = self._state.hooks.get(_id(request))
        if hook is None:
            return unknown("hooks", _id(request))
        try:
            wanted = msgspec.json.decode(await request.body(), type=_Test)
        except msgspec.DecodeError:
            return refuse(400, "guard.invalid_input", "The request body is invalid.")
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
        window = self._state.log(_id(request)).window(
            int(start) if start else now - _DAY_MS, int(end) if end else now + 1
        )
        return paged(request, len(window), window.page)


def _id(request: Request) -> str:
    value: str = request.path_params["id"]
    return value


def _listed(request: Request, items: list[Json]) -> Response:
    return paged(request, len(items), lambda offset, size: items[offset : offset + size])


def _test_failed(outcome: Outcome) -> Response:
    if outcome.response is None:
        message = f"Failed to send test payload: {outcome.error}"
        return refuse(422, "hook.send_test_payload_failed", message)
    told = outcome.response
    data = {"responseStatus": told["statusCode"], "responseBody": str(told["body"])}
    code, message = "hook.endpoint_responded_with_error", "Endpoint responded with error."
    return refuse(422, code, message, data)
