"""Logto's Management API as it is asked over real HTTP; the answers are a real Logto's."""

from __future__ import annotations

import asyncio
import base64
import gzip
import logging
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qs

import msgspec
import pytest

from logto_webhooks.errors import InvalidApiResponse, LogtoApiError, LogtoUnreachable
from logto_webhooks.logto.api_responses import ApiResponse
from logto_webhooks.logto.client import ManagementClient, _Grant, _Token, resource_of
from logto_webhooks.logto.transport import (
    MOST_BYTES,
    RateLimiter,
    read_retry_after,
    retry_delay,
)
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto
from tests.support.recorded import FOLDER

T = TypeVar("T")
APP_ID: Final = "qtkhl6lt8v6kpzgrp1vhb"
SECRET: Final = "KwS7miiBaug5Mfk38ur6UaA3VKUV35kJ"
TOKEN, USER, USERS = "/oidc/token", "/api/users/u", "/api/users"
START, DATE = 1_795_485_335_924, 1_795_485_839_000


class Asked(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]
    body: str


Answer = bytes | Callable[[Asked], Awaitable[bytes]]


class Cut(bytes):
    """An answer after which the connection closes."""


class Time:
    """Sleeping takes no time, but is counted."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    @property
    def waits(self) -> list[float]:
        """Without those of the budget."""
        return [each for each in self.slept if each > 0.1]


class Stand:
    """A server that stands in for Logto: of each path's answers the last is given for ever."""

    def __init__(self, answers: Mapping[str, Sequence[Answer]]) -> None:
        self.answers: dict[str, list[Answer]] = {TOKEN: [recorded("oidc-token-basic")]}
        self.answers |= {path: list(those) for path, those in answers.items()}
        self.asked: list[Asked] = []
        self.time, self.clock = Time(), FrozenClock(START)

    def ask(self, question: Callable[[ManagementClient], Awaitable[T]], **options: Any) -> T:
        async def asking() -> T:
            async with self.serving() as endpoint:
                logto = self.management(endpoint, **options)
                try:
                    return await asyncio.wait_for(question(logto), 20)
                finally:
                    await logto.close()

        return asyncio.run(asking())

    def management(self, endpoint: str, app_id: str = APP_ID, **options: Any) -> ManagementClient:
        options = {"sleep": self.time.sleep, "monotonic": lambda: self.time.now} | options
        return ManagementClient(endpoint, app_id, SECRET, now=self.clock, **options)

    def targets(self, path: str = "/api") -> list[str]:
        return [each.target for each in self.asked if each.target.startswith(path)]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        connections: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(asyncio.ensure_future(self._serve(reader, writer)))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            async with server:
                yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        finally:
            await asyncio.gather(*connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = first.split()
                answer = await self._answer(Asked(method, target, headers, body.decode()))
                writer.write(answer)
                if isinstance(answer, Cut):
                    break
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def _answer(self, asked: Asked) -> bytes:
        self.asked.append(asked)
        self.clock.tick(0.25)
        answers = self.answers[asked.target.partition("?")[0]]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return answer if isinstance(answer, bytes) else await answer(asked)


def answer(status: int, body: bytes, **headers: object) -> bytes:
    headers = {"content_length": len(body)} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode() + body


def html(status: int) -> bytes:
    return answer(status, b"<html>Welcome</html>", content_type="text/html")


def json(body: bytes) -> bytes:
    return answer(200, body, content_type="application/json; charset=utf-8")


def recorded(name: str, **changed: object) -> bytes:
    """What Logto answered, zipped if it was; with some headers (or the status) changed."""
    known = load(name)
    headers = {key.lower().replace("-", "_"): value for key, value in known["response_headers"]}
    for key in ("transfer_encoding", "content_length"):
        headers.pop(key, None)
    body = known["body_text"].encode()
    body = gzip.compress(body) if headers.get("content_encoding") == "gzip" else body
    return answer(**{"status": known["status"], "body": body} | headers | changed)


def load(name: str) -> Any:
    return msgspec.json.decode((FOLDER / "api" / f"{name}.json").read_bytes())


def content(name: str) -> Any:
    return msgspec.json.decode(load(name)["body_text"])


def token(name: str = "oidc-token-basic") -> str:
    return str(content(name)["access_token"])


async def user(logto: ManagementClient) -> ApiResponse:
    return await logto.user("u")


async def users(logto: ManagementClient) -> list[ApiResponse]:
    return [page async for page in logto.users()]


def refused(
    stand: Stand,
    question: Callable[[ManagementClient], Awaitable[object]] = user,
    **options: Any,
) -> str:
    """Return what the error says, which is never the secret or the token."""
    with pytest.raises(LogtoApiError) as raised:
        stand.ask(question, **options)
    text = f"{raised.value} {raised.value!r}"
    assert SECRET not in text
    assert token()[:20] not in text
    return text


def test_one_user_is_asked_for() -> None:
    """With the token; the answer tells when it was asked, by our clock, and Logto's date."""
    stand = Stand({USER: [recorded("user")]})
    answered = stand.ask(user, monotonic=lambda: stand.clock.now() / 1000)
    assert answered == ApiResponse(
        content=content("user"),
        asked_at=START + 250,
        took=250,
        date=DATE,
        asked_after=DATE - 250,
    )
    assert stand.asked[1][:2] == ("GET", USER)
    assert stand.asked[1].headers["authorization"] == f"Bearer {token()}"


def test_the_token_is_asked_for_as_recorded() -> None:
    """Client credentials with HTTP basic; once for all who ask at the same time."""
    stand = Stand({USER: [recorded("user")]})

    async def many(logto: ManagementClient) -> None:
        await asyncio.gather(*(logto.user("u") for _ in range(8)))

    stand.ask(many)
    assert stand.targets(TOKEN) == [TOKEN]
    form = {name: value for name, [value] in parse_qs(stand.asked[0].body).items()}
    assert form == load("oidc-token-basic")["request"]["form"]
    basic = stand.asked[0].headers["authorization"].removeprefix("Basic ")
    assert base64.b64decode(basic).decode() == f"{APP_ID}:{SECRET}"


LISTINGS: Final[list[tuple[str, tuple[Any, ...], str, str, int]]] = [
    ("users", (), USERS, "users-p1-5", 18),
    ("organizations", (), "/api/organizations", "organizations-p1-2", 3),
    ("members", ("o",), "/api/organizations/o/users", "organization-users-p1-2", 18),
    ("members", ("no",), "/api/organizations/no/users", "organization-users-404", 0),
    ("roles_of", ("u",), "/api/users/u/roles", "user-roles", 1),
    ("roles", (), "/api/roles", "roles", 5),
    ("webhooks", (), "/api/hooks", "hooks-paged", 22),
    ("log", ("h", 5, 9), "/api/hooks/h/recent-logs", "hook-recent-logs-start-end", 95),
]


@pytest.mark.parametrize(("name", "of", "path", "file", "total"), LISTINGS)
def test_listings(name: str, of: tuple[Any, ...], path: str, file: str, total: int) -> None:
    """Each is asked for a hundred at a time, and ends where Logto's total says so."""
    stand = Stand({path: [recorded(file)]})

    async def listed(logto: ManagementClient) -> list[ApiResponse]:
        return [page async for page in getattr(logto, name)(*of)]

    [page] = stand.ask(listed)
    assert (page.content, page.total, page.date) == (content(file), total, DATE)
    window = "&start_time=5&end_time=9" if name == "log" else ""
    assert stand.targets() == [f"{path}?page=1&page_size=100{window}"]


def test_a_webhook_is_made_changed_tested_and_deleted() -> None:
    """By a Logto of ours, whose routes are a real one's; what isn't there is None."""

    async def main() -> None:
        async with FakeLogto() as fake:
            logto = ManagementClient(fake.url, fake.app_id, fake.app_secret, now=FrozenClock())
            made = (
                await logto.create_webhook("n", "http://127.0.0.1:9/a", ["User.Created"])
            ).content
            assert made["name"] == "n"
            await logto.change_webhook(made["id"], {"config": {"url": "http://127.0.0.1:9/b"}})
            [changed] = fake.hooks
            assert changed["config"] == {"url": "http://127.0.0.1:9/b"}
            told = await logto.test_webhook(made["id"], "http://127.0.0.1:9/", "User.Created")
            assert told.content["code"] == "hook.send_test_payload_failed"
            with pytest.raises(LogtoApiError, match="version of Logto"):
                await logto.test_webhook(made["id"], "http://127.0.0.1:9/", "No.Such")
            assert (await logto.delete_webhook(made["id"])).content == {}
            assert fake.hooks == []
            assert (await logto.delete_webhook(made["id"])).content is None
            assert (await logto.change_webhook(made["id"], {})).content is None
            assert (
                await logto.test_webhook("no", "http://127.0.0.1:9/", "User.Created")
            ).content is None
            await logto.close()

    asyncio.run(main())


def test_what_could_happen_twice_is_asked_once() -> None:
    """A webhook whose answer is lost may be there; what was deleted may be deleted again."""
    stand = Stand({"/api/hooks": [html(502)], "/api/hooks/h": [html(502), answer(204, b"")]})
    with pytest.raises(LogtoUnreachable):
        stand.ask(lambda logto: logto.create_webhook("n", "http://127.0.0.1:9/", ["User.Created"]))
    assert stand.targets("/api/hooks") == ["/api/hooks"]
    assert stand.ask(lambda logto: logto.delete_webhook("h")).content == {}
    assert [each.method for each in stand.asked if each.target == "/api/hooks/h"] == ["DELETE"] * 2


def test_paging_follows_the_newest_total() -> None:
    """Not the Link header; people are deleted meanwhile."""
    pages: list[Answer] = [
        recorded("users-p1-5", total_number=250),
        recorded("users-p2-5", total_number=200),
    ]
    stand = Stand({USERS: pages})
    assert [page.content for page in stand.ask(users)] == [
        content("users-p1-5"),
        content("users-p2-5"),
    ]
    assert [target[:18] for target in stand.targets()] == [
        "/api/users?page=1&",
        "/api/users?page=2&",
    ]


def test_an_empty_page_is_the_last() -> None:
    """Whatever the total says."""
    pages: list[Answer] = [
        recorded("users-p1-5", total_number=999),
        recorded("users-p999", total_number=999),
    ]
    assert [len(page.content) for page in Stand({USERS: pages}).ask(users)] == [5, 0]


def test_what_does_not_exist_is_none() -> None:
    """An unknown user has no roles."""
    gone = recorded("user-404")
    stand = Stand({USER: [gone], f"{USER}/roles": [gone]})
    stand.answers["/api/organizations/o"] = [recorded("organization-404")]
    assert stand.ask(user).content is None
    assert stand.ask(lambda logto: logto.organization("o")).content is None

    async def roles(logto: ManagementClient) -> list[tuple[Any, int | None]]:
        return [(page.content, page.total) async for page in logto.roles_of("u")]

    assert stand.ask(roles) == [([], 0)]


def test_an_id_is_only_a_part_of_the_path() -> None:
    """Even one that looks like another path."""
    path = "/api/users/a%2F%2E%2E%2Fb%3Fc%23%C3%BC"
    stand = Stand({path: [recorded("user")]})
    stand.ask(lambda logto: logto.user("a/../b?c#ü"))
    assert stand.targets() == [path]


@pytest.mark.parametrize(
    ("path", "given"),
    [
        (USERS, recorded("err-404-route")),
        (USERS, html(200)),
        (USERS, html(404)),
        (USERS, html(403)),
        (USERS, answer(204, b"")),
        (USERS, recorded("user")),
        (USERS, json(b"[]")),
        (TOKEN, html(200)),
        (TOKEN, html(401)),
        (TOKEN, json(b'{"expires_in": 3600}')),
    ],
)
def test_what_is_no_logto(path: str, given: bytes) -> None:
    """A proxy's page, an unknown route, a listing without a total: the endpoint is wrong."""
    text = refused(Stand({path: [given]}), users)
    assert "doesn't come from a Logto" in text
    assert "Set LOGTO_ENDPOINT" in text


@pytest.mark.parametrize(
    ("path", "given", "hints"),
    [
        (TOKEN, recorded("oidc-token-badsecret"), ["LOGTO_M2M_APP_ID", "LOGTO_M2M_APP_SECRET"]),
        (TOKEN, recorded("oidc-token-badresource"), ["LOGTO_WEBHOOKS_API_RESOURCE"]),
        (TOKEN, recorded("oidc-token-noscope"), ['role "Logto Management API access"']),
        (USERS, recorded("err-401-bad-token"), ["LOGTO_WEBHOOKS_API_RESOURCE"]),
        (USERS, recorded("err-401-bad-token", status=403), ['scope "all"', "LOGTO_M2M_APP_ID"]),
        (USERS, recorded("users-page0"), ["400 (guard.invalid_pagination)"]),
        (
            TOKEN,
            answer(301, b"", location="https://l.example/oidc/token?x"),
            ["https://l.example "],
        ),
        (USERS, answer(307, b"", location="https://l.example:8/"), ["https://l.example:8 "]),
    ],
)
def test_a_refusal_says_what_to_set(path: str, given: bytes, hints: list[str]) -> None:
    """It is not tried again, and a redirect is not followed."""
    stand = Stand({path: [given]})
    text = refused(stand, users)
    assert [hint for hint in hints if hint not in text] == []
    assert len(stand.targets(path)) <= 2
    assert stand.time.waits == []


def listing(ids: Callable[[int], Sequence[object]], total: Callable[[int], int]) -> Stand:
    """A Logto whose listings depend on the number of the page."""

    async def page(asked: Asked) -> bytes:
        number = int(parse_qs(asked.target.partition("?")[2])["page"][0])
        items = [each if isinstance(each, dict) else {"id": str(each)} for each in ids(number)]
        headers = {"content_type": "application/json", "total_number": total(number)}
        return answer(200, msgspec.json.encode(items), **headers)

    return Stand({USERS: [page]})


@pytest.mark.parametrize("items", [range(100), [{"name": str(each)} for each in range(100)]])
def test_a_page_that_is_repeated_ends_the_listing(items: Sequence[object]) -> None:
    """A proxy leaves out the query, and tells of a billion users."""
    stand = listing(lambda page: items, lambda page: 10**9)
    text = refused(stand, users)
    assert "/api/users can't be listed: page 4 has the same items" in text
    assert len(stand.targets(USERS)) <= 5
    last = listing(lambda page: range(100 * min(page, 3)), lambda page: 10**9)
    assert "page 6 has the same items" in refused(last, users)


def test_a_total_that_stays_ahead_ends_the_listing() -> None:
    """It grows with each page, for ever."""
    stand = listing(lambda page: [page], lambda page: 100 * page + 100)
    assert "although the first one told of far fewer" in refused(stand, users)
    assert len(stand.targets(USERS)) < 2_000


def test_users_who_sign_up_meanwhile_move_whole_pages() -> None:
    """Each page has the users of the one before, six times: nothing is wrong."""

    def newest_first(page: int) -> Sequence[object]:
        joined = 100 * min(page - 1, 6)
        return range(1000 + joined - 100 * (page - 1), max(0, 900 + joined - 100 * (page - 1)), -1)

    stand = listing(newest_first, lambda page: 1000 + 100 * min(page - 1, 6))
    pages = stand.ask(users)
    assert [page.content for page in pages[:7]] == [pages[0].content] * 7
    assert pages[-1].content[-1] == {"id": "1"}
    assert len(pages) == 16


def test_the_built_in_application_is_named() -> None:
    """It is good for Logto's admin side alone, so the resource is not what to set first."""
    stand = Stand({TOKEN: [recorded("oidc-token-badresource")]})
    text = refused(stand, users, app_id="m-default")
    assert "LOGTO_M2M_APP_ID is m-default" in text
    assert "Set LOGTO_ENDPOINT to Logto's core address" in text
    assert "LOGTO_WEBHOOKS_API_RESOURCE" not in text


def test_the_token_is_renewed_a_minute_before_it_ends() -> None:
    """It lives for an hour."""
    stand = Stand({USER: [recorded("user")]})

    async def three(logto: ManagementClient) -> list[int]:
        seen = []
        for moment in (0, 3539, 3541):
            stand.time.now = moment
            await logto.user("u")
            seen.append(len(stand.targets(TOKEN)))
        return seen

    assert stand.ask(three) == [1, 1, 2]


def other_than(first: str) -> Callable[[Asked], Awaitable[bytes]]:
    """Answers that refuse a token."""

    async def check(asked: Asked) -> bytes:
        bad = asked.headers["authorization"] == f"Bearer {first}"
        return recorded("err-401-bad-token" if bad else "user")

    return check


def test_a_refused_token_is_renewed_once_for_all() -> None:
    """And the requests are repeated."""
    tokens = [recorded("oidc-token-basic"), recorded("oidc-token-post")]
    stand = Stand({TOKEN: tokens, USER: [other_than(token())]})

    async def many(logto: ManagementClient) -> list[ApiResponse]:
        return await asyncio.gather(*(logto.user("u") for _ in range(4)))

    assert [each.content for each in stand.ask(many)] == [content("user")] * 4
    assert len(stand.targets(TOKEN)) == 2


def test_who_waits_for_a_token_shares_the_outcome() -> None:
    """A wrong secret is tried once, however many ask; and anew when they ask again."""
    stand = Stand({TOKEN: [recorded("oidc-token-badsecret")]})

    async def many(logto: ManagementClient) -> list[Any]:
        asked = (logto.user("u") for _ in range(6))
        return await asyncio.gather(*asked, return_exceptions=True)

    async def twice(logto: ManagementClient) -> list[Any]:
        return [*await many(logto), *await many(logto)]

    assert {type(error) for error in stand.ask(twice)} == {LogtoApiError}
    assert len(stand.targets(TOKEN)) == 2


def test_who_stops_waiting_for_a_token_stops_no_other() -> None:
    """The first to ask is cancelled, the second gets its answer."""
    reached = asyncio.Event()

    async def slowly(asked: Asked) -> bytes:
        reached.set()
        await asyncio.sleep(0.01)
        return recorded("oidc-token-basic")

    async def two(logto: ManagementClient) -> ApiResponse:
        first, second = (asyncio.create_task(logto.user("u")) for _ in range(2))
        await reached.wait()
        first.cancel()
        return await second

    assert Stand({TOKEN: [slowly], USER: [recorded("user")]}).ask(two).content == content("user")


def test_a_busy_logto_is_asked_again() -> None:
    """After half a second, then longer; or after as long as it wants, but never over 30 s."""
    busy = [html(502), answer(429, b"", retry_after=7), answer(503, b"", retry_after=3600)]
    stand = Stand({USER: [*busy, recorded("user")]})
    assert stand.ask(user, budget=1e6).content == content("user")
    first, *others = stand.time.waits
    assert 0.5 <= first <= 1
    assert others == [7, 30]


def test_a_failing_logto_is_given_up_after_four_tries() -> None:
    """The error tells the last answer; a token is no different."""
    for path in (USER, TOKEN):
        stand = Stand({path: [html(503)]})
        with pytest.raises(LogtoUnreachable, match=r"Can't reach Logto at \S+: it answers 503"):
            stand.ask(user)
        assert len(stand.targets(path)) == 4


async def silent(asked: Asked) -> bytes:
    await asyncio.sleep(0.2)
    return Cut()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (Cut(recorded("user")[:-9]), "the answer is incomplete"),
        (Cut(recorded("users-p1-5")[:-9]), "the answer is incomplete"),
        (Cut(b""), "the answer is incomplete"),
        (json(b'{"id": "u'), "the answer is incomplete"),
        (answer(200, b"no gzip", content_encoding="gzip"), "the answer is incomplete"),
        (silent, "no answer in time"),
    ],
)
def test_a_broken_answer_is_none(given: Answer, problem: str) -> None:
    """Cut off, or too slow: it is asked for again, and what came of it is thrown away."""
    broken = Stand({USER: [given]})
    with pytest.raises(LogtoUnreachable, match=problem):
        broken.ask(user, request_s=0.1 if given is silent else 30)
    assert len(broken.targets()) == 4
    if given is not silent:
        assert Stand({USER: [given, recorded("user")]}).ask(user).content == content("user")


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["gzip", "deflate", "gzip, gzip", "identity"])
def test_a_page_that_is_too_large_is_asked_for_in_pieces(packed: str) -> None:
    """Counted as unpacked, however often it is packed; and one that is too large alone is none."""
    body = b"[" + b" " * MOST_BYTES + b"]"
    pack: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
    for each in packed.split(", "):
        body = pack[each](body) if each in pack else body
    bomb = answer(
        200, body, content_encoding=packed, content_type="application/json", total_number="1"
    )
    [page] = Stand(
        {
            USERS: [
                bomb,
                answer(200, b'[{"id": "u"}]', content_type="application/json", total_number="1"),
            ]
        }
    ).ask(users)
    assert page.content[0] == {"id": "u"}
    with pytest.raises(InvalidApiResponse, match="too large"):
        Stand({USER: [bomb]}).ask(user)


