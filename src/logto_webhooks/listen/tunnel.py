"""A tunnel, and the temporary webhook that sends through it.

Any command can open the tunnel: it makes a local port reachable and prints URLs. To find out which
one leads here, and when it works, each is probed for a mark that only this process knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import urlsplit

import httpx2
import msgspec
from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from logto_webhooks import private_files
from logto_webhooks.clock import Clock
from logto_webhooks.deliveries import identify
from logto_webhooks.errors import (
    LogtoApiError,
    LogtoUnreachable,
    NotADelivery,
    NotWritable,
    SignatureRejected,
    TunnelFailed,
)
from logto_webhooks.listen.forwarder import ForwardResponse, ForwardResult, describe_forward
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.logto.webhooks import Webhook, list_webhooks, parse_created, subscription
from logto_webhooks.signing_keys import HEADER, verify
from logto_webhooks.validation import is_url, strip_url

PREFIX: Final = "logto-webhooks listen "  # the prefix of temporary webhooks' names
PROBE: Final = "/.well-known/logto-webhooks-listen"
READY_S: Final = 60.0
AGAIN_S: Final = 0.5
PROBE_S: Final = 5.0
END_S: Final = 5.0
_URL: Final = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
# The tunnel ends even if this process is killed: the pipe on 3 closes, and `read` returns.
_SCRIPT: Final = """\
exec 3<&0 </dev/null
{{ read -r _ <&3; kill 0; }} >/dev/null 2>&1 &
exec 3<&-
{command}
"""


class Relay:
    """Passes deliveries from the tunnel to the application, if Logto signed them."""

    def __init__(
        self,
        forward: Callable[[bytes], Awaitable[ForwardResponse]],
        clock: Clock,
        show: Callable[[ForwardResult], None],
        count: int | None,
    ) -> None:
        """`enough` is set after `count` deliveries."""
        self.enough = asyncio.Event()
        self._forward = forward
        self._clock = clock
        self._show = show
        self._left = count
        self._open = asyncio.Event()
        self._keys: tuple[str, ...] = ()

    def open(self, key: str) -> None:
        """Accept requests signed with this key. Earlier requests wait for it."""
        self._keys = (key,)
        self._open.set()

    async def take(self, body: bytes, signatures: Sequence[bytes]) -> ForwardResponse:
        """Pass on a delivery, and return the application's response."""
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
        response = await self._forward(body)
        self._show(describe_forward(delivery, response))
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.enough.set()
        return response


Take = Callable[[bytes, Sequence[bytes]], Awaitable[ForwardResponse]]


