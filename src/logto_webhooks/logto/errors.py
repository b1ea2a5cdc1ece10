"""Errors for unexpected answers of Logto's API, with what to do. Pure.

An error names settings, statuses and codes of Logto, but never a token, a secret or a body.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import urlsplit

from msgspec import Struct

from logto_webhooks.errors import LogtoApiError


class ApiReply(Struct, frozen=True, kw_only=True):
    """An answer, whatever its status. `content` is the decoded JSON; None if the body isn't JSON.

    Times are in milliseconds, as in `ApiResponse`.
    """

    status: int
    content: Any
    asked_at: int
    took: int
    date: int | None
    asked_after: int | None
    total: int | None
    unreadable: bool = False  # whether it is JSON, but has data beyond what can be parsed

    @property
    def code(self) -> str:
        """Logto's error code; empty if this isn't an error of Logto."""
        code = self.content.get("code") if isinstance(self.content, dict) else None
        return code if isinstance(code, str) and _CODE.match(code) else ""


_CODE: Final = re.compile(r"\A[a-z0-9_.-]{1,80}\Z")
_NO_SUCH_THING: Final = {"entity.not_found", "entity.not_exists", "entity.not_exists_with_id"}

_CREDENTIALS: Final = (
    "Set LOGTO_M2M_APP_ID and LOGTO_M2M_APP_SECRET to the App ID and an App secret of a "
    "machine-to-machine application in Logto's console, and LOGTO_ENDPOINT to the same Logto."
)
_ROLE: Final = (
    'In Logto\'s console, assign the role "Logto Management API access", with the scope "all", to '
    "the machine-to-machine application (LOGTO_M2M_APP_ID)."
)
_RESOURCE: Final = (
    "Set LOGTO_WEBHOOKS_API_RESOURCE to the Management API's identifier in Logto's console, "
    "such as https://default.logto.app/api, or https://TENANT.logto.app/api on Logto Cloud."
)
_ENDPOINT: Final = (
    "Set LOGTO_ENDPOINT to Logto's address, such as https://auth.example.com. A proxy in front of "
    "it must pass on /oidc and /api unchanged."
)
_PAGES: Final = (
    "A proxy in front of Logto must pass on the query of /api and the header Total-Number "
    "unchanged, and must not cache. If Logto itself answers so, check its version."
)
_UNKNOWN: Final = (
    "This release doesn't know this answer. Check LOGTO_ENDPOINT and the version of Logto."
)

# Logto's code -> what to do.
_HINTS: Final = {
    "guard.invalid_input": "It may not support the request, such as an event of a later Logto. "
    "Check the version of Logto.",
    "subscription.limit_exceeded": "Your Logto plan doesn't allow more. Delete one first.",
}

# The code of the token endpoint -> what is wrong, what to do.
_TOKEN: Final[dict[str, tuple[str, str]]] = {
    "oidc.invalid_client": ("the App ID or the App secret is wrong", _CREDENTIALS),
    "oidc.unauthorized_client": ("the application isn't machine-to-machine", _CREDENTIALS),
    "oidc.invalid_target": ("the Management API's identifier is wrong", _RESOURCE),
    "oidc.invalid_scope": ("the application has no access to the Management API", _ROLE),
}


def says_there_is_none(reply: ApiReply) -> bool:
    """Whether it is Logto's own 404 (400 for a change), not one of a proxy or another server."""
    return reply.status in (400, 404) and reply.code in _NO_SUCH_THING


def refusal(endpoint: str, reply: ApiReply) -> LogtoApiError:
    """Return the error for an unexpected status of the API."""
    answer = f"it answers {reply.status} ({reply.code})"
    if not reply.code:
        return not_a_logto(endpoint, reply)
    if reply.code in _HINTS:
        return _make_error(endpoint, problem=answer, hint=_HINTS[reply.code])
    if reply.status == 401:
        return _make_error(endpoint, problem=f"{answer} to a new token", hint=_RESOURCE)
    if reply.status == 403:
        return _make_error(endpoint, problem=answer, hint=_ROLE)
    return _make_error(endpoint, problem=answer, hint=_UNKNOWN)


def token_refusal(endpoint: str, reply: ApiReply, app_id: str) -> LogtoApiError:
    """Return the error for a refused token."""
    if not reply.code:
        return not_a_logto(endpoint, reply)
    unknown = (f"its token endpoint answers {reply.status} ({reply.code})", _CREDENTIALS)
    problem, hint = _TOKEN.get(reply.code, unknown)
    return _make_error(endpoint, problem=problem, hint=hint, app_id=app_id)


def no_scope(endpoint: str) -> LogtoApiError:
    """Return the error for a token without permissions."""
    problem = "the application's token doesn't have the scope \"all\""
    return _make_error(endpoint, problem=problem, hint=_ROLE)


def not_a_logto(endpoint: str, reply: ApiReply) -> LogtoApiError:
    """Return the error for an answer of something else, such as a proxy or a website."""
    problem = f"the answer ({reply.status}) doesn't come from a Logto"
    return _make_error(endpoint, problem=problem, hint=_ENDPOINT)


def repeats_pages(endpoint: str, path: str, problem: str) -> LogtoApiError:
    """Return the error for a listing that would never end."""
    return _make_error(endpoint, problem=f"{path} can't be listed: {problem}", hint=_PAGES)


def redirected(endpoint: str, origin: str) -> LogtoApiError:
    """Return the error for a redirect. It isn't followed, because it could leak the token."""
    hint = f"Set LOGTO_ENDPOINT to {origin} if that is your Logto."
    return _make_error(endpoint, problem=f"it redirects to {origin}", hint=hint)


def no_address(endpoint: str) -> LogtoApiError:
    """Return the error for an invalid address."""
    return _make_error(endpoint, problem="the address is invalid", hint=_ENDPOINT)


def _make_error(endpoint: str, problem: str, hint: str, app_id: str | None = None) -> LogtoApiError:
    """Make an error. If the settings are of Logto's admin address, the hint says that instead."""
    if signs := signs_of_admin(endpoint, app_id):
        hint = f"{signs[0].upper()}{signs[1:]}. {CORE}"
    return LogtoApiError(endpoint=endpoint, problem=problem, hint=hint)


ADMIN_PORT: Final = 3002
ADMIN_APPLICATION: Final = "m-default"
CORE: Final = (
    "Set LOGTO_ENDPOINT to Logto's core address (port 3001 by default), and LOGTO_M2M_APP_ID and "
    "LOGTO_M2M_APP_SECRET to a machine-to-machine application that you created in Logto's console."
)


def signs_of_admin(endpoint: str | None, app_id: str | None) -> str:
    """Say which settings belong to Logto's admin address; empty if none does."""
    signs = []
    try:
        port = urlsplit(endpoint or "").port
    except ValueError:
        port = None
    if port == ADMIN_PORT:
        signs.append(f"LOGTO_ENDPOINT has port {ADMIN_PORT}, the port of Logto's admin address")
    if (app_id or "").strip() == ADMIN_APPLICATION:
        signs.append(
            f"LOGTO_M2M_APP_ID is {ADMIN_APPLICATION}, the built-in application of Logto's "
            "admin address"
        )
    return ", and ".join(signs)
