"""`endpoint create`, `list` and `test`, as a person runs them, against FakeLogto."""

from __future__ import annotations

import asyncio
import re
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.logto.webhooks import subscription
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import credentials, serving
from tests.support.service import PATH, clean_environment, command, one_line

URL = "https://app.example/api/webhooks/logto"
APP = """\
from logto_webhooks import LogtoWebhooks, events
logto = LogtoWebhooks(signing_key="x", database_url="sqlite:///app.db")
@logto.on(events.RoleCreated, events.LocalUserCreated, "OrganizationRole.*")
def audit(event) -> None: ...
"""
Run = Callable[..., Awaitable[subprocess.CompletedProcess[str]]]


def live(test: Callable[[FakeLogto, Run], Awaitable[None]], folder: Path) -> None:
    """Run a test with a Logto, and with commands that may ask it."""

    async def main() -> None:
        async with FakeLogto() as logto:

            async def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
                settings = credentials(logto) | more
                return await asyncio.to_thread(
                    command, "endpoint", *words, folder=folder, **settings
                )

            await test(logto, run)

    asyncio.run(main())


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_one_is_made_for_the_sync(tmp_path: Path) -> None:
    """Its key is printed, and written nowhere; a second one for the same URL is refused."""

    async def test(logto: FakeLogto, run: Run) -> None:
        made = await run("create", "--url", URL)
        assert made.returncode == 0
        [webhook] = logto.hooks
        assert (webhook["config"], webhook["name"]) == ({"url": URL}, "logto-webhooks")
        assert webhook["events"] == subscription()
        assert made.stdout == f"LOGTO_WEBHOOK_SIGNING_KEY={webhook['signingKey']}\n"
        assert "serve answers only at" not in made.stderr
        assert files(tmp_path) == []
        odd = await run("create", "--url", "https://app.example/")
        assert "serve answers only at /api/webhooks/logto" in odd.stderr
        [other] = [each["id"] for each in logto.hooks if each["id"] != webhook["id"]]
        logto.delete_hook(other)
        again = await run("create", "--url", f"{URL}/")
        assert again.returncode == 2
        assert f"The webhook {webhook['id']} already sends to" in one_line(again.stderr)
        assert logto.hooks == [webhook]

    live(test, tmp_path)


def test_the_handlers_are_asked_what_they_need(tmp_path: Path) -> None:
    """Those of `--app`; and an application that makes one itself says the same."""

    async def test(logto: FakeLogto, run: Run) -> None:
        (tmp_path / "app.py").write_text(APP)
        made = await run("create", "--url", URL, "--app", "app:logto", "--name", "n", "--json")
        told = msgspec.json.decode(made.stdout)
        assert told["name"] == "n"
        roles = {each for each in told["events"] if each.startswith("OrganizationRole.")}
        assert set(told["events"]) - set(subscription()) == {"Role.Created"} | roles
        assert len(roles) == 4
        [webhook] = logto.hooks
        assert told["signing_key"] == webhook["signingKey"]
        application = mounted(tmp_path, logto)
        second = await application.create_endpoint("https://other.example/")
        assert "Role.Deleted" in second.events
        assert [each.id for each in await application.endpoints()] == [second.id, webhook["id"]]

    live(test, tmp_path)


def mounted(folder: Path, logto: FakeLogto) -> LogtoWebhooks:
    made = LogtoWebhooks(
        signing_key="x",
        database_url=f"sqlite:///{folder / 'mounted.db'}",
        endpoint=logto.url,
        app_id=logto.app_id,
        app_secret=logto.app_secret,
    )

    @made.on(events.RoleDeleted)
    def gone(event: events.RoleDeleted) -> None: ...

    return made


@pytest.mark.parametrize("before", [None, "", "# mine\nLOGTO_WEBHOOK_SIGNING_KEY=\nOTHER='a b'"])
def test_the_key_is_written_on_demand(tmp_path: Path, before: str | None) -> None:
    """Into a file that nobody else reads, if it is new; what else stands there stays."""

    async def test(logto: FakeLogto, run: Run) -> None:
        file = tmp_path / ".env"
        if before is not None:
            file.write_text(before)
            file.chmod(0o640)
        made = await run("create", "--url", URL, "--env-file", ".env", LOGTO_WEBHOOK_SIGNING_KEY="")
        assert made.returncode == 0, made.stderr
        [webhook] = logto.hooks
        assert f"LOGTO_WEBHOOK_SIGNING_KEY={webhook['signingKey']}" in file.read_text().splitlines()
        kept = [line for line in (before or "").splitlines() if "SIGNING_KEY" not in line]
        assert [line for line in kept if line not in file.read_text()] == []
        assert stat.S_IMODE(file.stat().st_mode) == (0o600 if before is None else 0o640)

    live(test, tmp_path)


