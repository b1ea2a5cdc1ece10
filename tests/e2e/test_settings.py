"""What is set wrongly is told by its name, and with what to set."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import sessionmaker

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.cli.session import load_application
from logto_webhooks.database import database_for, open_database
from logto_webhooks.errors import ApiNotConfigured, InvalidHandler, SettingInvalid
from logto_webhooks.ingest.spool import spool_of
from logto_webhooks.mapping.file import find_map_file
from logto_webhooks.settings import VARIABLES, Settings, from_env
from logto_webhooks.testing import SIGNING_KEY
from tests.support.service import clean_environment, command, one_line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WORKER", "maybe", "WORKER can't be used: it must be true or false."),
        ("LAG_MS", "x", "it must be a whole number."),
        ("LAG_MS", "-1", "it must be a whole number >= 0."),
        ("SILENCE_AFTER_S", "x", "it must be a whole number."),
        ("API_BUDGET", "0", "it must be a number > 0."),
        ("SCHEMA", "bad schema;", "it must be at most 63 letters (a to z), digits and _"),
        ("MAX_BODY_BYTES", "10", "it must be a whole number >= 65536."),
        (
            "PUBLIC_URL",
            "webhooks.example.com",
            "it must be a URL such as https://webhooks.example.com/",
        ),
        ("PUBLIC_URL", "https:///path", "it must be a URL such as"),
        ("PUBLIC_URL", "https://host:port/path", "it must be a URL such as"),
        ("API_RESOURCE", "default.logto.app/api", "it must be a URL such as"),
        ("LOG_LEVEL", "loud", "it must be one of debug, info, warning, error."),
    ],
)
def test_a_value_that_can_not_be(name: str, value: str, says: str) -> None:
    """In words, and not those of who reads it."""
    with pytest.raises(SettingInvalid) as raised:
        from_env({f"LOGTO_WEBHOOKS_{name}": value})
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://webhooks.example.com/api/webhooks/logto",
        "http://[::1]:8787/logto",
        "https://me:s-e-c@webhooks.example.com:8443",
        "https://webhooks_1.example.com/?tenant=a",
    ],
)
def test_a_public_url_that_can_be(url: str) -> None:
    """With a port, an IPv6 address, a password or a query."""
    assert from_env({"LOGTO_WEBHOOKS_PUBLIC_URL": url}).public_url == url


WRONG = {
    "signing_key": "short",
    "worker": "maybe",
    "host": None,  # found by whoever listens there
    "schema": "bad schema;",
    "port": "99999",
    "path": "no slash",
    "max_body_bytes": "65535",
    "max_attempts": "0",
    "lag_ms": "-1",
    "replay_window_s": "-1",
    "endpoint": "nowhere",
    "app_id": None,  # any text
    "app_secret": '"quoted"',
    "api_resource": "default.logto.app/api",
    "api_budget": "0",
    "recover_every_s": "0",
    "reconcile_every_s": "-1",
    "silence_after_s": "-1",
    "public_url": "webhooks.example.com",
    "app": "no colon",
    "log_format": "xml",
    "log_level": "loud",
    "database_url": "mysql://name",
    "spool_dir": "/dev/null/spool",
    "map_file": "missing.toml",
}


@pytest.mark.parametrize("field", WRONG)
def test_an_error_names_what_was_read(field: str) -> None:
    """The variable and its file, the option, or the argument of an application."""
    value = WRONG[field]
    assert WRONG.keys() == VARIABLES.keys()
    option = f"--{field.replace('_', '-')}"
    if value is None:
        return
    for variable in VARIABLES[field]:
        read = {variable: value}
        assert named(partial(from_env, read)) == variable
        in_file = partial(from_env, read, places={variable: ".env"})
        assert named(in_file) == f"{variable} in .env"
    given: dict[str, Any] = {field: value}
    assert named(partial(from_env, {}, option=True, **given)) == option
    assert named(partial(from_env, {}, **given)) == field


@pytest.mark.parametrize("field", ["endpoint", "public_url", "api_resource"])
def test_a_port_has_its_range(field: str) -> None:
    """What is greater can't be connected to."""
    for port in (1, 80, 8787, 59_999, 65_535):
        given: dict[str, Any] = {field: f"http://127.0.0.1:{port}/"}
        assert getattr(from_env({}, **given), field) == given[field]
    for port in (65_536, 66_000, 70_000, 99_999, 100_000):
        given = {field: f"http://127.0.0.1:{port}/"}
        with pytest.raises(SettingInvalid):
            from_env({}, **given)


