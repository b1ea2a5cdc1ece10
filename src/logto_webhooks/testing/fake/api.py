"""The routes of the Management API that are about users, organizations and roles."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logto_webhooks.testing.fake.answers import answer, id_of, listed, not_found, paged, unknown
from logto_webhooks.testing.fake.state import State


class Api:
    """Answers from the state."""

    def __init__(self, state: State) -> None:
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
        found = self._state.users.get(id_of(request))
        return not_found() if found is None else answer(found)

    async def _roles(self, request: Request) -> Response:
        if self._state.users.get(id_of(request)) is None:
            return not_found()
        return listed(request, self._state.user_roles.get(id_of(request), []))

    async def _all_roles(self, request: Request) -> Response:
        return listed(request, self._state.all_roles())

    async def _holders(self, request: Request) -> Response:
        role_id = id_of(request)
        total = self._state.holders(role_id, 0, 0)[1]
        return paged(request, total, lambda *at: self._state.holders(role_id, *at)[0])

    async def _user_organizations(self, request: Request) -> Response:
        if self._state.users.get(id_of(request)) is None:
            return not_found()
        return answer(self._state.user_organizations(id_of(request)))

    async def _organizations(self, request: Request) -> Response:
        return listed(request, self._state.all_organizations())

    async def _organization(self, request: Request) -> Response:
        found = self._state.organizations.get(id_of(request))
        return unknown("organizations", id_of(request)) if found is None else answer(found)

    async def _organization_users(self, request: Request) -> Response:
        organization_id = id_of(request)
        total = len(self._state.members.get(organization_id, ()))
        return paged(
            request,
            total,
            lambda offset, size: self._state.organization_users(organization_id, offset, size),
        )