def test_a_number_of_thousands_of_digits_is_none() -> None:
    """Python would refuse to read it."""
    with pytest.raises(LogtoApiError):
        Stand(
            {USERS: [answer(200, b"[]", content_type="application/json", total_number="9" * 5_000)]}
        ).ask(users)


def test_nobody_listens_there() -> None:
    """A Management is built outside of any loop, and opens nothing before it is used."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        logto = Stand({}).management(endpoint)
        with pytest.raises(LogtoUnreachable, match=f"Can't reach Logto at {endpoint}: .+"):
            asyncio.run(used(logto))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://[::1", "http:/x"])
def test_an_endpoint_that_is_no_address(endpoint: str) -> None:
    """Trying again can't help."""
    with pytest.raises(LogtoApiError, match="Set LOGTO_ENDPOINT"):
        asyncio.run(used(Stand({}).management(endpoint)))


async def used(logto: ManagementClient) -> None:
    try:
        await logto.user("u")
    finally:
        await logto.close()


@pytest.mark.parametrize(
    ("tries", "asked_for", "jitter", "seconds"),
    [
        (1, None, 0, 0.5),
        (2, None, 0.5, 1.5),
        (3, None, 1, 4),
        (3, 12, 1, 12),
        (1, 31, 0, 30),
        (4, 1, 0, None),
    ],
)
def test_what_follows_a_failure(
    tries: int, asked_for: float | None, jitter: float, seconds: float | None
) -> None:
    """The waits double; a wish of Logto comes first."""
    assert retry_delay(tries, asked_for, jitter) == seconds


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("7", 7),
        ("Tue, 24 Nov 2026 02:04:09 GMT", 10),
        ("Tue, 24 Nov 2020 02:04:09 GMT", 0),
        ("soon", None),
        ("-1", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_moment(retry_after: str, seconds: float | None) -> None:
    """A moment on Logto's clock."""
    headers = {"retry-after": retry_after, "date": "Tue, 24 Nov 2026 02:03:59 GMT"}
    assert read_retry_after(headers) == seconds


def test_requests_are_let_in_evenly() -> None:
    """The token's too, with no burst after a pause."""
    stand = Stand({USER: [recorded("user")]})

    async def many(logto: ManagementClient) -> None:
        await asyncio.gather(*(logto.user("u") for _ in range(9)))
        stand.time.now += 60
        await asyncio.gather(*(logto.user("u") for _ in range(3)))

    stand.ask(many, budget=10)
    assert stand.time.slept == pytest.approx([0.1] * 9 + [0.1] * 2)


def test_at_most_four_requests_at_once() -> None:
    """And four, when there are as many."""
    inside: list[int] = [0]
    four = asyncio.Barrier(4)

    async def together(asked: Asked) -> bytes:
        inside.append(inside[-1] + 1)
        await four.wait()
        inside.append(inside[-1] - 1)
        return recorded("user")

    async def many(logto: ManagementClient) -> None:
        await asyncio.gather(*(logto.user("u") for _ in range(12)))

    Stand({USER: [together]}).ask(many)
    assert max(inside) == 4


def test_turns_are_in_the_order_of_asking() -> None:
    """Nobody is overtaken."""

    async def turns() -> list[int]:
        time, order = Time(), list[int]()
        budget = RateLimiter(100, time.sleep, lambda: time.now)

        async def one(number: int) -> None:
            async with budget.turn():
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(number) for number in range(20)))
        return order

    assert asyncio.run(turns()) == list(range(20))


