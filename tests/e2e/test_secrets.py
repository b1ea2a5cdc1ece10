"""Keys and secrets: what can't be one is refused, files hold them, and nothing shows them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from logto_webhooks.admin import Admin
from logto_webhooks.database import open_database
from logto_webhooks.errors import KeyNotTold, SettingInvalid
from logto_webhooks.ingest.quarantine import make_key_reader
from logto_webhooks.instrumentation import TelemetryEvent
from logto_webhooks.runtime import make_client
from logto_webhooks.settings import from_env
from logto_webhooks.signing_keys import is_key, problem_of_key, sign
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.test_quarantine import of
from tests.integration.test_stores import T0
from tests.support.fake import credentials
from tests.support.service import command, one_line

KEY = "HOS4V3skMb8PyeI6ooEkdYVmcKvXdV8P"
NO_KEYS: list[tuple[str, str]] = [
    (f'"{KEY}"', "quotes around it"),
    (f"'{KEY}", "quotes around it"),
    (f"“{KEY}”", "quotes around it"),
    (f"{KEY[:9]}'{KEY[9:]}", "contains quotes"),
    (f"LOGTO_WEBHOOK_SIGNING_KEY={KEY}", "NAME=value"),
    (f"export KEY={KEY}", "NAME=value"),
    (f"signingKey = {KEY}", "NAME=value"),
    (f"{KEY[:16]} {KEY[16:]}", "spaces or line breaks"),
    (f"{KEY[:16]}\n{KEY[16:]}", "spaces or line breaks"),
    (f"{KEY}\x1b[0m", "characters that no key has"),
    (f"{KEY}\u200b", "characters that no key has"),
    *(
        (key, "placeholder")
        for key in (
            "${LOGTO_SIGNING_KEY}",
            "<the-signing-key-of-the-webhook>",
            "…",
            "...",
            "HOS4V3sk…",
            "********",
            "xxxxxxxxxxxxxxxx",
            "your-signing-key",
            "YOUR_WEBHOOK_SIGNING_KEY",
            "your signing key",
            "changeme",
        )
    ),
    ("fifteen-letters", "easy to guess: copy the key from Logto's console"),
]


@pytest.mark.parametrize(("key", "says"), NO_KEYS)
def test_what_can_not_be_a_key_is_refused_at_start(tmp_path: Path, key: str, says: str) -> None:
    """In one line that names the setting and the reason, and doesn't quote the key; `doctor`
    finds it, too."""
    assert says in (problem_of_key(key) or "")
    with pytest.raises(SettingInvalid) as raised:
        _ = from_env({"LOGTO_WEBHOOK_SIGNING_KEY": f"{KEY},{key}"}).signing_keys
    said = str(raised.value)
    assert said.startswith("LOGTO_WEBHOOK_SIGNING_KEY (key 2 of 2) can't be used")
    assert says in said
    assert KEY[:9] not in said
    found = asyncio.run(Admin(lambda: from_env({}, signing_key=key)).diagnose(["key"]))
    codes = {each.code for each in found}
    assert codes & {"key_unusable", "key_short"}
    assert KEY[:9] not in str(found)


def test_serve_refuses_such_a_key(tmp_path: Path) -> None:
    """Before it listens."""
    refused = command("serve", folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=f'"{KEY}"')
    assert refused.returncode == 2
    assert "remove them" in one_line(refused.stderr)
    assert KEY not in refused.stderr


@pytest.mark.parametrize("key", [KEY, "a-key-for-tests-and-nothing-else", "YWJjZGVmZ2hpamtsbW4=="])
def test_what_can_be_a_key(key: str) -> None:
    """Padding in its end makes no NAME=value of it."""
    assert is_key(key)


@pytest.mark.parametrize("value", [None, True, 7, ["x" * 32], {"key": KEY}, ""])
def test_other_types_are_no_keys(value: Any) -> None:
    """Whatever an API answers."""
    assert not is_key(value)


def test_a_secret_with_quotes_is_refused() -> None:
    """The secret of the machine-to-machine application, as a key."""
    with pytest.raises(SettingInvalid, match=r"LOGTO_M2M_APP_SECRET .*quotes around it"):
        from_env({"LOGTO_M2M_APP_SECRET": f"'{KEY}'"})


class TestFiles:
    """A secret is the content of the file that its variable with _FILE names."""

    @pytest.mark.parametrize(
        ("variable", "field", "secret"),
        [
            ("LOGTO_WEBHOOK_SIGNING_KEY", "signing_key", KEY),
            ("LOGTO_M2M_APP_SECRET", "app_secret", "a-secret"),
            ("LOGTO_WEBHOOKS_DATABASE_URL", "database_url", "postgresql://u:p@h/n"),
            ("DATABASE_URL", "database_url", "postgresql://u:p@h/n"),
        ],
    )
    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    def test_it_is_read_without_the_line_break_at_its_end(
        self, tmp_path: Path, variable: str, field: str, secret: str, end: str
    ) -> None:
        """Editors and `echo` write one."""
        (tmp_path / "secret").write_bytes(f"{secret}{end}".encode())
        read = from_env({f"{variable}_FILE": str(tmp_path / "secret")})
        assert getattr(read, field) == secret

    def test_both_are_refused(self, tmp_path: Path) -> None:
        """Nobody could tell which one counts; an option counts before either."""
        (tmp_path / "key").write_text(KEY)
        both = {"LOGTO_M2M_APP_SECRET": "x", "LOGTO_M2M_APP_SECRET_FILE": str(tmp_path / "key")}
        with pytest.raises(SettingInvalid, match="LOGTO_M2M_APP_SECRET is also set"):
            from_env(both)
        assert from_env(both, app_secret="given").app_secret == "given"

    def test_what_can_not_be_read_is_one_line(self, tmp_path: Path) -> None:
        """It names the variable and the file."""
        (tmp_path / "empty").write_text("\n")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "large").write_bytes(b"x" * 100_000)
        for name, says in [
            ("empty", "is empty"),
            ("binary", "isn't UTF-8"),
            ("large", "is too large"),
            ("missing", "No such file"),
            (".", "Is a directory"),
            ("\0", "can't be read"),
        ]:
            path = f"{tmp_path}/{name}"
            with pytest.raises(SettingInvalid) as raised:
                from_env({"LOGTO_WEBHOOK_SIGNING_KEY_FILE": path})
            said = one_line(str(raised.value))
            assert said.startswith("LOGTO_WEBHOOK_SIGNING_KEY_FILE can't be used: the file")
            assert says in said

    @pytest.mark.parametrize(
        ("variable", "secret"),
        [
            ("LOGTO_WEBHOOK_SIGNING_KEY", KEY),
            ("LOGTO_M2M_APP_SECRET", KEY),
            ("DATABASE_URL", f"postgresql://user:{KEY}@localhost/app"),
        ],
    )
    def test_a_secret_instead_of_its_file_is_not_repeated(self, variable: str, secret: str) -> None:
        """A usual mistake: the secret itself in the variable for its file."""
        with pytest.raises(SettingInvalid) as raised:
            from_env({f"{variable}_FILE": secret})
        said = one_line(str(raised.value))
        assert KEY not in said
        assert "must be the path of a file" in said

    def test_the_environment_wins_over_env(self, tmp_path: Path) -> None:
        """Whichever of both ways each of them takes."""
        body, key = make.user_created().body, tmp_path / "key"
        (tmp_path / "body").write_bytes(body)
        key.write_text(f"{KEY}\n")
        (tmp_path / ".env").write_text("LOGTO_WEBHOOK_SIGNING_KEY=another-key-0123456789\n")
        signed = command("sign", "body", folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY_FILE=str(key))
        assert (signed.stdout, signed.stderr) == (f"{sign(body, KEY)}\n", "")
        (tmp_path / ".env").write_text(f"LOGTO_WEBHOOK_SIGNING_KEY_FILE={key}\n")
        signed = command("sign", "body", folder=tmp_path)
        assert (signed.stdout, signed.stderr) == (f"{sign(body, KEY)}\n", "")
        other = command("sign", "body", folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=KEY[::-1])
        assert other.stdout == f"{sign(body, KEY[::-1])}\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--signing-key", KEY), ("--app-secret", KEY)],
)
def test_a_secret_on_the_command_line_is_a_warning(tmp_path: Path, option: str, value: str) -> None:
    """Everybody on the machine sees it; the warning doesn't repeat it."""
    (tmp_path / "body").write_bytes(b"{}")
    words = ("sign", "body") if option == "--signing-key" else ("endpoint", "list")
    said = command(*words, option, value, folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=KEY)
    assert f"warning: all users of this machine can see {option} with `ps`" in said.stderr
    assert "_FILE to a file" in said.stderr
    assert KEY not in said.stderr


