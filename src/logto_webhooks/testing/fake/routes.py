"""The routes of the Management API, with Logto's form of answers, pages and errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logto_webhooks.samples import shapes
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake.actions import Actions
from logto_webhooks.testing.fake.sender import SendResult
from logto_webhooks.testing.fake.state import FakeState

PAGE_SIZE: Final = 20
LARGEST_PAGE: Final = 100
_DAY_MS: Final = 86_400_000
T = TypeVar("T", bound=Struct)
SendTest = Callable[[str, Json, str], Awaitable[SendResult]]  # url, payload, signing key


def answer(content: Any, status: int = 200) -> Response:
    """Make a JSON response, as Logto sends it."""
    response = Response(msgspec.json.encode(content), status)
    response.headers["content-type"] = "application/json; charset=utf-8"
    return response


def refuse(
    status: int, code: str, message: str, data: Json | None = None, details: str | None = None
) -> Response:
    """Make an error response, in Logto's words."""
    content: Json = {"code": code} | ({} if data is None else {"data": data})
    content |= {} if details is None else {"details": details}
    return answer(content | {"message": message}, status)


class Refusal(Exception):
    """Raised to answer with an error."""

    def __init__(self, *refusal: Any) -> None:
        """The arguments of `refuse`."""
        self.response = refuse(*refusal)


_NOT_FOUND: Final = (404, "entity.not_found", "The resource does not exist.")
_INVALID_BODY: Final = (400, "guard.invalid_input", "The request body is invalid.")


class _Config(Struct, omit_defaults=True):
    url: str
    headers: dict[str, str] | None = None


class _NewHook(Struct):
    config: _Config
    name: str = ""
    events: list[str] | None = None


class _HookChanges(Struct, omit_defaults=True):
    config: _Config | None = None
    name: str | None = None
    events: list[str] | None = None
    enabled: bool | None = None


class _Test(Struct):
    events: list[str]
    config: _Config


class ApiRoutes:
    """Answers requests from the state, and changes webhooks."""

    def __init__(
        self, state: FakeState, actions: Actions, now: Callable[[], int], send_test: SendTest
    ) -> None:
        self._state = state
        self._actions = actions
        self._now = now
        self._send_test = send_test

    def routes(self) -> list[Route]:
        """Return the routes, all below `/api`."""
        hook = "/api/hooks/{id}"
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
            Route("/api/hooks", self._create_hook, methods=["POST"]),
            Route(hook, self._hook),
            Route(hook, self._change_hook, methods=["PATCH"]),
            Route(hook, self._delete_hook, methods=["DELETE"]),
            Route(f"{hook}/signing-key", self._rotate_key, methods=["PATCH"]),
            Route(f"{hook}/test", self._test_hook, methods=["POST"]),
            Route(f"{hook}/recent-logs", self._recent_logs),
        ]

    async def _status(self, request: Request) -> Response:
        return Response(status_code=204)

    async def _users(self, request: Request) -> Response:
        return _answer_page(request, self._state.users.newest_first())

    async def _user(self, request: Request) -> Response:
        return answer(self._find_user(request))

    async def _roles(self, request: Request) -> Response:
        user = self._find_user(request)
        return _answer_page(request, self._state.user_roles.get(user["id"], []))

    async def _all_roles(self, request: Request) -> Response:
        return _answer_page(request, self._state.all_roles())

    async def _holders(self, request: Request) -> Response:
        return _answer_page(request, self._state.holders(_read_id(request)))

    async def _user_organizations(self, request: Request) -> Response:
        return answer(self._state.user_organizations(self._find_user(request)["id"]))

    async def _organizations(self, request: Request) -> Response:
        return _answer_page(request, self._state.all_organizations())

    async def _organization(self, request: Request) -> Response:
        return answer(_find("organizations", self._state.organizations, request))

    async def _organization_users(self, request: Request) -> Response:
        return _answer_page(request, self._state.organization_users(_read_id(request)))

    async def _hooks(self, request: Request) -> Response:
        hooks = self._state.all_hooks()
        is_paged = request.query_params.keys() & {"page", "page_size"}
        return _answer_page(request, hooks) if is_paged else answer(hooks)

    async def _hook(self, request: Request) -> Response:
        return answer(_find("hooks", self._state.hooks, request))

    async def _create_hook(self, request: Request) -> Response:
        new = await _read_body(request, _NewHook)
        if new.events is None:
            message = "You need to provide at least one event."
            return refuse(400, "hook.missing_events", message)
        _check_events(new.events)
        hook = self._actions.add_hook(new.config.url, events=new.events, name=new.name)
        return answer(self._actions.rotate_signing_key(hook["id"]), 201)

    async def _change_hook(self, request: Request) -> Response:
        changes = await _read_body(request, _HookChanges)
        _check_events(changes.events or [])
        hook = _find("hooks", self._state.hooks, request)
        fields: Json = msgspec.to_builtins(changes)
        return answer(self._actions.change_hook(hook["id"], **fields))

    async def _delete_hook(self, request: Request) -> Response:
        if _read_id(request) not in self._state.hooks:
            return refuse(*_NOT_FOUND)
        self._actions.delete_hook(_read_id(request))
        return Response(status_code=204)

    async def _rotate_key(self, request: Request) -> Response:
        hook = _find("hooks", self._state.hooks, request)
        return answer(self._actions.rotate_signing_key(hook["id"]))

    async def _test_hook(self, request: Request) -> Response:
        hook = _find("hooks", self._state.hooks, request)
        test = await _read_body(request, _Test)
        if not test.events:
            return refuse(*_INVALID_BODY)
        _check_events(test.events)
        for event in test.events:
            payload = shapes.console_test(event, hook["id"], self._now())
            outcome = await self._send_test(test.config.url, payload, hook["signingKey"])
            if outcome.error:
                return _refuse_test(outcome)
        return Response(status_code=204)

    async def _recent_logs(self, request: Request) -> Response:
        now = self._now()
        bounds = {"start_time": now - _DAY_MS, "end_time": now + 1}
        query = request.query_params
        for name in [name for name in bounds if name in query]:
            number = _parse_number(query[name])
            if number is None:
                return refuse(400, "guard.invalid_input", f"The request {name} is invalid.")
            bounds[name] = number
        start, end = bounds.values()
        if bounds.keys() <= query.keys() and end <= start:
            message = "`end_time` must be after `start_time`."
            return refuse(400, "log.invalid_time_window", message)
        return _answer_page(request, self._state.log(_read_id(request)).window(start, end))

    def _find_user(self, request: Request) -> Json:
        user = self._state.users.get(_read_id(request))
        if user is None:
            raise Refusal(*_NOT_FOUND)
        return user


