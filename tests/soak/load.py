"""Genuine deliveries at a steady rate, and beside them junk and slow senders."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import suppress
from typing import Any

from msgspec import Struct

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from tests.support.service import PATH

IDLE_S = 4  # Logto closes its own connections after 4 to 13 s
HARMFUL = 0.002  # of the deliveries: what their handler does is in `app.py`
_LOST = (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError, IndexError)


class Answer(Struct, frozen=True):
    """What became of one delivery: `status` 0 is no answer."""

    began: float
    took_s: float
    status: int


class Load:
    """Sends to one port until `stop`; remembers every answer, and what the users end up as."""

    def __init__(self, port: int, rate: int) -> None:
        self._port = port
        self._rate = rate
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._numbers = itertools.count()
        self._rows_to_change: list[tuple[float, str, int]] = []  # when, who, created when
        self.answers: list[Answer] = []
        self.accepted: list[bytes] = []
        self.created: set[str] = set()
        self.names: dict[str, str] = {}
        self.unanswered: set[str] = set()  # users whose change may be stored, or not
        self.stopping = False

    async def send_genuine(self) -> None:
        """Send at the rate, whatever the answers: Logto doesn't wait either."""
        sending: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self.stopping:
            due += 1 / self._rate
            await asyncio.sleep(max(0, due - time.monotonic()))
            task = asyncio.create_task(self._send_next())
            sending.add(task)
            task.add_done_callback(sending.discard)
        await asyncio.gather(*sending)

    async def send_junk(self) -> None:
        """Forged, unsigned and malformed requests, 50 a second."""
        while not self.stopping:
            await asyncio.sleep(0.02)
            body = random.randbytes(random.choice([0, 100, 5_000]))
            forged = SignedRequest("junk", body, [("logto-signature-sha-256", "0" * 64)])
            with suppress(*_LOST):
                await self._post(
                    forged if random.random() < 0.8 else SignedRequest("junk", body, [])
                )

    async def send_slowly(self) -> None:
        """Keep 100 connections that announce a large body and send a byte now and then."""
        await asyncio.gather(*(self._drip() for _ in range(100)))

    async def _drip(self) -> None:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n"
        while not self.stopping:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(f"{head}logto-signature-sha-256: {'0' * 64}\r\n\r\n".encode())
                for _ in range(random.randrange(40)):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.5)
                writer.close()
            await asyncio.sleep(0.5)

    def _next(self) -> tuple[SignedRequest, str, str]:
        """A delivery, its user, and the name that the user has by it."""
        now = time.time()
        if random.random() < HARMFUL:
            user_id = f"harmful{next(self._numbers)}"
            return make.post_reset_password(id=user_id, at=int(now * 1000)), user_id, ""
        if self._rows_to_change and self._rows_to_change[0][0] < now and random.random() < 0.5:
            _, user_id, created_at = self._rows_to_change.pop(0)
            name = f"changed {next(self._numbers)}"
            # A record that is older than the installation has no LocalUserCreated.
            dates: dict[str, Any] = {"updatedAt": int(now * 1000), "data.createdAt": created_at}
            request = make.user_data_updated(id=user_id, at=int(now * 1000), name=name, **dates)
            return request, user_id, name
        user_id = f"user{next(self._numbers)}"
        request = make.user_created(id=user_id, at=int(now * 1000), name="new")
        return request, user_id, "new"

    async def _send_next(self) -> None:
        request, user_id, name = self._next()
        began, began_at = time.monotonic(), time.time()
        status = 0
        with suppress(*_LOST):
            async with asyncio.timeout(30):
                status = await self._post(request)
        self.answers.append(Answer(began, time.monotonic() - began, status))
        if status != 200:
            self.unanswered.add(user_id)
            return
        self.accepted.append(request.body)
        if not name:
            return
        self.names[user_id] = name
        if name == "new":
            self.created.add(user_id)
            self._rows_to_change.append((time.time() + 1, user_id, int(began_at * 1000)))

    async def _post(self, request: SignedRequest) -> int:
        while self._idle and self._idle[0][0] < time.monotonic() - IDLE_S:
            self._idle.pop(0)[2].close()
        if self._idle:
            _, reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            lines = [f"POST {PATH} HTTP/1.1", "host: x", f"content-length: {len(request.body)}"]
            lines += [f"{name}: {value}" for name, value in request.headers]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + request.body)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        except BaseException:
            writer.transport.abort()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((time.monotonic(), reader, writer))
        return int(head.split(b" ")[1])
