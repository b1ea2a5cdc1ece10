"""A sender that outlives the receiver: each delivery is sent until it is answered 200."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from logto_webhooks.signing_keys import HEADER, sign

_LOST = (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError)


class Sender:
    """One connection at a time to one of several ports; a broken one is opened anew."""

    def __init__(self, ports: Iterator[int], path: str, key: str) -> None:
        self._ports = ports
        self._path = path
        self._key = key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def attempt(self, body: bytes) -> bool:
        """Send once; say whether the answer was 200."""
        try:
            async with asyncio.timeout(12):
                return await self._post(body) == 200
        except _LOST:
            self.close()
            await asyncio.sleep(0.02)
            return False

    def close(self) -> None:
        """Drop the connection."""
        if self._streams:
            self._streams[1].close()
        self._streams = None

    async def _post(self, body: bytes) -> int:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", next(self._ports))
        reader, writer = self._streams
        head = f"POST {self._path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}{HEADER}: {sign(body, self._key)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        return int(answer.split(b" ")[1])