def _read_id(request: Request) -> str:
    """Return the id in the path."""
    record_id: str = request.path_params["id"]
    return record_id


def _find(kind: str, records: dict[str, Json], request: Request) -> Json:
    record_id = _read_id(request)
    if record_id not in records:
        message = f"The {kind} with ID `{record_id}` does not exist."
        raise Refusal(404, "entity.not_exists_with_id", message)
    return records[record_id]


async def _read_body(request: Request, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.body(), type=shape)
    except msgspec.DecodeError:
        raise Refusal(*_INVALID_BODY) from None


def _check_events(events: list[str]) -> None:
    """Refuse the first event that no webhook of this Logto can have."""
    for place, event in enumerate(events):
        if event not in shapes.EVENTS:
            expected = " | ".join(f"'{name}'" for name in shapes.EVENTS)
            message = f"Invalid enum value. Expected {expected}, received '{event}'"
            code = "invalid_enum_value"
            issue: Json = {"received": event, "code": code, "options": list(shapes.EVENTS)}
            issue |= {"path": ["events", place], "message": message}
            data = {"issues": [issue], "name": "ZodError"}
            details = f'Error in key path "events.{place}": ({code}) {message}'
            raise Refusal(*_INVALID_BODY, data, details)


def _answer_page(request: Request, items: Sequence[Json]) -> Response:
    query = request.query_params
    page = _parse_number(query.get("page", "1"))
    size = _parse_number(query.get("page_size", str(PAGE_SIZE)))
    if not page or not size or size > LARGEST_PAGE:
        message = "The request pagination value is invalid."
        return refuse(400, "guard.invalid_pagination", message)
    response = answer(items[(page - 1) * size : page * size])
    response.headers["total-number"] = str(len(items))
    last = max(1, -(-len(items) // size))
    before = [("prev", page - 1)] if page > 1 else []
    after = [("next", page + 1)] if page < last else []
    for relation, number in [("first", 1), *before, ("last", last), *after]:
        response.headers.append("link", f'<{_make_url(request, number)}>; rel="{relation}"')
    return response


def _parse_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _make_url(request: Request, page: int) -> str:
    """Make a page's URL, wrong as Logto's are: without `/api`."""
    parts = [part for part in request.url.query.split("&") if part]
    names = [part.split("=")[0] for part in parts]
    if "page" in names:
        parts[names.index("page")] = f"page={page}"
    else:
        parts.append(f"page={page}")
    path = request.url.path.removeprefix("/api")
    return f"{request.url.scheme}://{request.url.netloc}{path}?{'&'.join(parts)}"


def _refuse_test(outcome: SendResult) -> Response:
    response = outcome.response
    if response is None:
        message = f"Failed to send test payload: {outcome.error}"
        return refuse(422, "hook.send_test_payload_failed", message)
    data = {"responseStatus": response["statusCode"], "responseBody": str(response["body"])}
    code, message = "hook.endpoint_responded_with_error", "Endpoint responded with error."
    return refuse(422, code, message, data)
