"""A tunnel of anybody's: a command that makes a local port reachable, and prints where.

Which of the URLs that it prints is ours, and whether it works yet, is found by asking each for a
mark that only this process knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn
from urllib.parse import urlsplit

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from logto_webhooks.clock import Clock
from logto_webhooks.deliveries import identify
from logto_webhooks.errors import NotADelivery, SignatureRejected, TunnelFailed
from logto_webhooks.listen.log_reader import (
    Forward,
    ForwardResponse,
    ForwardResult,
    describe_forward,
)
from logto_webhooks.signing_keys import HEADER, verify


class Relay:
    """Between the tunnel and the application: anybody can reach the one, only Logto the other."""

    def __init__(
        self,
        forward: Forward,
        clock: Clock,
        show: Callable[[ForwardResult], None],
        count: int | None,
    ) -> None:
        """`enough` is set after so many."""
        self.enough = asyncio.Event()
        self._forward = forward
        self._clock = clock
        self._show = show
        self._left = count
        self._open = asyncio.Event()
        self._keys: tuple[str, ...] = ()

    def open(self, key: str) -> None:
        """Take what is signed with the webhook's key; until it is known, who comes waits."""
        self._keys = (key,)
        self._open.set()

    async def take(self, body: bytes, signatures: Sequence[bytes]) -> ForwardResponse:
        """Pass a delivery on, and the application's answer back."""
        await self._open.wait()
        try:
            verified = verify(body, signatures, self._keys)
            delivery = identify(verified, self._clock.now())
        except SignatureRejected:
            return ForwardResponse(status=401)
        except NotADelivery:
            return ForwardResponse(status=400)
        if self.enough.is_set():
            return ForwardResponse(status=503)
        answer = await self._forward(body)
        self._show(describe_forward(delivery, answer))
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.enough.set()
        return answer


Take = Callable[[bytes, Sequence[bytes]], Awaitable[ForwardResponse]]


def make_tunnel_app(take: Take, probe: str, mark: str, limit: int) -> ASGIApp:
    """Give every POST to `take`, and the mark to who asks for it. Bodies end at the limit."""

    async def delivered(request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                return Response(status_code=413)
        signatures = [value.encode("latin-1") for value in request.headers.getlist(HEADER)]
        answer = await take(bytes(body), signatures)
        if answer.problem is not None:
            return PlainTextResponse(answer.problem, 502)
        return Response(answer.body, answer.status or 502)

    async def marked(request: Request) -> Response:
        return PlainTextResponse(mark)

    routes = [
        Route(probe, marked, methods=["GET"]),
        Route("/{path:path}", delivered, methods=["POST"]),
    ]
    return Starlette(routes=routes)


PROBE: Final = "/.well-known/logto-webhooks-listen"
READY_S: Final = 60.0
AGAIN_S: Final = 0.5
ASKED_S: Final = 5.0
END_S: Final = 5.0
_URL: Final = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
# The tunnel ends with us even if we are killed: then the pipe on 3 closes, and `read` returns.
_SCRIPT: Final = """\
exec 3<&0 </dev/null
{{ read -r _ <&3; kill 0; }} >/dev/null 2>&1 &
exec 3<&-
{command}
"""


class Tunnel:
    """Runs from `async with` on; `{port}` in the command is the local port."""

    def __init__(self, command: str, port: int, mark: str) -> None:
        self._command = command.replace("{port}", str(port))
        self._port = port
        self._mark = mark
        self._origins: dict[str, None] = {}
        self._last = ""

    async def __aenter__(self) -> Tunnel:
        script = _SCRIPT.format(command=self._command)
        if os.name == "nt":
            problem = "can't be started: on Windows there is no /bin/sh"
            raise TunnelFailed(problem=problem, command=self._command)
        self._process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            script,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()
        try:
            await asyncio.wait_for(asyncio.shield(self._reading), END_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._reading.cancel()

    async def url(self, ready_s: float = READY_S) -> str:
        """Wait until one of its URLs leads here. Raises TunnelFailed."""
        try:
            async with asyncio.timeout(ready_s), httpx2.AsyncClient(timeout=ASKED_S) as client:
                while True:
                    for origin in list(self._origins):
                        if await ask_url(client, origin) == self._mark:
                            return origin
                    if self._reading.done():
                        await self.ended()
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            printed = ", ".join(self._origins) or "no URL but the local one"
            problem = f"leads to nobody here after {ready_s:g} s (it printed {printed})"
            raise TunnelFailed(problem=problem, command=self._command) from None

    async def ended(self) -> NoReturn:
        """Wait until it has ended. Raises TunnelFailed."""
        await asyncio.shield(self._reading)
        self._close()  # some versions of asyncio wait for the pipes, too
        code = await self._process.wait()
        said = f": {self._last}" if self._last else ""
        raise TunnelFailed(problem=f"ended with exit code {code}{said}", command=self._command)

    def _close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    async def _read(self) -> None:
        assert self._process.stdout
        while line := await _line(self._process.stdout):
            self._last = line.strip() or self._last
            for found in _URL.findall(line):
                if not self._is_local(found):
                    self._origins[found.rstrip(".:")] = None

    def _is_local(self, url: str) -> bool:
        """Tools print what they lead to, too."""
        try:
            parts = urlsplit(url.rstrip(".:"))
            return parts.hostname in _LOOPBACK and parts.port == self._port
        except ValueError:
            return True


async def ask_url(client: httpx2.AsyncClient, origin: str) -> str | None:
    """The mark of the `listen` that answers there, if one does."""
    try:
        answer = await client.get(origin + PROBE)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return None
    return answer.text if answer.status_code == 200 else None


async def _line(stream: asyncio.StreamReader) -> str:
    """The next line; of an endless one, a piece; empty at the end."""
    try:
        line = await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        line = error.partial
    except asyncio.LimitOverrunError as error:
        line = await stream.readexactly(error.consumed)
    return line.decode(errors="replace")