def test_a_key_that_is_there_is_left(tmp_path: Path) -> None:
    """And no webhook is made; nor if the file can't be written."""

    async def test(logto: FakeLogto, run: Run) -> None:
        file = tmp_path / ".env"
        file.write_text("LOGTO_WEBHOOK_SIGNING_KEY=mine\n")
        refused = await run("create", "--url", URL, "--env-file", ".env")
        assert refused.returncode == 2
        assert "already contains a signing key" in one_line(refused.stderr)
        assert file.read_text() == "LOGTO_WEBHOOK_SIGNING_KEY=mine\n"
        refused = await run("create", "--url", URL, "--env-file", "no/.env")
        assert "Can't write " in one_line(refused.stderr)
        assert logto.hooks == []

    live(test, tmp_path)


def test_the_list_says_which_is_ours(tmp_path: Path) -> None:
    """By the key or the URL, without showing a key."""

    async def test(logto: FakeLogto, run: Run) -> None:
        assert (await run("list")).returncode == 1
        assert files(tmp_path) == [], "it needs no database, and makes none"
        keys = ("ours", "theirs", "theirs, too")
        for key, url in zip(keys, ("https://a.example/", "https://b.example/", URL), strict=True):
            logto.add_hook(url, signing_key=key, name=f"name of {key}")
        more = {"LOGTO_WEBHOOK_SIGNING_KEY": "new,ours", "LOGTO_WEBHOOKS_PUBLIC_URL": URL}
        listed = await run("list", "--json", **more)
        rows: list[dict[str, Any]] = msgspec.json.decode(listed.stdout)
        assert [each["ours"] for each in rows] == [True, False, True]
        assert {tuple(each) for each in rows} == {
            ("id", "name", "enabled", "url", "events", "ours")
        }
        shown = await run("list", **more)
        assert "name of theirs, too" in shown.stdout
        assert shown.stdout.count("theirs") == 2
        long = f"https://app.example/{'sub/' * 60}api"
        logto.add_hook(long, name="long")
        assert long in (await run("list", **more)).stdout.split()

    live(test, tmp_path)


def test_no_command_shows_the_password_of_a_url(tmp_path: Path) -> None:
    """Nor its query, which may hold a token. Logto gets the whole URL."""
    secret = "http://ana:s3cr3t@127.0.0.1:9/api/webhooks/logto?token=t0ken"

    async def test(logto: FakeLogto, run: Run) -> None:
        created = await run("create", "--url", secret, "--json")
        assert created.returncode == 0, created.stderr
        assert logto.hooks[0]["config"] == {"url": secret}
        key = {"LOGTO_WEBHOOK_SIGNING_KEY": logto.hooks[0]["signingKey"]}
        await asyncio.to_thread(command, "migrate", folder=tmp_path)
        ran = [
            created,
            await run("create", "--url", secret),
            await run("list", **key),
            await run("list", "--json", **key),
            await run("test", "nobody's", **key),
            await run("test", **key),
            await run("test", "--json", **key),
            await run("rotate", **key),
            await run("rotate", "--json", logto.hooks[0]["id"]),
        ]
        for words in ran:
            assert "http://127.0.0.1:9/api/webhooks/logto" in words.stdout + words.stderr, words
            assert not re.search("s3cr3t|t0ken", words.stdout + words.stderr), words

    live(test, tmp_path)


def test_a_test_arrives(tmp_path: Path) -> None:
    """By the webhook with our key, whichever there are; it says which delivery it is."""

    async def test(logto: FakeLogto, run: Run) -> None:
        logto.add_hook("http://127.0.0.1:9/", signing_key="another")
        async with serving(tmp_path, logto) as service:
            mine = logto.add_hook(f"{service.url}{PATH}", name="mine")
            tested = await run("test", "--json")
            told = msgspec.json.decode(tested.stdout)
            assert (told["webhook"], told["event"], told["problem"]) == (
                mine["id"],
                "PostRegister",
                None,
            )
            [row] = service.rows("SELECT id, event FROM logto_deliveries")
            assert row == (told["delivery"], "PostRegister")
            tested = await run("test", "mine", "--event", "User.Created")
            assert tested.returncode == 0
            assert tested.stdout.startswith(f"User.Created arrived as delivery {row[0] + 1},")

    live(test, tmp_path)


