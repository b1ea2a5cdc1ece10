"""`--app module:name`: what can't be imported, or is none, is told with what to write."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from logto_webhooks import LogtoWebhooks
from logto_webhooks.cli.session import load_application, load_code
from logto_webhooks.errors import InvalidHandler, SettingInvalid
from logto_webhooks.settings import Settings
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.service import Service, command
from tests.support.waiting import until

MODULES = {
    "app_good": "from logto_webhooks import LogtoWebhooks\n"
    "class inner:\n"
    "    logto = LogtoWebhooks.from_env()\n"
    "inner.logto.on('*', name='all')(lambda event: None)\n"
    "def make(): return inner.logto\n",
    "app_raises": "raise ValueError('postgresql://me:secret@host/db')\n",
    "app_calls": "(lambda: None)(1)\n",
    "app_misspells": "(1).reel\n",
    "app_names": "logto.on\n",
    "app_quotes": "raise TypeError('secret')\n",
    "app_exits": "import sys\nsys.exit('secret')\n",
    "app_broken": "def (:\n",
    "app_lacks": "import surely_no_module\n",
    "app_owner": "from logto_webhooks import LogtoWebhooks\n"
    "logto = LogtoWebhooks(signing_key='its own', database_url='sqlite:///its-own.db')\n",
    "app_looks": "from pathlib import Path\n"
    "from logto_webhooks import LogtoWebhooks, events\n"
    "logto = LogtoWebhooks.from_env()\n"
    "@logto.on(events.LocalUserCreated)\n"
    "async def looked(event):\n"
    "    user = await logto.wait_for_user(event.user.logto_user_id, 2)\n"
    "    Path('seen.txt').write_text(user.email)\n"
    "@logto.on(events.LocalUserUpdated)\n"
    "def called(event):\n"
    "    user = logto.call(logto.ensure_user({'sub': event.user.logto_user_id}))\n"
    "    Path('called.txt').write_text(user.name)\n",
    "app_both": "from logto_webhooks import LogtoWebhooks, events\n"
    "logto = LogtoWebhooks.from_env()\n"
    "def early(event):\n"
    "    user_id = event.user.logto_user_id\n"
    "    return logto.ensure_user({'sub': user_id if 'early' in user_id else 'early-' + user_id})\n"
    "@logto.on(events.LocalUserCreated, name='awaits')\n"
    "async def awaits(event):\n"
    "    await logto.status()\n"
    "    await early(event)\n"
    "@logto.on(events.LocalUserCreated, name='calls')\n"
    "def calls(event):\n"
    "    logto.call(logto.status())\n"
    "    logto.call(early(event))\n",
    "app_lacks_variable": "import os\nos.environ['LOGTO_WEBHOOK_SIGNING_KEY']\n",
    "app_lacks_key": "{}['SECRET']\n",
    "app_refused": "from logto_webhooks import LogtoWebhooks\n"
    "LogtoWebhooks.from_env().on('*', concurrency=0, name='all')(lambda event: None)\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With modules, whatever becomes of `sys.path`."""
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("app", "says"),
    [
        ("app_good", "module:name"),
        ("app_good:", "module:name"),
        (":logto", "module:name"),
        (".app_good:logto", "module:name"),
        ("app_good:a:b", "module:name"),
        ("app_good.py:logto", "there is no module"),
        ("./app_good:logto", "module:name"),
        ("nowhere:logto", "there is no module nowhere"),
        (
            "app_lacks:logto",
            "there is no module surely_no_module on the import path, which app_lacks",
        ),
        ("app_good:logto", "there is no logto in app_good."),
        ("app_good:inner", "isn't a LogtoWebhooks"),
        ("app_good:make", "isn't a LogtoWebhooks"),
        ("app_good:lgoto", "there is no lgoto in app_good."),
        ("app_looks:lgoto", "there is no lgoto in app_looks; did you mean app_looks:logto?"),
        ("app_looks:Path", "app_looks:Path isn't a LogtoWebhooks object; did you mean app_looks:l"),
        ("app_raises:logto", "ValueError at app_raises.py:1; run python -c 'import app_raises'"),
        ("app_exits:logto", "SystemExit"),
        (
            "app_lacks_variable:logto",
            "KeyError at app_lacks_variable.py:2: LOGTO_WEBHOOK_SIGNING_KEY isn't in the "
            "environment; .env isn't exported",
        ),
        ("app_lacks_key:logto", "KeyError at app_lacks_key.py:1; run python -c"),
        ("app_broken:logto", "SyntaxError at app_broken.py:1"),
        ("app_calls:logto", "TypeError at app_calls.py:1: <lambda>() takes 0 positional arg"),
        ("app_misspells:logto", "at app_misspells.py:1: 'int' object has no attribute 'reel'; run"),
        ("app_names:logto", "NameError at app_names.py:1: name 'logto' is not defined; run"),
        ("app_quotes:logto", "TypeError at app_quotes.py:1; run"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_no_application_is_refused(app: str, says: str) -> None:
    """Whatever it raises, which may quote a secret."""
    with pytest.raises(SettingInvalid) as raised:
        load_code(Settings(app=app))
    assert says in str(raised.value)
    assert "secret" not in str(raised.value).lower()


@pytest.mark.usefixtures("folder")
def test_an_application_is_found() -> None:
    """By the name of an attribute, or of one of an attribute's."""
    assert [each.name for each in load_code(Settings(app="app_good:inner.logto"))[0]] == ["all"]


@pytest.mark.usefixtures("folder")
def test_what_our_own_errors_say_is_kept() -> None:
    """A handler that is refused says why."""
    with pytest.raises(InvalidHandler, match="concurrency"):
        load_code(Settings(app="app_refused:logto"))


@pytest.mark.usefixtures("folder")
def test_one_that_reads_the_environment_has_the_commands_settings() -> None:
    """With its options and its `.env`; what the code gives stays."""
    settings = Settings(app="app_good:inner.logto", database_url="sqlite:///here.db")
    assert _of(settings).database.name == "here.db"
    settings = Settings(app="app_owner:logto", database_url="sqlite:///here.db")
    assert _of(settings).database.name == "its-own.db"


def test_an_applications_calls_see_what_its_handlers_do(folder: Path) -> None:
    """They look into the database that `.env` names, as `serve` does; `doctor` agrees."""
    (folder / ".env").write_text("LOGTO_WEBHOOKS_DATABASE_URL=sqlite:///elsewhere.db\n")
    with Service(folder, "--app", "app_looks:logto") as service:
        assert "app_looks:" in service.wait_for_log("registered handlers")
        service.post(make.user_created(id="ana", email="ana@example.com"))
        until(lambda: _text(folder / "seen.txt") == "ana@example.com", lambda: service.log)
        service.post(make.user_data_updated(id="ana", name="Ana"))
        until(lambda: _text(folder / "called.txt") == "Ana", lambda: service.log)
        told = command("doctor", "--app", "app_looks:logto", "--only", "application", folder=folder)
        assert told.returncode == 0, told.stdout
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert "Traceback" not in service.log


@pytest.mark.usefixtures("folder")
def test_another_database_than_the_applications_is_a_warning(tmp_path: Path) -> None:
    """At the start of `serve` and `worker`, as `doctor` says it."""
    own, read = ("--app", "app_owner:logto"), ("--app", "app_good:inner.logto")
    says = f"The application uses the database {tmp_path / 'its-own.db'}, but its handlers run on"
    fix = "Set LOGTO_WEBHOOKS_DATABASE_URL to the database that you pass"
    for options, count in ((own, 1), (read, 0)):
        with Service(tmp_path, *options) as service:
            assert (service.log.count(says), service.log.count(fix)) == (count, count)
        drained = command("worker", "--drain", *options, folder=tmp_path)
        assert (drained.stderr.count(says), drained.stderr.count(fix)) == (count, count)


def test_arguments_that_a_command_does_not_use_are_a_warning(folder: Path) -> None:
    """Above all the key. `worker` needs none; the same value, or the environment's, is fine."""
    (folder / "app_own.py").write_text(
        "import os\n"
        "from logto_webhooks import LogtoWebhooks\n"
        "logto = LogtoWebhooks(signing_key=os.environ.get('OWN_KEY', ''), lag_ms=250,\n"
        "    database_url='sqlite:///logto-webhooks.db')\n"
    )
    own = {"OWN_KEY": "a key of its own"}
    says = "have no effect here: signing_key, lag_ms. Set LOGTO_WEBHOOK_SIGNING_KEY, "
    refused = command("serve", "--app", "app_own:logto", folder=folder, **own)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert "of its own" not in refused.stderr
    with Service(folder, "--app", "app_own:logto", OWN_KEY=SIGNING_KEY) as service:
        assert "have no effect here: lag_ms. " in service.log
    drained = command("worker", "--drain", "--app", "app_own:logto", folder=folder, **own)
    assert "have no effect here: lag_ms. " in drained.stderr
    same = {"LOGTO_WEBHOOKS_LAG_MS": "250"}
    drained = command("worker", "--drain", "--app", "app_own:logto", folder=folder, **own, **same)
    assert "have no effect" not in drained.stderr


def test_its_calls_are_made_on_the_commands_loop(folder: Path) -> None:
    """Awaited and called, they share connections, which end with the command."""
    url = postgres.server_url().render_as_string(hide_password=False)
    options = ("--app", "app_both:logto", "--database-url", url)
    with Service(folder, *options, "--schema", postgres.emptied_schema()) as service:
        for number in range(5):
            service.post(make.user_created(id=f"u{number}"))
        until(lambda: service.log.count("INFO    a handler finished ") == 20, lambda: service.log)
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert "Traceback" not in service.log
        assert "a handler failed" not in service.log


def _of(settings: Settings) -> LogtoWebhooks:
    application = load_application(settings)
    assert application
    return application


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("app", ["app_exits:logto", "app_refused:logto"])
def test_a_command_ends_with_2_and_one_line(folder: Path, app: str) -> None:
    """And no traceback."""
    ended = command("serve", "--app", app, folder=folder, LOGTO_WEBHOOK_SIGNING_KEY=SIGNING_KEY)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
