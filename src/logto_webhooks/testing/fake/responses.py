"""Answers in the API's manner, and its paging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from logto_webhooks.samples.shapes import Json

PAGE_SIZE: Final = 20
LARGEST_PAGE: Final = 100


def answer(content: Any, status: int = 200) -> Response:
    """JSON, as Logto sends it."""
    made = Response(msgspec.json.encode(content), status)
    made.headers["content-type"] = "application/json; charset=utf-8"
    return made


def refuse(
    status: int, code: str, message: str, data: Json | None = None, details: str | None = None
) -> Response:
    """An error, as Logto words it."""
    told: Json = {"code": code} | ({} if data is None else {"data": data})
    told |= {} if details is None else {"details": details}
    return answer(told | {"message": message}, status)


def not_found() -> Response:
    """What is said of an unknown user."""
    return refuse(404, "entity.not_found", "The resource does not exist.")


def unknown(kind: str, record_id: str) -> Response:
    """What is said of an unknown record of most other kinds."""
    message = f"The {kind} with ID `{record_id}` does not exist."
    return refuse(404, "entity.not_exists_with_id", message)


def paged(request: Request, total: int, page_of: Callable[[int, int], list[Json]]) -> Response:
    """One page of a listing; `page_of` takes the offset and the size."""
    page, size = (_number(request, *each) for each in (("page", 1), ("page_size", PAGE_SIZE)))
    if not page or not size or size > LARGEST_PAGE:
        message = "The request pagination value is invalid."
        return refuse(400, "guard.invalid_pagination", message)
    made = answer(page_of((page - 1) * size, size))
    made.headers["total-number"] = str(total)
    for relation, number in _links(page, max(1, -(-total // size))):
        made.headers.append("link", f'<{_url(request, number)}>; rel="{relation}"')
    return made


def read_id(request: Request) -> str:
    """The id in the path."""
    value: str = request.path_params["id"]
    return value


def list_response(request: Request, items: list[Json]) -> Response:
    """One page of a whole listing."""
    return paged(request, len(items), lambda offset, size: items[offset : offset + size])


def is_paged(request: Request) -> bool:
    """Whether a page is asked for, where none need be."""
    return bool(request.query_params.keys() & {"page", "page_size"})


def _number(request: Request, name: str, default: int) -> int | None:
    given = request.query_params.get(name, str(default))
    return int(given) if given.isascii() and given.isdigit() else None


def _links(page: int, last: int) -> list[tuple[str, int]]:
    before = [("prev", page - 1)] if page > 1 else []
    after = [("next", page + 1)] if page < last else []
    return [("first", 1), *before, ("last", last), *after]


def _url(request: Request, page: int) -> str:
    """Wrong as Logto's are: without `/api`."""
    parts = [each for each in request.url.query.split("&") if each]
    names = [each.split("=")[0] for each in parts]
    if "page" in names:
        parts[names.index("page")] = f"page={page}"
    else:
        parts.append(f"page={page}")
    path = request.url.path.removeprefix("/api")
    return f"{request.url.scheme}://{request.url.netloc}{path}?{'&'.join(parts)}"