def test_a_test_right_after_a_rotation_arrives(tmp_path: Path) -> None:
    """By the webhook that is ours by the key that the database knows; disabled, that is said."""

    async def test(logto: FakeLogto, run: Run) -> None:
        async with serving(tmp_path, logto) as service:
            logto.add_hook("http://127.0.0.1:9/", signing_key="another")
            mine = logto.add_hook(f"{service.url}{PATH}")
            logto.change_hook(mine["id"], enabled=False)
            rotated = await run("rotate")
            assert rotated.stderr.splitlines()[0].endswith("; no use of it has been recorded yet.")
            listed = msgspec.json.decode((await run("list", "--json")).stdout)
            assert {row["id"] for row in listed if row["ours"]} == {mine["id"]}
            tested = await run("test")
            assert tested.stdout.startswith("PostRegister arrived as delivery 1,"), tested.stderr
            assert "The webhook is disabled" in tested.stderr

    live(test, tmp_path)


def test_a_test_that_does_not_arrive(tmp_path: Path) -> None:
    """Is told by its cause, and exit code 1."""

    async def test(logto: FakeLogto, run: Run) -> None:
        async with serving(tmp_path, logto) as service:
            url = f"{service.url}{PATH}"
            wrong = logto.add_hook(url, signing_key="wrong")["id"]
            nobody = logto.add_hook("http://127.0.0.1:9/", signing_key="wrong")["id"]
            nowhere = logto.add_hook(f"{service.url}/other", signing_key="wrong")["id"]
            other = {"LOGTO_WEBHOOKS_DATABASE_URL": f"sqlite:///{tmp_path / 'other.db'}"}
            right = logto.add_hook(url)["id"]
            assert (await migrated(other, tmp_path)).returncode == 0
            for webhook, more, says in (
                (wrong, {}, "401: the service doesn't have this webhook's signing key"),
                (nobody, {}, "nothing listens there"),
                (nowhere, {}, "the answer was 404"),
                (right, other, "didn't arrive here within 0.5 s"),
            ):
                tested = await run("test", webhook, "--timeout", "0.5", **more)
                assert tested.returncode == 1
                assert says in one_line(tested.stderr)

    live(test, tmp_path)


async def migrated(settings: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(command, "migrate", folder=folder, **settings)


@pytest.mark.parametrize(
    ("words", "changed", "says"),
    [
        (
            ["create", "--url", "app.example"],
            {},
            "--url can't be used: 'app.example' must look like https://host/path.",
        ),
        (["create", "--url", URL], {"LOGTO_M2M_APP_SECRET": "wrong"}, "LOGTO_M2M_APP_SECRET"),
        (["list"], {"LOGTO_ENDPOINT": ""}, "Management API isn't configured"),
        (["test"], {}, "Can't select a webhook"),
        (["test", "nobody"], {}, "Logto has these webhooks: "),
        (["test", "one", "--event", "User.Creatd"], {}, "Did you mean User.Created?"),
    ],
)
def test_what_can_not_be_done(
    tmp_path: Path, words: list[str], changed: dict[str, str], says: str
) -> None:
    """Is said in a line, and exit code 2."""

    async def test(logto: FakeLogto, run: Run) -> None:
        for name in ("one", "two"):
            logto.add_hook(f"http://127.0.0.1:9/{name}", signing_key="other", name=name)
        assert (await migrated(credentials(logto), tmp_path)).returncode == 0
        refused = await run(*words, **changed)
        assert refused.returncode == 2
        assert says in one_line(refused.stderr)
        assert len(logto.hooks) == 2

    live(test, tmp_path)


def test_a_new_key_is_one_line_to_paste(tmp_path: Path) -> None:
    """However narrow the terminal; what else there is to say is said beside it."""

    async def test(logto: FakeLogto, run: Run) -> None:
        old = logto.add_hook(URL)["signingKey"]
        environment = clean_environment({"COLUMNS": "30"} | credentials(logto))
        program = (sys.executable, "-m", "logto_webhooks")
        await asyncio.to_thread(command, "migrate", folder=tmp_path)
        rotated = await asyncio.to_thread(
            subprocess.run,
            [*program, "endpoint", "rotate"],
            cwd=tmp_path,
            env=environment | {"LOGTO_WEBHOOK_SIGNING_KEY": old},
            capture_output=True,
            text=True,
        )
        [webhook] = logto.hooks
        assert rotated.stdout == f"LOGTO_WEBHOOK_SIGNING_KEY={webhook['signingKey']}\n"
        assert old not in rotated.stderr
        assert f"Rotated the key of {webhook['id']} ({URL})." in rotated.stderr

    live(test, tmp_path)


def test_what_an_overlap_is_like(tmp_path: Path) -> None:
    """Before anything is changed."""

    async def test(logto: FakeLogto, run: Run) -> None:
        logto.add_hook(URL)
        wrong = await run("rotate", "--overlap", "soon")
        assert wrong.returncode == 2
        assert "must look like 30s, 10m" in one_line(wrong.stderr)
        assert [each["signingKey"] for each in logto.hooks] == [logto.signing_key]

    live(test, tmp_path)
