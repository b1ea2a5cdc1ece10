"""A change at Logto of which nobody knows whether it was done: that is said, and what to do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import credentials
from tests.support.service import command

URL = "http://127.0.0.1:9/api/webhooks/logto"
_CHANGES = (b"PATCH /api/hooks", b"POST /api/hooks")


@asynccontextmanager
async def before(logto: FakeLogto, changed: Callable[[], bool]) -> AsyncIterator[str]:
    """What stands before a Logto, and after a change of a webhook is asked whether to answer."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            port = int(logto.url.rpartition(":")[2])
            there, asking = await asyncio.open_connection("127.0.0.1", port)
            with closing(asking):
                asking.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
                answer = await there.read()
            if not head.startswith(_CHANGES) or changed():
                writer.write(answer)

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def run(logto: FakeLogto, folder: Path, *words: str, **more: str) -> tuple[int, str]:
    settings = credentials(logto) | more
    done = await asyncio.to_thread(command, *words, folder=folder, **settings)
    return done.returncode, done.stderr


def test_no_answer_after_a_change(tmp_path: Path) -> None:
    """The key is another, and the webhook is there: run again, look."""

    async def main() -> None:
        async with FakeLogto() as logto, before(logto, lambda: False) as endpoint:
            old = logto.add_hook(URL)
            await run(logto, tmp_path, "migrate")
            code, said = await run(logto, tmp_path, "endpoint", "rotate", LOGTO_ENDPOINT=endpoint)
            assert code == 2
            assert "the key may have changed anyway, so run this command again" in said
            assert logto.hooks[0]["signingKey"] != old["signingKey"]
            create = ("endpoint", "create", "--url", f"{URL}/2")
            code, said = await run(logto, tmp_path, *create, LOGTO_ENDPOINT=endpoint)
            assert code == 2
            assert "it may exist anyway: see `logto-webhooks endpoint list`" in said
            assert len(logto.hooks) == 2

    asyncio.run(main())


def test_a_database_that_goes_after_the_key_was_changed(tmp_path: Path) -> None:
    """Nothing knows the new key then: that is said, with what to do."""
    file = tmp_path / "logto-webhooks.db"

    def lose_it() -> bool:
        file.rename(tmp_path / "elsewhere.db")
        return True

    async def main() -> None:
        async with FakeLogto() as logto, before(logto, lose_it) as endpoint:
            webhook = logto.add_hook(URL)
            await run(logto, tmp_path, "migrate")
            code, said = await run(logto, tmp_path, "endpoint", "rotate", LOGTO_ENDPOINT=endpoint)
            assert code == 2
            assert "Logto already uses the new key, so run this command again" in said
            assert logto.hooks[0]["signingKey"] != webhook["signingKey"]

    asyncio.run(main())
