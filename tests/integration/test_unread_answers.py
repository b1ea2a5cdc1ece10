"""Clients that send requests and don't read the answers, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import cast

import pytest
import uvloop
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from logto_webhooks import server
from logto_webhooks.server import protocol
from tests.support.waiting import eventually

SIZE = 4_000_000  # more than the system buffers
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CLOSING = REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")


class App:
    """Answers with many bytes, and counts how many answers have begun and ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        self.begun += 1
        await PlainTextResponse(b"x" * SIZE)(scope, receive, send)
        self.ended += 1


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as made:
        yield made


@contextlib.asynccontextmanager
async def serving(app: App) -> AsyncIterator[tuple[server.Server, int]]:
    """The server, and its port. It has ended after the block."""
    listener = server.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    made = server.Server(app, listener)
    running = asyncio.create_task(made.serve())
    try:
        yield made, port
    finally:
        made.stop()
        await running


@contextlib.asynccontextmanager
async def unread(port: int, request: bytes, clients: int) -> AsyncIterator[list[socket.socket]]:
    """Clients that have sent a request, and read nothing."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(clients):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_304)
            client.connect(("127.0.0.1", port))
            client.sendall(request)
            made.append(client)
        yield made


async def wait_until_full(state: ServerState, clients: int) -> None:
    """Wait until so many clients can be sent no more."""

    async def count() -> int:
        connections = cast("set[protocol.PatientProtocol]", state.connections)
        return sum(each.flow.write_paused for each in connections)

    await eventually(count, lambda full: full == clients, 5)


@pytest.mark.parametrize("request_", [REQUEST, REQUEST * 2, CLOSING], ids=["one", "two", "closing"])
def test_who_reads_nothing_is_dropped(
    request_: bytes,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether another answer waits for it, or the connection would close after this one."""
    monkeypatch.setattr(protocol, "UNREAD_S", 0.1)

    async def run() -> None:
        app = App()
        async with serving(app) as (made, port), unread(port, request_, 1):
            connections = made._server.server_state.connections

            async def count() -> tuple[int, int]:
                return app.begun, len(connections)

            await eventually(count, lambda counted: counted == (request_.count(b"GET"), 0), 10)
            assert not made._server.server_state.tasks

    runner.run(run())
    assert not caplog.records


def test_who_reads_slowly_is_answered(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that the client reads, the deadline begins anew."""
    monkeypatch.setattr(protocol, "UNREAD_S", 0.5)

    async def run() -> None:
        app = App()
        async with serving(app) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
            writer.write(REQUEST)
            await reader.readuntil(b"\r\n\r\n")
            left = SIZE
            while left:
                left -= len(await reader.read(2**18))
                await asyncio.sleep(0.02)
            writer.close()
        assert app.ended == 1

    runner.run(run())


def test_who_reads_nothing_takes_nobodys_place(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server is full, such a client makes room for another."""
    monkeypatch.setattr(server, "Connections", partial(protocol.Connections, most=2))
    monkeypatch.setattr(protocol, "SLOW_S", 0.05)

    async def run() -> None:
        app = App()
        async with serving(app) as (made, port), unread(port, REQUEST * 2, 2):
            state = made._server.server_state
            await wait_until_full(state, 2)
            old = set(state.connections)
            await asyncio.sleep(0.1)
            _, writer = await asyncio.open_connection("127.0.0.1", port)

            async def count_old() -> int:
                return len(old & state.connections)

            await eventually(count_old, lambda count: count == 1, 5)
            writer.close()

    runner.run(run())


def test_who_reads_nothing_holds_up_no_end(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server ends after its grace, without an error."""
    monkeypatch.setattr(server, "GRACE_S", 1)

    async def run() -> None:
        app = App()
        async with (
            serving(app) as (made, port),
            unread(port, REQUEST * 2, 2),
            unread(port, CLOSING, 2),
        ):
            state = made._server.server_state
            await wait_until_full(state, 4)
            made.stop()
            await wait_until_full(state, 0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    with caplog.at_level(logging.WARNING):
        runner.run(run())
    assert not caplog.records