def named(read: Callable[[], Settings]) -> object:
    """What the error about a setting names, whoever finds it."""
    with pytest.raises(SettingInvalid) as raised:
        use(read)
    return vars(raised.value)["name"]


def use(read: Callable[[], Settings]) -> None:
    settings = read()
    database_for(settings)
    if spool := spool_of(settings):
        spool.make()
    load_application(settings)
    find_map_file(settings)
    _ = settings.signing_keys


@pytest.mark.parametrize(("driver", "extra"), [("asyncpg", "postgres"), ("psycopg", "psycopg")])
def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch, driver: str, extra: str) -> None:
    """The extra that brings it is named."""
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(
        SettingInvalid, match=f'the extra "{extra}" .*{driver} is missing.*pip install'
    ):
        open_database(f"postgresql+{driver}://127.0.0.1/name")


STATUS = """
import sys, types
from logto_webhooks.__main__ import main
{before}
sys.argv = ["logto-webhooks", "status", "--database-url", "{driver}://u:s-e-c@127.0.0.1:1/name"]
main()
"""


def status_after(before: str, folder: Path, driver: str = "postgresql") -> str:
    """Change what can be imported, run `status`, and return the line of its error."""
    script = folder / "script.py"
    script.write_text(STATUS.format(before=before, driver=driver))
    ended = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert "s-e-c" not in ended.stderr
    return one_line(ended.stderr)


@pytest.mark.parametrize(
    ("driver", "before", "says"),
    [
        ("postgresql", "sys.modules['greenlet'] = None", '"postgres" of this package (greenlet'),
        (
            "postgresql+psycopg",
            "sys.modules['greenlet'] = None",
            '"psycopg" of this package (greenlet',
        ),
        (
            "postgresql+psycopg",
            "import os; os.environ['PSYCOPG_IMPL'] = 'python'; import ctypes.util; "
            "ctypes.util.find_library = lambda name: None",
            '"psycopg" of this package (libpq',
        ),
    ],
)
def test_what_a_driver_needs_is_missing(
    tmp_path: Path, driver: str, before: str, says: str
) -> None:
    """It is named, and so is the extra."""
    assert f"{says} is missing)" in status_after(before, tmp_path, driver)


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (
            "import logto_webhooks.database.sessions as sessions; del sessions.roll_back_savepoint",
            "can't be imported (cannot import name 'roll_back_savepoint' from",
        ),
        ("sys.modules['logto_webhooks.database.postgres'] = None", "can't be imported (import of"),
        (
            "sys.modules['asyncpg.pgproto.pgproto'] = None",
            "can't be imported (import of asyncpg.pgproto.pgproto",
        ),
        (
            "sys.modules['sqlalchemy.ext.asyncio'] = types.ModuleType('sqlalchemy.ext.asyncio')",
            "can't be imported (cannot import name",
        ),
        ("sys.modules['logto_webhooks.cli.errors'] = None", "the command line can't be imported"),
    ],
)
def test_packages_that_do_not_fit_together(tmp_path: Path, before: str, says: str) -> None:
    """As after an upgrade below a running process: none of them is reported as missing."""
    line = status_after(before, tmp_path)
    assert says in line
    assert "nstall this package again" in line
    assert "is missing" not in line