def make_tunnel_app(take: Take, mark: str, limit: int) -> ASGIApp:
    """Make an application that passes each POST to `take`, unless its body exceeds the limit, and
    answers probes with the mark."""

    async def receive(request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                return Response(status_code=413)
        signatures = [value.encode("latin-1") for value in request.headers.getlist(HEADER)]
        response = await take(bytes(body), signatures)
        if response.problem is not None:
            return PlainTextResponse(response.problem, 502)
        return Response(response.body, response.status or 502)

    async def answer_probe(request: Request) -> Response:
        return PlainTextResponse(mark)

    routes = [
        Route(PROBE, answer_probe, methods=["GET"]),
        Route("/{path:path}", receive, methods=["POST"]),
    ]
    return Starlette(routes=routes)


class Tunnel:
    """Runs the command during its block. `{port}` in it stands for the local port."""

    def __init__(self, command: str, port: int, mark: str) -> None:
        self._command = command.replace("{port}", str(port))
        self._port = port
        self._mark = mark
        self._origins: dict[str, None] = {}
        self._last_line = ""

    async def __aenter__(self) -> Tunnel:
        if os.name == "nt":
            raise self._failed("can't be started: Windows has no /bin/sh")
        self._process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            _SCRIPT.format(command=self._command),
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

    async def find_url(self, ready_s: float = READY_S) -> str:
        """Wait until one of the printed URLs leads here, and return it. Raises TunnelFailed."""
        try:
            async with asyncio.timeout(ready_s), httpx2.AsyncClient(timeout=PROBE_S) as client:
                while True:
                    for origin in list(self._origins):
                        if await probe_url(client, origin) == self._mark:
                            return origin
                    if self._reading.done():
                        await self.wait()
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            printed = ", ".join(self._origins) or "no URL"
            problem = f"can't be reached after {ready_s:g} s; it printed {printed}"
            raise self._failed(problem) from None

    async def wait(self) -> NoReturn:
        """Wait until the command ends. Raises TunnelFailed."""
        await asyncio.shield(self._reading)
        self._close()  # some versions of asyncio also wait for the pipes
        code = await self._process.wait()
        reason = f": {self._last_line}" if self._last_line else ""
        raise self._failed(f"ended with exit code {code}{reason}")

    def _failed(self, problem: str) -> TunnelFailed:
        return TunnelFailed(problem=problem, command=self._command)

    def _close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    async def _read(self) -> None:
        assert self._process.stdout
        while line := await _read_line(self._process.stdout):
            self._last_line = line.strip() or self._last_line
            for match in _URL.findall(line):
                url = match.rstrip(".:")
                if not self._is_local(url):
                    self._origins[url] = None

    def _is_local(self, url: str) -> bool:
        """Return whether it is the local port, which commands also print."""
        try:
            parts = urlsplit(url)
            return parts.hostname in _LOOPBACK and parts.port == self._port
        except ValueError:
            return True


async def probe_url(client: httpx2.AsyncClient, origin: str) -> str | None:
    """Return the mark of the `listen` that answers at an origin, or None."""
    if not is_url(origin):
        return None
    try:
        response = await client.get(origin + PROBE)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return None
    return response.text if response.status_code == 200 else None


async def _read_line(stream: asyncio.StreamReader) -> str:
    """Read a line, or a part of a very long one; empty at the end."""
    try:
        line = await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        line = error.partial
    except asyncio.LimitOverrunError as error:
        line = await stream.readexactly(error.consumed)
    return line.decode(errors="replace")


class Lease(Struct, frozen=True, kw_only=True):
    """What to restore in the Logto at `endpoint`.

    Without `webhook`, delete the webhook named `session`. Otherwise, change the URL of the webhook
    with the ID `webhook` back to `url`, if it still is `lent`.
    """

    endpoint: str
    session: str
    webhook: str = ""
    url: str = ""
    lent: str = ""


class LeaseFolder:
    """Leases in files, so that a later command can undo the changes of a killed one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Create the folder. Raises NotWritable."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            private_files.write(self._folder / ".gitignore", b"*\n")
        except OSError as error:
            raise NotWritable(path=self._folder, problem=error.strerror) from None

    def read_all(self) -> list[Lease]:
        """Read all leases. An incomplete file is ignored: Logto was changed only after writing."""
        leases = []
        for file in sorted(self._folder.glob("*.json")):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                leases.append(msgspec.json.decode(file.read_bytes(), type=Lease))
        return leases

    def write(self, lease: Lease) -> None:
        """Write a lease to the disk. Raises NotWritable."""
        try:
            descriptor = private_files.open_for_writing(self._file(lease), new=True)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(lease))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NotWritable(path=self._folder, problem=error.strerror) from None

    def remove(self, lease: Lease) -> None:
        """Remove a lease."""
        self._file(lease).unlink(missing_ok=True)

    def _file(self, lease: Lease) -> Path:
        digest = hashlib.sha256(lease.session.encode()).hexdigest()
        return self._folder / f"{digest[:16]}.json"


async def restore_leases(
    logto: ManagementClient, endpoint: str, leases: LeaseFolder, tell: Callable[[str], None]
) -> None:
    """Undo the changes of earlier sessions. Raises LogtoUnreachable, LogtoApiError."""
    for lease in leases.read_all():
        if lease.endpoint == endpoint:
            for action in await _restore(logto, leases, lease):
                tell(f"Cleaned up after an earlier `listen`: {action}.")


@contextlib.asynccontextmanager
async def borrow_webhook(
    logto: ManagementClient,
    leases: LeaseFolder,
    lease: Lease,
    webhook: Webhook | None,
    url: str,
    tell: Callable[[str], None],
) -> AsyncIterator[Webhook]:
    """Create a webhook for all events, or change the URL of `webhook`, during the block.

    Raises KeyNotTold, LogtoUnreachable, LogtoApiError, NotWritable.
    """
    leases.write(lease)
    if webhook is None:  # if this fails, the webhook may still exist, so the lease stays
        response = await logto.create_webhook(lease.session, url, subscription(["*"]))
    try:
        if webhook is not None:
            response = await logto.change_webhook(
                webhook.id, {"config": webhook.config | {"url": url}}
            )
        yield parse_created(response.content, lease.session if webhook is None else webhook.name)
    finally:
        try:
            for action in await _restore(logto, leases, lease):
                tell(f"{action[0].upper()}{action[1:]}.")
        except (LogtoUnreachable, LogtoApiError) as error:
            action = (
                f"restore the URL of {lease.webhook}" if webhook else f"delete {lease.session!r}"
            )
            tell(f"{error} The next `listen` or `endpoint` in this folder will {action}.")


async def _restore(logto: ManagementClient, leases: LeaseFolder, lease: Lease) -> list[str]:
    """Restore a webhook; return descriptions of what was done."""
    webhooks, _ = await list_webhooks(logto)
    actions = []
    for webhook in webhooks:
        if lease.webhook and webhook.id == lease.webhook and webhook.url == lease.lent:
            await logto.change_webhook(webhook.id, {"config": webhook.config | {"url": lease.url}})
            shown = strip_url(lease.url)
            actions.append(f"changed the URL of the webhook {webhook.name} back to {shown}")
        elif not lease.webhook and webhook.name == lease.session:
            await logto.delete_webhook(webhook.id)
            actions.append(f"deleted the webhook {webhook.name!r}")
    leases.remove(lease)
    return actions
