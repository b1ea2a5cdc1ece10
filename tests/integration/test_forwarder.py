"""What `listen` makes of an application that answers without an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

import pytest

from logto_webhooks.listen import forwarder
from logto_webhooks.listen.forwarder import ForwardResponse

_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def endless(piece: bytes, pause_s: float) -> AsyncIterator[str]:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_HEAD)
        with closing(writer), suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
                await asyncio.sleep(pause_s)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def forwarded(piece: bytes, pause_s: float) -> ForwardResponse:
    async with endless(piece, pause_s) as url, forwarder.Forwarder(url, "key") as to:
        return await asyncio.wait_for(to.forward(b"{}"), 20)


def test_of_an_answer_without_end_a_piece_is_kept() -> None:
    """The next delivery doesn't wait, and memory isn't filled."""
    answer = asyncio.run(forwarded(b"x" * 50_000, 0.0))
    assert (answer.status, answer.problem) == (200, None)
    assert len(answer.body) == 2**16


def test_one_that_drips_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it must come in the time that Logto waits."""
    monkeypatch.setattr(forwarder, "TIMEOUT_S", 0.3)
    answer = asyncio.run(forwarded(b"x", 0.05))
    assert (answer.status, answer.problem) == (None, "no answer within 0.3 s")
