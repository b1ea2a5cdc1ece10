"""Whatever goes wrong in a command is one line, and never a traceback."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from logto_webhooks import canonical_json
from logto_webhooks.doctor.faults import make_finding
from logto_webhooks.errors import (
    REPORT,
    ServiceUnreachable,
    SettingInvalid,
    StoreUnavailable,
    describe,
)
from logto_webhooks.testing import make
from tests.support.service import Service, clean_environment, command, one_line

PROGRAM = (sys.executable, "-m", "logto_webhooks")


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which `$L` is the program."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=folder,
        env=clean_environment({"L": " ".join(PROGRAM)} | environment),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["jobs", "show", "x"],
            "'id': it must be a whole number. See: logto-webhooks jobs show --help",
        ),
        (["users", "--limit", "0"], "'--limit': it must be at least 1. See: "),
        (["endpoint", "test", "--timeout", "x"], "'--timeout': it must be a number. See: "),
        (
            ["jobs", "list", "--state", "x"],
            "'--state': 'x' is not one of 'waiting', 'done', 'dead', ",
        ),
        (["users", "--nosuch"], "No such option: --nosuch"),
        (["nosuch"], "No such command 'nosuch'. See: logto-webhooks --help"),
        (["explain", "user"], "Missing argument 'query'. See: logto-webhooks explain user --help"),
        (["explain", "user", "a", "b"], "unexpected extra argument"),
        (["serve", "--port"], "'--port' requires an argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path: Path, words: list[str], says: str) -> None:
    """With where the help is; with --debug, too."""
    for debug in ([], ["--debug"]):
        ended = command(*words, *debug, folder=tmp_path)
        assert ended.returncode == 2
        line = one_line(ended.stderr)
        assert line.startswith("error: ")
        assert says in line


def test_a_group_without_a_command_shows_its_help(tmp_path: Path) -> None:
    """As it is."""
    ended = command("jobs", folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Usage: logto-webhooks jobs ")


def test_a_message_of_somebody_else_brings_no_second_full_stop() -> None:
    """Nor is what has more of them, or a path, changed."""
    error = ServiceUnreachable(url="http://127.0.0.1:1", problem="The server closed.")
    assert str(error).startswith("Can't reach http://127.0.0.1:1: The server closed. Check that ")
    finding = make_finding("api_unreachable", endpoint="http://127.0.0.1:1", problem="It closed.")
    assert finding.text == "Can't reach Logto at http://127.0.0.1:1: It closed."
    kept = SettingInvalid(name="../x", problem="wait... see ../y")
    assert str(kept) == "../x can't be used: wait... see ../y."


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("$L migrate --sql > /dev/full", 2, "No space left on device"),
        ("$L status >&-", 2, "doesn't exist"),
        ("$L status 2>&- >&-", 2, ""),
        ("$L status 2> /dev/full", 2, ""),
        ("$L doctor | cat", 2, ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $L doctor", 2, ""),
        ("PYTHONIOENCODING=latin-1 $L doctor", 2, ""),
        ("head -c 999 /dev/urandom > .env; $L status", 2, "UTF-8"),
        ("mkdir .env; $L status", 2, "Is a directory"),
        ("$L status --database-url sqlite:///.", 2, "can't be used"),
        ("$L users $'\\xff\\xfe'", 2, ""),
        ("mkdir gone; cd gone; rmdir ../gone; $L status", 2, ""),
        ("$L migrate > /dev/null; $L status --limit 99999999999999999999999", 2, "the limit"),
        ("$L sign --signing-key 0123456789abcdef . < /dev/null", 2, "is a directory"),
    ],
)
def test_odd_surroundings(tmp_path: Path, line: str, code: int, says: str) -> None:
    """Of output, files, encodings, arguments and numbers."""
    ended = shell(line, tmp_path)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    for word in ("Traceback", "unexpected", "Exception ignored"):
        assert word not in ended.stderr


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """Nothing else gets their numbers, which uvloop can't close; and there is nothing to read."""
    assert shell("$L migrate", tmp_path).returncode == 0
    for line in (f"$L status {closed}", f"$L sign --signing-key 0123456789abcdef {closed}"):
        ended = shell(line, tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert bool(ended.stdout) == (" >&-" not in closed)
        assert "unexpected" not in ended.stderr


def test_a_service_without_streams_stops(tmp_path: Path) -> None:
    """As it does with them."""
    with Service(tmp_path, prefix="""sh -c 'exec "$@" <&- >&-' sh""") as service:
        assert service.post(make.user_created()).status_code == 200
        service.process.terminate()
        assert service.process.wait(20) == 0


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """As of `| head`; nothing is said."""
    ended = shell("$L migrate --sql | head -1 > /dev/null; echo ${PIPESTATUS[0]}", tmp_path)
    assert ended.stderr == ""
    assert ended.stdout.strip() in ("0", "141")  # what it printed may fit into the pipe


STATUS = """
import sys
from logto_webhooks.__main__ import main
print("started", flush=True)
sys.argv = ["logto-webhooks", "status"]
main()
"""


def test_ctrl_c_at_any_moment(tmp_path: Path) -> None:
    """While it imports, opens, works or ends: nothing but an exit code."""
    assert command("migrate", folder=tmp_path).returncode == 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", STATUS],
            cwd=tmp_path,
            env=clean_environment({}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Before that, Python itself writes a traceback: it is still importing the package.
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(random.random())
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert "Traceback" not in said
        assert process.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize("debug", [False, True])
def test_what_nobody_foresaw_says_where_to_report_it(tmp_path: Path, debug: bool) -> None:
    """In one line with its kind, and nothing of what it says; with --debug, the traceback."""
    code = (
        "from logto_webhooks.cli import errors\n"
        "def fails(): raise ExceptionGroup('of tasks', [KeyError('s-e-c-r-e-t')])\n"
        f"errors.run(fails, debug={debug})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    if debug:
        assert ended.returncode == 1
        assert "Traceback" in ended.stderr
        assert "s-e-c-r-e-t" in ended.stderr
        return
    assert ended.returncode == 2
    assert one_line(ended.stderr).startswith(f"error: unexpected KeyError; {REPORT}")
    assert "s-e-c-r-e-t" not in ended.stderr


def test_debug_may_stand_anywhere(tmp_path: Path) -> None:
    """Before the command and behind it; what can be mended is one line all the same."""
    for words in (("--debug", "status"), ("status", "--debug")):
        assert "doesn't exist" in one_line(command(*words, folder=tmp_path).stderr)


def test_a_loop_that_caught_it_says_where_to_report_it() -> None:
    """With the place in this package's code; an error that is known says only what it says."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        canonical_json.decode(b"{")
    told = describe(raised.value)
    assert re.fullmatch(rf"unexpected \w+ at canonical_json:\d+; {REPORT}", told)
    assert REPORT not in describe(StoreUnavailable(problem="it is away"))