class TestTheFile:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (
                "LOGTO_WEBHOOKS_PROT=1\n",
                "unknown setting LOGTO_WEBHOOKS_PROT. Did you mean LOGTO_WEB",
            ),
            ("LOGTO_WEBHOOKS_SIGNING_KEY=s-e-c\n", "Did you mean LOGTO_WEBHOOK_SIGNING_KEY"),
            ("A=1\n\nB='s-e-c\n", ".env, line 5 is ignored"),
        ],
    )
    def test_what_sets_nothing_is_a_warning(self, tmp_path: Path, text: str, says: str) -> None:
        """The rest is taken; no value is shown."""
        (tmp_path / ".env").write_text(
            f"LOGTO_WEBHOOK_SIGNING_KEY={SIGNING_KEY}\nLOGTO_OTHER=1\n{text}"
        )
        signed = command("sign", ".env", folder=tmp_path)
        assert signed.returncode == 0
        assert one_line(signed.stderr).startswith("warning: .env")
        assert says in signed.stderr
        assert "s-e-c" not in signed.stderr

    def test_a_folder_is_an_error(self, tmp_path: Path) -> None:
        """It isn't passed over, whether it is named or not."""
        (tmp_path / ".env").mkdir()
        for options in ([], ["--env-file", ".env"]):
            refused = command("status", *options, folder=tmp_path)
            assert refused.returncode == 2
            says = ".env can't be used: it can't be read (Is a directory)."
            assert says in one_line(refused.stderr)

    def test_an_empty_key_is_told_of(self, tmp_path: Path) -> None:
        """As `init` writes it; a key that stands elsewhere counts."""
        assert command("init", folder=tmp_path).returncode == 0
        refused = command("sign", ".env", folder=tmp_path)
        assert refused.returncode == 2
        says = "No signing key is set: LOGTO_WEBHOOK_SIGNING_KEY in .env is empty. Set "
        assert says in one_line(refused.stderr)
        key = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
        assert command("sign", ".env", folder=tmp_path, **key).returncode == 0

    def test_a_secret_in_a_file_is_named_with_the_file(self, tmp_path: Path) -> None:
        """The one whose line is wrong."""
        (tmp_path / ".env").write_text("LOGTO_WEBHOOK_SIGNING_KEY_FILE=missing\n")
        refused = command("sign", ".env", folder=tmp_path)
        says = "LOGTO_WEBHOOK_SIGNING_KEY_FILE in .env can't be used: the file"
        assert says in one_line(refused.stderr)

    def test_one_that_can_not_be_read_says_why(self, tmp_path: Path) -> None:
        """As the system does."""
        (tmp_path / ".env").symlink_to("/proc/self/mem")  # readable by nobody, from its beginning
        refused = command("status", folder=tmp_path)
        assert refused.returncode == 2
        assert ".env can't be used: it can't be read (Input/output" in one_line(refused.stderr)


UNKNOWN = {
    "LOGTO_WEBHOOKS_PROT": "LOGTO_WEBHOOKS_PORT",
    "LOGTO_WEBHOOKS_SIGNING_KEY": "LOGTO_WEBHOOK_SIGNING_KEY",
    "LOGTO_WEBHOK_SIGNING_KEY": "LOGTO_WEBHOOK_SIGNING_KEY",
    "LOGTO_ENDPIONT": "LOGTO_ENDPOINT",
    "LOGTO_M2M_ID": "LOGTO_M2M_APP_ID",
    "LOGTO_M2M_APP_ID_FILE": "LOGTO_M2M_APP_ID",
    "LOGTO_M2M_CLIENT_SECRET": "LOGTO_M2M_APP_SECRET",
}
FOREIGN = {
    "LOGTO_APP_ID": "1",
    "LOGTO_APP_SECRET": "1",
    "LOGTO_APP_SECRET_FILE": "1",
    "LOGTO_COOKIE_SECRET": "1",
    "LOGTO_BASE_URL": "1",
    "LOGTO_API_RESOURCE": "1",
    "LOGTO_M2M_SCOPE": "1",
    "LOGTO_WEBHOOKS_TEST_ORDERS": "1",
    "LOGTO_WEBHOOKS_DB_SERVICE_HOST": "10.0.0.1",
    "LOGTO_WEBHOOKS_DB_PORT": "tcp://10.0.0.1:5432",
    "LOGTO_WEBHOOKS_DB_PORT_5432_TCP_ADDR": "10.0.0.1",
}


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_name_that_is_no_setting_is_a_warning(tmp_path: Path, place: str) -> None:
    """With what was meant; what others use isn't."""
    names = dict.fromkeys(UNKNOWN, "s-e-c")
    environment = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    (tmp_path / ".env").write_text("# nothing\n")
    if place == "environment":
        environment |= names | FOREIGN
        says = "warning: unknown setting {} in the environment. Did you mean {}?"
    else:
        (tmp_path / ".env").write_text("".join(f"{name}=s-e-c\n" for name in names))
        says = "warning: .env: unknown setting {}. Did you mean {}?"
    signed = command("sign", ".env", folder=tmp_path, **environment)
    assert signed.returncode == 0
    assert sorted(signed.stderr.splitlines()) == sorted(
        says.format(name, meant) for name, meant in UNKNOWN.items()
    )


def test_a_schema_needs_postgresql() -> None:
    """On SQLite, the URL is probably missing or misspelled."""
    settings = from_env({"LOGTO_WEBHOOKS_SCHEMA": "logto"})
    with pytest.raises(
        SettingInvalid,
        match=r"^LOGTO_WEBHOOKS_SCHEMA can't be used: the database is a SQLite file, .* Set "
        "LOGTO_WEBHOOKS_DATABASE_URL to the URL of a PostgreSQL database, or remove",
    ):
        database_for(settings)
    for database in (
        {"engine": sa.create_engine("sqlite://")},
        {"database_url": "sqlite:///a.db"},
    ):
        given: dict[str, Any] = {"schema": "logto", **database}
        with pytest.raises(SettingInvalid, match=r"^schema can't be used: .*PostgreSQL database"):
            LogtoWebhooks(signing_key=SIGNING_KEY, **given)


