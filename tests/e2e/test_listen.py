"""`listen` as a real process against FakeLogto: by its log, through a tunnel, and killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from logto_webhooks.logto.webhooks import subscription
from logto_webhooks.signing_keys import HEADER, verify
from logto_webhooks.testing.fake import FakeLogto, Faults
from logto_webhooks.testing.fake.app import serve
from tests.support.fake import credentials
from tests.support.service import clean_environment, command
from tests.support.waiting import eventually

KEY = "local-key-0123456789"
WEBHOOK = "http://127.0.0.1:9/api/webhooks/logto"
# A tunnel: it passes connections on to the port, and prints where it is reached, and other URLs.
TUNNEL = """\
import socket, sys, threading
port = int(sys.argv[1])
server = socket.create_server(("127.0.0.1", 0))
print("INF Requesting, see https://127.0.0.1:9/terms", file=sys.stderr, flush=True)
print(f"http://127.0.0.1:{server.getsockname()[1]} -> http://127.0.0.1:{port}", flush=True)
def pump(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.shutdown(socket.SHUT_WR)
while True:
    near, _ = server.accept()
    far = socket.create_connection(("127.0.0.1", port))
    for pair in ((near, far), (far, near)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""


class App:
    """An application under development: what it got, with which signature."""

    def __init__(self) -> None:
        self.status = 200
        self.received: list[tuple[bytes, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.received.append((await request.body(), request.headers.get(HEADER, "")))
        answer: Response = JSONResponse({"got": len(self.received)}, self.status)
        if self.status == 301:
            answer = RedirectResponse("/elsewhere", 301)
        await answer(scope, receive, send)

    @property
    def users(self) -> list[str]:
        """Whom the deliveries are about, in the order in which they came; each is well signed."""
        for body, signature in self.received:
            verify(body, [signature.encode()], [KEY])
        bodies = [msgspec.json.decode(body) for body, _ in self.received]
        return [each["data"]["username"] for each in bodies]


class Listening:
    """The command, in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        environment = {"LOGTO_WEBHOOK_SIGNING_KEY": KEY} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "logto_webhooks", "listen", *arguments],
            cwd=folder,
            env=clean_environment(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.printed += line

    async def says(self, text: str) -> str:
        """Wait until it has printed this."""

        async def printed() -> str:
            return self.printed

        return await eventually(printed, lambda found: text in found)

    async def end(self, how: signal.Signals | None = None) -> int:
        """Wait for the exit code, after a signal if need be."""
        if how is not None:
            self.process.send_signal(how)
        code = await asyncio.to_thread(self.process.wait, 60)
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for each in (self.process.stdin, self.process.stdout):
            assert each
            each.close()


class Scene:
    """A Logto, an application, and the command between them."""

    def __init__(self, folder: Path, logto: FakeLogto, app: App, url: str) -> None:
        self.folder, self.logto, self.app, self.url = folder, logto, app, url
        self._running: list[Listening] = []
        (folder / "tunnel.py").write_text(TUNNEL)
        self.tunnel = f"exec {sys.executable} {folder}/tunnel.py {{port}}"
        self.settings = credentials(logto)
        del self.settings["LOGTO_WEBHOOK_SIGNING_KEY"]

    def listen(self, *arguments: str, **environment: str) -> Listening:
        to = ["--forward-to", self.url]
        made = Listening(self.folder, *to, *arguments, **self.settings | environment)
        self._running.append(made)
        return made

    def through(self, *arguments: str, **environment: str) -> Listening:
        return self.listen("--tunnel-command", self.tunnel, *arguments, **environment)

    async def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(command, *arguments, folder=self.folder, **self.settings)

    def create(self, *names: str) -> None:
        for name in names:
            self.logto.create_user(username=name)

    async def got(self, *names: str) -> None:
        async def users() -> list[str]:
            return self.app.users

        assert await eventually(users, lambda found: len(found) >= len(names)) == list(names)

    def close(self) -> None:
        for each in self._running:
            each.close()


def live(test: Callable[[Scene], Awaitable[None]], folder: Path) -> None:
    """Run a test in a scene where Logto's webhook leads nowhere."""

    async def main() -> None:
        app = App()
        async with serve(app, 0) as url, FakeLogto(at_once=1) as logto:
            scene = Scene(folder, logto, app, f"{url}/webhook")
            try:
                await test(scene)
            finally:
                await asyncio.to_thread(scene.close)

    asyncio.run(main())


def notes(folder: Path) -> list[Path]:
    return list((folder / ".logto-webhooks").glob("*.json"))


def test_what_the_log_has_arrives_once_in_order_and_signed(tmp_path: Path) -> None:
    """Those of two webhooks once, lost ones too, none of before; nothing is changed at Logto."""

    async def test(scene: Scene) -> None:
        scene.logto.add_hook(WEBHOOK)
        scene.logto.add_hook(WEBHOOK, events=["User.Created"])
        scene.create("before")
        await scene.logto.settle()
        await asyncio.sleep(1.1)  # Logto's Date is in whole seconds
        webhooks = scene.logto.hooks
        listening = scene.listen()
        await listening.says("Reading the log of: ")
        names = [f"u{number}" for number in range(12)]
        for name in names:
            scene.create(name)
            scene.logto.faults = Faults(lost=0.5)
        await scene.got(*names)
        scene.create("last")
        await scene.got(*names, "last")
        assert await listening.end(signal.SIGINT) == 130
        assert "signed with your signing key" in listening.printed
        assert KEY not in listening.printed
        assert listening.printed.count("User.Created") == 13
        assert "POST /users" in listening.printed
        assert "Run it again with --since" in listening.printed
        assert scene.logto.hooks == webhooks

    live(test, tmp_path)


def test_the_past_on_demand(tmp_path: Path) -> None:
    """`--since` begins there, more than fits one look comes in order, `--count` ends it."""

    async def test(scene: Scene) -> None:
        webhook = scene.logto.add_hook(WEBHOOK)
        scene.logto.add_hook(f"{WEBHOOK}/other", events=["Role.Created"])
        names = [f"u{number:04}" for number in range(1200)]
        for name in names:
            scene.create(name)
        await scene.logto.settle()
        await asyncio.sleep(1.1)
        listening = scene.listen(
            "--since", "1h", "--webhook", webhook["id"], "--count", "1200", "--json"
        )
        assert await listening.end() == 0
        await scene.got(*names)
        lines = [line for line in listening.printed.splitlines() if line.startswith("{")]
        first: Any = msgspec.json.decode(lines[0])
        assert (first["event"], first["status"]) == ("User.Created", 200)
        assert first["subject"].startswith("user:")

    live(test, tmp_path)


def test_the_answer_is_shown(tmp_path: Path) -> None:
    """A refusal, a redirect (which isn't followed), and an application that isn't there."""

    async def test(scene: Scene) -> None:
        scene.logto.add_hook(WEBHOOK)
        for status, shown in (
            (422, "422"),
            (301, "301 a redirect: Logto would lose this delivery"),
        ):
            scene.app.status = status
            scene.app.received.clear()
            scene.create(f"u{status}")
            listening = scene.listen("--since", "1h", "--count", "1")
            assert await listening.end() == 1
            assert shown in listening.printed
            assert len(scene.app.received) == 1
            scene.logto.delete_hook(scene.logto.hooks[0]["id"])
            scene.logto.add_hook(WEBHOOK)
        scene.url = "http://127.0.0.1:9/"
        scene.create("nobody")
        listening = scene.listen("--since", "1h", "--count", "1")
        assert await listening.end() == 1
        assert "can't connect" in listening.printed

    live(test, tmp_path)


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "Set LOGTO_WEBHOOK_SIGNING_KEY to"), (404, "the whole URL with --forward-to")],
)
def test_a_refusal_says_what_to_do(tmp_path: Path, status: int, hint: str) -> None:
    """Once, however many there are."""

    async def test(scene: Scene) -> None:
        scene.logto.add_hook(WEBHOOK)
        scene.app.status = status
        scene.create("ana", "bo")
        listening = scene.listen("--since", "1h", "--count", "2")
        assert await listening.end() == 1
        assert listening.printed.count(f"{status}  after") == 2
        assert listening.printed.count(hint) == 1

    live(test, tmp_path)


def test_a_key_for_the_session(tmp_path: Path) -> None:
    """Made and printed where none is set."""

    async def test(scene: Scene) -> None:
        scene.logto.add_hook(WEBHOOK)
        scene.create("ana")
        listening = scene.listen("--since", "1h", "--count", "1", LOGTO_WEBHOOK_SIGNING_KEY="")
        assert await listening.end() == 0
        found = re.search(r"signed with the key (\S{32})\.", listening.printed)
        assert found, listening.printed
        [(body, signature)] = scene.app.received
        verify(body, [signature.encode()], [found[1]])

    live(test, tmp_path)


def test_a_tunnel_has_a_webhook_of_its_own(tmp_path: Path) -> None:
    """For all events; the answer goes back to Logto; it is gone in the end, whatever ended it."""

    async def test(scene: Scene) -> None:
        for how in (signal.SIGINT, signal.SIGTERM):
            scene.app.received.clear()
            listening = scene.through()
            await listening.says("sends to this machine through")
            [webhook] = scene.logto.hooks
            assert webhook["name"].startswith("logto-webhooks listen ")
            assert webhook["events"] == subscription(["*"])
            assert webhook["config"]["url"].endswith("/webhook")
            scene.create("ana")
            await scene.logto.settle()
            await scene.got("ana")
            assert "User.Created" in await listening.says("POST /users")
            assert await listening.end(how) == 130
            assert scene.logto.hooks == []
            assert "Deleted the webhook" in listening.printed
            assert notes(tmp_path) == []
        listening = scene.through("--count", "1")
        await listening.says("sends to this machine through")
        scene.create("bo")
        assert await listening.end() == 0
        assert scene.logto.hooks == []

    live(test, tmp_path)


def test_only_logto_comes_through_the_tunnel(tmp_path: Path) -> None:
    """Who has another key is answered 401, and the application hears nothing of it."""

    async def test(scene: Scene) -> None:
        listening = scene.through()
        await listening.says("sends to this machine through")
        [webhook] = scene.logto.hooks
        scene.logto.change_hook(webhook["id"], signingKey="another")
        scene.create("eve")
        await scene.logto.settle()
        scene.logto.change_hook(webhook["id"], signingKey=webhook["signingKey"])
        scene.create("ana")
        await scene.got("ana")

    live(test, tmp_path)


def test_killed_it_leaves_no_webhook_after_one_more_command(tmp_path: Path) -> None:
    """Nor its tunnel; another's webhook of that kind stays."""

    async def test(scene: Scene) -> None:
        other = scene.logto.add_hook(WEBHOOK, name="logto-webhooks listen of-somebody-else")
        mine = scene.logto.add_hook(WEBHOOK, name="main")
        listening = scene.through()
        await listening.says("sends to this machine through")
        assert len(scene.logto.hooks) == 3
        url = next(each for each in scene.logto.hooks if each not in (other, mine))["config"]["url"]
        assert await listening.end(signal.SIGKILL) == -signal.SIGKILL
        assert len(scene.logto.hooks) == 3
        await eventually(lambda: refuses(url))
        done = await scene.run("endpoint", "list")
        assert done.returncode == 0
        assert "Cleaned up after an earlier `listen`: deleted the webhook" in done.stderr
        assert sorted(each["id"] for each in scene.logto.hooks) == sorted([other["id"], mine["id"]])
        assert notes(tmp_path) == []

    live(test, tmp_path)


async def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    port = int(url.split(":")[2].partition("/")[0])
    with socket.socket() as tried:
        return await asyncio.to_thread(tried.connect_ex, ("127.0.0.1", port)) != 0


def test_repointed_and_restored(tmp_path: Path) -> None:
    """Asked before; the old URL and the rest of the config are there again, also after a kill."""

    async def test(scene: Scene) -> None:
        webhook = scene.logto.add_hook(WEBHOOK, name="main")
        config = {"url": WEBHOOK, "headers": {"x-custom": "1"}}
        before = scene.logto.change_hook(webhook["id"], config=config)
        refused = scene.through("--repoint", "main")
        assert refused.process.stdin
        refused.process.stdin.write("n\n")
        refused.process.stdin.flush()
        assert await refused.end() == 1
        assert (
            f"Change the URL of the webhook 'main' until this command ends? Until then, {WEBHOOK}"
            in refused.printed
        )
        assert scene.logto.hooks == [before]
        for how in (signal.SIGINT, signal.SIGKILL):
            scene.app.received.clear()
            listening = scene.through("--repoint", "main", "--yes")
            await listening.says("sends to this machine through")
            [lent] = scene.logto.hooks
            assert lent["config"]["headers"] == config["headers"]
            scene.create("ana")
            await scene.got("ana")
            await listening.end(how)
        assert scene.logto.hooks != [before]
        next_one = scene.listen("--since", "1h", "--count", "1")
        assert await next_one.end() == 0
        assert f"URL of the webhook main back to {WEBHOOK}" in next_one.printed
        assert scene.logto.hooks == [before]

    live(test, tmp_path)


def test_a_webhook_with_an_impossible_url_can_be_repointed(tmp_path: Path) -> None:
    """Nobody answers there, whom that could disturb."""

    async def test(scene: Scene) -> None:
        for number, url in enumerate(("http://127.0.0.1:99999/", "http://[", "")):
            scene.logto.add_hook(url, name=f"odd-{number}")
            refused = scene.through("--repoint", f"odd-{number}")
            assert refused.process.stdin
            refused.process.stdin.write("n\n")
            refused.process.stdin.flush()
            assert await refused.end() == 1
            assert f"Change the URL of the webhook 'odd-{number}'" in refused.printed

    live(test, tmp_path)


def test_what_somebody_changed_meanwhile_stays(tmp_path: Path) -> None:
    """A webhook that was pointed elsewhere during the session isn't restored."""

    async def test(scene: Scene) -> None:
        webhook = scene.logto.add_hook(WEBHOOK)
        listening = scene.through("--repoint", webhook["id"], "--yes")
        await listening.says("sends to this machine through")
        new = scene.logto.change_hook(webhook["id"], config={"url": "http://127.0.0.1:9/new"})
        assert await listening.end() == 2
        assert "was pointed elsewhere" in listening.printed
        assert scene.logto.hooks == [new]
        assert notes(tmp_path) == []

    live(test, tmp_path)


def test_two_at_once(tmp_path: Path) -> None:
    """Not in one folder; from another, not with the same webhook; and nothing of the first's is
    taken for left behind."""

    async def test(scene: Scene) -> None:
        webhook = scene.logto.add_hook(WEBHOOK, name="main")
        first = scene.through("--repoint", "main", "--yes")
        await first.says("sends to this machine through")
        second = scene.listen()
        assert await second.end() == 2
        assert "Another `listen` runs in this folder" in second.printed
        assert (await scene.run("endpoint", "list")).returncode == 0
        scene.folder = tmp_path / "other"
        scene.folder.mkdir()
        third = scene.through("--repoint", webhook["id"], "--yes")
        assert await third.end() == 2
        assert "Another `listen` uses the webhook main" in third.printed
        scene.create("ana")
        await scene.got("ana")
        assert await first.end(signal.SIGINT) == 130

    live(test, tmp_path)


@pytest.mark.parametrize(
    ("tunnel", "says"),
    [
        ("echo no account; exit 3 # {port}", "ended with exit code 3: no account"),
        ("no-such-tunnel {port}", "ended with exit code 127"),
    ],
)
def test_a_tunnel_that_does_not_open(tmp_path: Path, tunnel: str, says: str) -> None:
    """Is told with its last words, and nothing was made at Logto."""

    async def test(scene: Scene) -> None:
        listening = scene.listen("--tunnel-command", tunnel)
        assert await listening.end() == 2
        assert says in listening.printed
        assert scene.logto.hooks == []

    live(test, tmp_path)


def test_a_tunnel_that_dies(tmp_path: Path) -> None:
    """Ends the session, and its webhook."""

    async def test(scene: Scene) -> None:
        scene.tunnel = f"echo $$ >pid; {scene.tunnel}"
        listening = scene.through()
        await listening.says("sends to this machine through")
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert await listening.end() == 2
        assert "The tunnel ended with exit code" in listening.printed
        assert scene.logto.hooks == []

    live(test, tmp_path)


def test_a_webhook_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    """With others there it is told; the last one, and the tunnel's, end the session."""

    async def test(scene: Scene) -> None:
        one, two = (
            scene.logto.add_hook(WEBHOOK, name="one"),
            scene.logto.add_hook(WEBHOOK, name="two"),
        )
        listening = scene.listen("--since", "1h")
        scene.create("ana")
        await scene.got("ana")
        scene.logto.delete_hook(one["id"])
        await listening.says("The webhook one was deleted or disabled in Logto. Still reading")
        scene.logto.change_hook(two["id"], enabled=False)
        assert await listening.end() == 2
        assert "The webhook two was deleted or disabled in Logto" in listening.printed
        listening = scene.through()
        await listening.says("sends to this machine through")
        scene.logto.delete_hook(scene.logto.hooks[0]["id"])
        assert await listening.end() == 2
        assert "endpoint list" in listening.printed

    live(test, tmp_path)


def test_a_logto_that_is_gone_for_a_while(tmp_path: Path) -> None:
    """Is told once, and nothing is lost."""

    async def test(scene: Scene) -> None:
        scene.logto.add_hook(WEBHOOK)
        listening = scene.listen("--since", "1h")
        scene.create("ana")
        await scene.got("ana")
        scene.logto.faults = Faults(status_500=1)
        await listening.says("it answers 500.")
        await listening.says("Retrying")
        scene.create("bo")
        scene.logto.faults = Faults()
        await listening.says("Logto answers again.")
        await scene.got("ana", "bo")

    live(test, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "changed", "says"),
    [
        ([], {}, "create a webhook with any URL"),
        (["--webhook", "main"], {}, "Can't select a webhook"),
        ([], {"LOGTO_ENDPOINT": "http://127.0.0.1:9"}, "Can't reach Logto at http://127.0.0.1:9"),
        ([], {"LOGTO_M2M_APP_SECRET": "wrong"}, "LOGTO_M2M_APP_SECRET"),
        ([], {"LOGTO_M2M_APP_ID": ""}, "Management API isn't configured"),
        (["--repoint", "main"], {}, "--repoint can't be used: it needs --tunnel-command"),
        (["--tunnel-command", "ngrok http 80"], {}, "it must contain {port}"),
        (["--tunnel-command", "x {port}", "--since", "1h"], {}, "--since can't be used"),
        (["--forward-to", "localhost:80"], {}, "must look like http://"),
    ],
)
def test_what_can_not_be_done(
    tmp_path: Path, arguments: list[str], changed: dict[str, str], says: str
) -> None:
    """Is said in a line, with what to do, and exit code 2."""

    async def test(scene: Scene) -> None:
        listening = scene.listen(*arguments, **changed)
        assert await listening.end() == 2
        assert listening.printed.splitlines()[-1].startswith("error: ")
        assert says in listening.printed
        assert "Forwarding to" not in listening.printed

    live(test, tmp_path)