@pytest.mark.parametrize(
    ("endpoint", "resource"),
    [
        ("https://t1.logto.app", "https://t1.logto.app/api"),
        ("https://auth.example.com", "https://default.logto.app/api"),
        ("https://t1.logto.app.example.com", "https://default.logto.app/api"),
        ("http://localhost:3001", "https://default.logto.app/api"),
    ],
)
def test_the_resource_follows_from_the_endpoint(endpoint: str, resource: str) -> None:
    """A tenant of Logto Cloud has its own."""
    assert resource_of(endpoint) == resource


def test_no_log_line_holds_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    """Nor the payload of a person, whatever the level."""
    caplog.set_level(logging.DEBUG)
    stand = Stand({USER: [html(503), recorded("user")]})
    stand.ask(user, resource="https://other.example/api")
    assert "resource=https%3A%2F%2Fother.example%2Fapi" in stand.asked[0].body
    basic = stand.asked[0].headers["authorization"].removeprefix("Basic ")
    private = [SECRET, basic, token()[:20], content("user")["name"]]
    assert [each for each in private if each in caplog.text] == []


def test_no_repr_holds_a_token() -> None:
    """A debugger, Sentry or an assertion shows it."""
    assert "t-o-k" not in repr(_Grant("t-o-k", 3600)) + repr(_Token("Bearer t-o-k", 1.0))