CREDENTIAL_VALUES = {"endpoint": "http://127.0.0.1:9", "app_id": "id", "app_secret": "s-e-c"}
SOME_CREDENTIALS = [set(some) for size in (1, 2) for some in combinations(CREDENTIAL_VALUES, size)]


@pytest.mark.parametrize("some", SOME_CREDENTIALS)
def test_some_of_the_credentials_are_an_error(tmp_path: Path, some: set[str]) -> None:
    """The service doesn't start, whichever is missing: it would run without the API unnoticed."""
    given: dict[str, Any] = {field: CREDENTIAL_VALUES[field] for field in some}
    logto = LogtoWebhooks(
        signing_key=SIGNING_KEY, database_url=f"sqlite:///{tmp_path}/app.db", **given
    )

    async def start() -> None:
        async with logto.lifespan():
            pass

    with pytest.raises(ApiNotConfigured) as raised:
        asyncio.run(start())
    missing = [VARIABLES[field][0] for field in CREDENTIAL_VALUES if field not in some]
    assert f"these are missing: {', '.join(missing)}. " in str(raised.value)


def test_serve_refuses_some_of_the_credentials(tmp_path: Path) -> None:
    """As `doctor` says."""
    some = {"LOGTO_M2M_APP_ID": "id", "LOGTO_M2M_APP_SECRET": "s-e-c"}
    ended = command("serve", folder=tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=SIGNING_KEY, **some)
    assert ended.returncode == 2
    assert "LOGTO_ENDPOINT" in one_line(ended.stderr)
    assert "s-e-c" not in ended.stderr


def test_an_application_warns_about_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When it first reads the environment, once: by default, it would use a SQLite file."""
    monkeypatch.chdir(tmp_path)
    for name in UNKNOWN | FOREIGN:
        monkeypatch.setenv(name, "s-e-c" if name in UNKNOWN else FOREIGN[name])
    monkeypatch.setenv("LOGTO_WEBHOOK_SIGNING_KEY", SIGNING_KEY)
    logto = LogtoWebhooks.from_env()
    assert caplog.messages == []

    async def start() -> None:
        async with logto.lifespan():
            await logto.status()

    asyncio.run(start())
    warnings = [message for message in caplog.messages if "unknown setting" in message]
    assert sorted(warnings) == sorted(
        f"unknown setting {name} in the environment. Did you mean {meant}?"
        for name, meant in UNKNOWN.items()
    )


@pytest.mark.parametrize(
    "engine", ["sqlite:///app.db", sa.make_url("sqlite:///app.db"), sessionmaker()]
)
def test_what_is_no_engine(engine: Any) -> None:
    """A URL has a name of its own."""
    with pytest.raises(SettingInvalid, match=r"an Engine or an AsyncEngine, not .* database_url"):
        LogtoWebhooks(signing_key="x", engine=engine)


@pytest.mark.parametrize("reads", [True, False])
def test_credentials_that_nobody_reads(
    reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An application that doesn't read its environment says so when it starts."""
    for field, value in CREDENTIAL_VALUES.items():
        monkeypatch.setenv(VARIABLES[field][0], value)
    logto = LogtoWebhooks(
        signing_key=SIGNING_KEY,
        database_url=f"sqlite:///{tmp_path}/app.db",
        environment=os.environ if reads else None,
    )

    async def start() -> None:
        async with logto.lifespan():
            pass

    asyncio.run(start())
    told = [line for line in caplog.messages if "environment=os.environ" in line]
    assert len(told) == (0 if reads else 1)


@pytest.mark.parametrize("environment", [None, {}])
def test_a_handler_that_cannot_be_called_is_refused_at_once(
    environment: dict[str, str] | None,
) -> None:
    """When it is registered, because the engine is known by then."""
    engine = sa.create_engine("sqlite:///app.db")
    logto = LogtoWebhooks(signing_key="x", engine=engine, environment=environment)

    async def hear(event: events.UserCreated, session: AsyncSession) -> None: ...

    with pytest.raises(InvalidHandler, match="session"):
        logto.on(events.UserCreated)(hear)


def test_a_name_that_is_misspelled_is_told_first() -> None:
    """Even the engine's: it isn't said to be missing."""
    misspelled: dict[str, Any] = {"engin": sa.create_engine("sqlite:///app.db")}
    with pytest.raises(TypeError, match="no setting 'engin'"):
        LogtoWebhooks(signing_key="x", **misspelled)