@pytest.mark.parametrize("key", ["", None, 7, "short", " " * 20, '"quoted-0123456789"'])
def test_a_key_that_is_none_is_not_learnt(tmp_path: Path, key: Any) -> None:
    """A forgery signed with what Logto's answer has for a key stays set aside."""

    async def main() -> None:
        database, told = open_database(f"sqlite:///{tmp_path / 'a.db'}"), list[TelemetryEvent]()
        await database.migrate()
        async with FakeLogto() as logto:
            url = "http://127.0.0.1:9/api/webhooks/logto"
            webhook = logto.add_hook(url)["id"]
            logto.change_hook(webhook, signingKey=key)
            environment = credentials(logto) | {"LOGTO_WEBHOOKS_PUBLIC_URL": url}
            client = make_client(from_env(environment))
            ask = make_key_reader(client, database.host, FrozenClock(T0), url)
            waiting = of(database, told, ask, key=KEY)
            body = make.user_created().body
            forged = sign(body, key if isinstance(key, str) else "").encode()
            waiting.offer(body, forged, time.time_ns() // 1_000_000)
            await waiting.turn()
            status = await database.host.read(lambda store: store.status())
            assert status.deliveries["pending"] == 0
            assert await database.host.read(lambda store: store.webhook_keys.count_rejected()) == 1
            assert await database.host.read(lambda store: store.webhook_keys.learnt()) == []
            await client.close()
        await database.host.close()

    asyncio.run(main())


class Keyless(FakeLogto):
    """A Logto that answers with an empty key the first time it makes one."""

    def rotate_signing_key(self, hook_id: str) -> dict[str, Any]:
        if self.hooks[0]["signingKey"] == self.signing_key:
            return self.change_hook(hook_id, signingKey="")
        return super().rotate_signing_key(hook_id)


def test_an_endpoint_without_a_key_is_an_error(tmp_path: Path) -> None:
    """When it is made, and when its key is changed; nothing is learnt of it. A webhook whose old
    key is empty can be given another."""

    async def main() -> None:
        async with Keyless() as logto:
            environment = credentials(logto) | {
                "LOGTO_WEBHOOKS_DATABASE_URL": f"sqlite:///{tmp_path / 'a.db'}"
            }
            operations = Admin(lambda: from_env(environment))
            await operations.migrate()
            with pytest.raises(KeyNotTold, match="it is empty"):
                await operations.create_endpoint("http://127.0.0.1:9/x")
            [webhook] = logto.hooks
            rotated = await operations.rotate_endpoint(webhook["id"])
            learnt = await operations.database.host.read(
                lambda store: [each.key for each in store.webhook_keys.learnt()]
            )
            assert learnt == [rotated.signing_key]
            assert is_key(rotated.signing_key)
            await operations.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p@ss:w0rd@127.0.0.1/x", "postgresql://me:***@127.0.0.1/x"),
        ("postgresql:///x?user=me&password=p@ss", "postgresql:///x?user=me&password=***"),
    ],
)
def test_the_password_of_a_url_in_the_wrong_place_is_not_shown(
    url: str, shown: str, tmp_path: Path
) -> None:
    """It was to be the value of an option, for example."""
    done = command("endpoint", "list", url, folder=tmp_path)
    assert done.returncode == 2
    assert f"argument(s) ({shown}). See: logto-webhooks endpoint list" in one_line(done.stderr)
    assert "ss:w0rd" not in done.stderr


def test_the_password_of_the_service_is_not_shown(tmp_path: Path) -> None:
    """Nor the query of its URL."""
    url = "http://ana:SECRET@127.0.0.1:9/api?token=SECRET"
    failed = command(
        "trigger", "User.Created", "--to", url, folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=KEY
    )
    assert one_line(failed.stderr).startswith("error: Can't reach http://127.0.0.1:9/api: ")
    assert "SECRET" not in failed.stdout + failed.stderr
