"""Looking at the inbox from a terminal: `deliveries`, `tail`, `explain`; real processes."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks.database import open_database
from logto_webhooks.samples.request import SignedRequest, sign_request
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.service import clean_environment, command, one_line
from tests.support.stores import Copy, delivery

T0 = 1_795_485_335_917
ANA = (
    make.user_created(id="ana", name="Ana", email="ana@example.com", at=T0),
    make.user_data_updated(id="ana", name="A\u009b31mnna", email="ana@example.com", at=T0 + 1000),
    make.organization_created(id="acme", name="Acme", at=T0 + 2000),
    make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=T0 + 3000),
    make.post_sign_in(id="ana", name="A\u009b31mnna", email="ana@example.com", at=T0 + 4000),
)


def keep(folder: Path, *sent: SignedRequest, applied: bool = True) -> None:
    """Put deliveries into the inbox, and apply them."""
    database = open_database(f"sqlite:///{folder / 'logto-webhooks.db'}")

    async def add() -> None:
        await database.open()
        if applied:
            await Copy(database.host).take([each.body for each in sent])
        else:
            new = [delivery(each.body) for each in sent]
            await database.host.run(lambda store: store.add(new))
        await database.host.close()

    asyncio.run(add())


def decoded(folder: Path, *arguments: str) -> Any:
    shown = command(*arguments, "--json", folder=folder)
    assert shown.returncode == 0, shown.stderr
    return msgspec.json.decode(shown.stdout)


class TestDeliveries:
    def test_a_list_is_a_line_each(self, tmp_path: Path) -> None:
        """The newest first; who finds more than the limit is told how to go on."""
        keep(tmp_path, *ANA)
        shown = command("deliveries", "list", "--limit", "2", folder=tmp_path)
        first, second = shown.stdout.splitlines()
        assert re.search(r" 5 .* applied +PostSignIn +user:ana +SignIn$", first)
        assert "organization:acme" in second
        assert "--after 4" in one_line(shown.stderr)
        rest = command("deliveries", "list", "--after", "4", folder=tmp_path)
        assert len(rest.stdout.splitlines()) == 3
        assert rest.stderr == ""

    def test_filters_are_combined(self, tmp_path: Path) -> None:
        """Event, state, subject, time, and text of the body; none found is exit code 1."""
        keep(tmp_path, *ANA)
        keep(tmp_path, make.user_created(id="bo"), applied=False)

        def ids(*options: str) -> list[int]:
            return [each["id"] for each in decoded(tmp_path, "deliveries", "list", *options)]

        assert ids("--state", "pending") == [6]
        assert ids("--subject", "user:ana", "--oldest-first") == [1, 2, 5]
        assert ids("--text", "ana@example.com", "--event", "PostSignIn") == [5]
        assert len(ids("--since", "2026-11-24T00:00Z", "--until", "2026-11-25T00:00Z")) == 6
        nothing = command("deliveries", "list", "--until", "2026-11-01", folder=tmp_path)
        assert (nothing.returncode, nothing.stdout) == (1, "")
        assert "No deliveries found" in one_line(nothing.stderr)

    def test_json_has_its_documented_shape(self, tmp_path: Path) -> None:
        """The body only of one."""
        keep(tmp_path, ANA[0])
        [listed] = decoded(tmp_path, "deliveries", "list")
        shown = decoded(tmp_path, "deliveries", "show", "1")
        body = shown.pop("body")
        assert body == msgspec.json.decode(ANA[0].body)
        assert (
            listed
            == shown
            == {
                "id": 1,
                "event": "User.Created",
                "subject": "user:ana",
                "occurred_at": "2026-11-24T01:55:35.917Z",
                "received_at": "2026-11-24T01:55:35.924Z",
                "origin": "webhook",
                "state": "done",
                "result": "applied",
                "attempts": 1,
                "error": None,
                "call": "POST /users",
            }
        )

    def test_one_is_shown_with_its_body(self, tmp_path: Path) -> None:
        """And nothing in it steers the terminal."""
        keep(tmp_path, *ANA)
        shown = command("deliveries", "show", "2", folder=tmp_path)
        assert '"name": "A\\x9b31mnna"' in shown.stdout
        assert "PATCH /users/:userId" in shown.stdout
        encoded = command("deliveries", "show", "2", "--json", folder=tmp_path).stdout
        assert "\\u009b31mnna" in encoded
        assert "\x9b31mnna" in msgspec.json.decode(encoded)["body"]["data"]["name"]
        missing = command("deliveries", "show", "77", folder=tmp_path)
        assert missing.returncode == 1
        assert "77" in one_line(missing.stderr)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["list", "--since", "yesterday"], "--since"),
            (["list", "--until", "soon"], "--until"),
            (["list", "--subject", "ana"], "user:ID"),
            (["list", "--text", "\udcff"], "UTF-8"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path: Path, options: list[str], says: str) -> None:
        """And exit code 2."""
        refused = command("deliveries", *options, folder=tmp_path)
        assert refused.returncode == 2
        assert says in one_line(refused.stderr)


LATER = sign_request({"event": "User.Craeted", "createdAt": "2026-11-24T03:18:31Z"}, SIGNING_KEY)


class TestUnknownEvents:
    """A newer Logto may have sent one, so it is only a warning, and only if nothing is found."""

    def test_nothing_is_found(self, tmp_path: Path) -> None:
        """With the nearest that is known."""
        keep(tmp_path, ANA[0], LATER)
        options = ("deliveries", "list", "--event")
        assert command(*options, "User.Craeted", folder=tmp_path).stderr == ""
        assert one_line(command(*options, "PostRegister", folder=tmp_path).stderr)
        none, warning = command(*options, "User.Creatd", folder=tmp_path).stderr.splitlines()
        assert none == "No deliveries found."
        assert warning.startswith("warning: this release doesn't know the event 'User.Creatd'")
        assert warning.endswith("the closest is User.Created.")

    def test_one_is_waited_for(self, tmp_path: Path) -> None:
        """Told at the start."""
        keep(tmp_path, LATER)
        options = ("--event", "User.Craeted", "--since-id", "0", "--count", "1")
        shown = command("tail", *options, folder=tmp_path)
        assert shown.returncode == 0
        assert shown.stderr.startswith(
            "warning: this release doesn't know the event 'User.Craeted'"
        )


class TestTail:
    def test_it_shows_what_comes(self, tmp_path: Path) -> None:
        """From the newest on, as long as it takes; Ctrl-C ends it, with 130."""
        keep(tmp_path, *ANA[:2])
        tail = started(tmp_path, "--json")
        assert tail.stdout
        assert tail.stderr
        assert "ID 2" in tail.stderr.readline()
        keep(tmp_path, *ANA[2:4])
        assert [msgspec.json.decode(tail.stdout.readline())["id"] for _ in range(2)] == [3, 4]
        keep(tmp_path, ANA[4])
        last = msgspec.json.decode(tail.stdout.readline())
        assert (last["event"], last["call"], "body" in last) == ("PostSignIn", "SignIn", False)
        tail.send_signal(signal.SIGINT)
        assert tail.wait(60) == 130
        assert tail.communicate() == ("", "")

    def test_it_begins_where_it_is_told(self, tmp_path: Path) -> None:
        """And ends after so many."""
        keep(tmp_path, *ANA)
        options = ["--since-id", "1", "--subject", "user:ana", "--count", "2"]
        shown = command("tail", *options, folder=tmp_path)
        assert shown.returncode == 0
        assert [line.split()[0] for line in shown.stdout.splitlines()] == ["2", "5"]


class TestExplain:
    def test_a_life_and_its_fields(self, tmp_path: Path) -> None:
        """A line for each delivery, and who set each field, found as people are."""
        keep(tmp_path, *ANA)
        shown = command("explain", "user", "ANA@example.com", folder=tmp_path)
        title, *lines = shown.stdout.splitlines()
        assert title == "user ana"
        assert [line.split()[0] for line in lines[:4]] == ["1", "2", "4", "5"]
        assert "set: name, updated_at" in lines[1]
        assert "set: organizations.acme" in lines[2]
        assert re.search(r"name +A\\x9b31mnna +2 PATCH /users/:userId +5 SignIn", "\n".join(lines))

    def test_one_field_as_json(self, tmp_path: Path) -> None:
        """Only the lines that say something about it; times as ISO 8601."""
        keep(tmp_path, *ANA)
        told = decoded(tmp_path, "explain", "user", "ana", "--field", "last_sign_in_at")
        [line], [field] = told.pop("lines"), told.pop("fields")
        assert told == {"kind": "user", "id": "ana"}
        assert (line["id"], line["outcome"], line["stale"]) == (5, "applied", [])
        assert field["value"] == line["occurred_at"] == "2026-11-24T01:55:39.917Z"
        assert field["set_by"] == {
            "id": 5,
            "event": "PostSignIn",
            "call": "SignIn",
            "occurred_at": "2026-11-24T01:55:39.917Z",
        }

    def test_an_organization_has_members(self, tmp_path: Path) -> None:
        """As fields of it."""
        keep(tmp_path, *ANA)
        told = decoded(tmp_path, "explain", "organization", "Acme", "--field", "members")
        assert [(each["name"], each["value"]) for each in told["fields"]] == [("members.ana", True)]
        assert [line["id"] for line in told["lines"]] == [4]

    def test_nothing_is_told_as_such(self, tmp_path: Path) -> None:
        """Without a table; and no line ends in blanks."""
        keep(tmp_path, *ANA[:3])
        options = ("explain", "organization", "Acme")
        none = command(*options, "--field", "members", folder=tmp_path).stdout
        assert none.endswith("\nCurrent values: none\n")
        shown = command(*options, folder=tmp_path).stdout
        assert "name " in shown
        assert not re.search(r" $", shown, re.MULTILINE)

    def test_what_is_only_pending_is_told(self, tmp_path: Path) -> None:
        """By its Logto id, for it has no row yet."""
        keep(tmp_path, *ANA, applied=False)
        told = decoded(tmp_path, "explain", "user", "ana")
        assert {line["outcome"] for line in told["lines"]} == {"pending"}
        assert told["fields"] == []

    def test_nobody_and_several_are_told_apart(self, tmp_path: Path) -> None:
        """Exit codes 1 and 2, a line each."""
        keep(tmp_path, *ANA, make.user_created(id="bo", at=T0))
        nobody = command("explain", "user", "nobody", folder=tmp_path)
        assert nobody.returncode == 1
        assert "'nobody'" in one_line(nobody.stderr)
        several = command("explain", "user", "example.com", folder=tmp_path)
        assert several.returncode == 2
        says = "several records match; see `logto-webhooks users example.com`, and use an ID."
        assert says in one_line(several.stderr)
        unknown = command("explain", "user", "ana", "--field", "mail", folder=tmp_path)
        assert unknown.returncode == 2
        assert "email" in one_line(unknown.stderr)


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "logto_webhooks", "tail", *options],
        cwd=folder,
        env=clean_environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments",
    [["deliveries", "list"], ["deliveries", "show", "1"], ["tail"], ["explain", "user", "x"]],
)
def test_without_a_database_it_says_what_to_run(tmp_path: Path, arguments: list[str]) -> None:
    """And makes none."""
    refused = command(*arguments, folder=tmp_path)
    assert refused.returncode == 2
    assert "logto-webhooks serve or migrate creates it" in one_line(refused.stderr)
    assert list(tmp_path.iterdir()) == []
