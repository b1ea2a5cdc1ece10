"""The way to a PostgreSQL server, which can be cut off or fall silent."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sqlalchemy import URL


class Route:
    """Passes connections on to a server; `frozen` ones are neither passed on nor closed."""

    def __init__(self, server: URL) -> None:
        self._server = server
        self._connections: list[tuple[asyncio.Event, list[asyncio.StreamWriter]]] = []
        self.closed = False

    async def open(self) -> int:
        """Listen on a free port of 127.0.0.1, and return it."""
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(listener.sockets[0].getsockname()[1])

    def freeze(self) -> None:
        """Let the connections that exist fall silent; new ones work."""
        for passing, _ in self._connections:
            passing.clear()

    def thaw(self) -> None:
        """Let them speak again."""
        for passing, _ in self._connections:
            passing.set()

    def cut(self) -> None:
        """Reset the connections that exist."""
        for passing, writers in self._connections:
            passing.set()
            for writer in writers:
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing = asyncio.Event()
        passing.set()
        connection = (passing, [writer])
        self._connections.append(connection)
        try:
            if self.closed:
                return
            server_reader, server_writer = await self._connect()
            connection[1].append(server_writer)
            await asyncio.gather(
                _pass_on(reader, server_writer, passing), _pass_on(server_reader, writer, passing)
            )
        except OSError:
            pass  # the server is away: so is the connection
        finally:
            for end in connection[1]:
                end.transport.abort()
            self._connections.remove(connection)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self._server.port or 5432
        if folder := self._server.query.get("host"):
            return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.{port}")
        return await asyncio.open_connection(self._server.host, port)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event
) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            await passing.wait()
            writer.write(data)
            await writer.drain()
    await passing.wait()
    writer.close()
