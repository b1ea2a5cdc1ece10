"""`doctor`: each fault, on either side, is put into a healthy system and found, and no other."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import pytest

from logto_webhooks import canonical_json, errors
from logto_webhooks.doctor.checks import CHECKS
from logto_webhooks.doctor.faults import FAULTS, Finding, Level, exit_code
from logto_webhooks.errors import LogtoWebhooksError, SettingInvalid
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import log_entry
from tests.support import postgres
from tests.support.fake import credentials, proxy_of
from tests.support.healthy_system import OTHER_KEY, Clinic, Examine, bad, clinic
from tests.support.local_faults import HERE
from tests.support.logto_faults import THERE
from tests.support.service import command

PAGE = Path(__file__).parents[2] / "docs/troubleshooting.md"
SECRETS = ("hush", OTHER_KEY, "fake-logto-app-secret", "a-key-for-tests")
ELSEWHERE = {"clock_skew", "dates_differ", "api_missing"}  # found by tests of their own, below


ALL = HERE | THERE


def examined(folder: Path, examine: Examine, **given: Any) -> list[Finding]:
    async def main() -> list[Finding]:
        async with clinic(folder, **given) as healthy:
            return await examine(healthy)

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_healthy_system_has_nothing(kind: str, tmp_path: Path) -> None:
    """Every check looked, where there is something to look at."""
    given: dict[str, str] = {}
    if kind == "postgres":
        url = postgres.server_url().render_as_string(hide_password=False)
        given = {"database_url": url, "schema": postgres.emptied_schema()}
    findings = examined(tmp_path, lambda healthy: healthy.app.diagnose(), **given)
    left_out = {"vacuum"} if kind == "sqlite" else set[str]()
    assert [each.check for each in findings] == [
        each.name for each in CHECKS if each.name not in left_out
    ]
    unseen = {"application", "spool"} | ({"disk"} if kind != "sqlite" else set())
    assert {each.check for each in findings if each.level != Level.OK} == unseen
    assert exit_code(findings) == 0


def test_two_webhooks_with_different_events_are_no_fault(tmp_path: Path) -> None:
    """No delivery arrives twice."""

    async def examine(healthy: Clinic) -> list[Finding]:
        own = [hook for hook in healthy.logto.hooks if hook["id"] == healthy.webhook]
        users = [event for event in own[0]["events"] if event.startswith("User.")]
        others = [event for event in own[0]["events"] if event not in users]
        healthy.logto.add_hook(healthy.url, events=users, name="users")
        with healthy.changed(events=others):
            return await healthy.ask()

    assert "webhook_twice" not in bad(examined(tmp_path, examine))


def test_sqlite_has_no_vacuum(tmp_path: Path) -> None:
    """So nothing is said of it."""

    async def examine(healthy: Clinic) -> list[Finding]:
        return await healthy.ask("vacuum")

    assert {finding.check for finding in examined(tmp_path, examine)} == {"database"}


def test_what_failed_and_is_here_is_no_fault_for_long(tmp_path: Path) -> None:
    """Within the last hour it is told by its cause; later it is only counted."""

    async def failed(healthy: Clinic, minutes: int) -> Finding:
        then = time.time_ns() // 1_000_000 - minutes * 60_000
        made = make.user_created(at=then)
        async with httpx2.AsyncClient() as client:
            answer = await client.post(healthy.url, content=made.body, headers=dict(made.headers))
        assert answer.status_code == 200
        payload = canonical_json.decode(made.body) | {"hookId": healthy.webhook}
        logged = log_entry("failed", payload, then, None, "ECONNRESET")
        healthy.logto.populate_log(healthy.webhook, [logged])
        *_, finding = await healthy.ask("log")
        return finding

    async def both(healthy: Clinic) -> list[Finding]:
        return [await failed(healthy, 59), await failed(healthy, 61)]

    early, late = examined(tmp_path, both)
    assert early.code == "log_reset"
    assert late.text == "1 delivery failed, none within the last hour, and all were recovered."


def test_what_was_set_aside_is_no_fault_for_long(tmp_path: Path) -> None:
    """After a day it is only counted."""

    async def examine(healthy: Clinic) -> list[Finding]:
        assert bad(await ALL["a_delivery_that_another_key_signed"].examine(healthy)) == {"rejected"}
        healthy.sql("UPDATE logto_rejected SET received_at = received_at - 86400000")
        return await healthy.ask("rejected")

    *_, finding = examined(tmp_path, examine)
    assert (finding.level, finding.text) == (
        Level.OK,
        "1 request is quarantined, none in the last day.",
    )


@pytest.mark.parametrize("name", [name for name, each in ALL.items() if each.stays])
def test_a_fault_that_stays_is_found(name: str, tmp_path: Path) -> None:
    """Those codes and no others."""
    findings = examined(tmp_path, ALL[name].examine)
    assert bad(findings) == ALL[name].codes, findings
    assert all(well_told(each) for each in findings), findings


def test_faults_that_pass_are_found(tmp_path: Path) -> None:
    """Each in its turn, those codes and no others; and when they are over, nothing is left."""
    passing = {name: each for name, each in ALL.items() if not each.stays}
    wrong: dict[str, object] = {}

    async def all_of_them(healthy: Clinic) -> list[Finding]:
        for name, each in passing.items():
            findings = await each.examine(healthy)
            if bad(findings) != each.codes or not all(map(well_told, findings)):
                wrong[name] = bad(findings), findings
        return await healthy.ask()

    assert bad(examined(tmp_path, all_of_them)) == set()
    assert wrong == {}


def well_told(finding: Finding) -> bool:
    """It is said how bad it is, what to do, where more stands, and no secret."""
    told = str(msgspec.to_builtins(finding))
    if finding.code in FAULTS and not (
        finding.level == FAULTS[finding.code].level
        and finding.do
        and finding.docs == f"docs/troubleshooting.md#{finding.code}"
    ):
        return False
    return not any(secret in told for secret in SECRETS)


def test_clocks_that_differ(tmp_path: Path) -> None:
    """Are found by what Logto's answers say."""
    findings = examined(tmp_path, lambda healthy: healthy.ask(), ahead_ms=60_000)
    assert bad(findings) == {"clock_skew"}
    [skew] = [each.details["seconds"] for each in findings if each.code == "clock_skew"]
    assert 30 <= skew <= 60


@pytest.mark.parametrize("ahead_ms", [60_000, -60_000])
def test_a_date_that_deliveries_contradict(ahead_ms: int, tmp_path: Path) -> None:
    """Is found, in whichever direction it is wrong."""

    async def through_proxy(healthy: Clinic) -> list[Finding]:
        async with proxy_of(healthy.logto, lambda: ahead_ms) as url:
            return await healthy.ask("clock", endpoint=url)

    findings = examined(tmp_path, through_proxy)
    assert bad(findings) == {"clock_skew", "dates_differ"}
    [seconds] = [each.details["seconds"] for each in findings if each.code == "dates_differ"]
    assert 30 <= seconds <= 60


def test_without_credentials_this_side_is_looked_at(tmp_path: Path) -> None:
    """A key is proven by what came with it; it is said how credentials are made."""

    async def alone(healthy: Clinic) -> list[Finding]:
        none = {"endpoint": None, "app_id": None, "app_secret": None}
        return await healthy.ask(**none, public_url=healthy.url)

    findings = examined(tmp_path, alone)
    assert bad(findings) == set()
    [api] = [each for each in findings if each.check == "api"]
    assert (api.code, api.level) == ("api_missing", Level.SKIPPED)
    assert "Logto Management API access" in api.do
    looked = {each.check for each in findings if each.level == Level.OK}
    assert looked >= {"database", "key", "address", "inbox", "jobs", "records", "rejected"}


def test_without_a_url_it_looks_where_serve_listens(tmp_path: Path) -> None:
    """Nobody there is no fault: an application listens elsewhere."""

    async def alone(healthy: Clinic) -> list[Finding]:
        none = {"endpoint": None, "app_id": None, "app_secret": None, "public_url": None}
        here = urlsplit(healthy.url).port
        asked = [await healthy.ask("address", **none, port=port) for port in (here, 9)]
        return [each for told in asked for each in told if each.check == "address"]

    listening, quiet = examined(tmp_path, alone)
    assert (listening.level, quiet.level) == (Level.OK, Level.SKIPPED)
    assert "Nothing listens at http://127.0.0.1:9/" in quiet.text
    assert "LOGTO_WEBHOOKS_PUBLIC_URL" in listening.text


def test_a_disabled_webhook_has_a_url_all_the_same(tmp_path: Path) -> None:
    async def disabled(healthy: Clinic) -> list[Finding]:
        with healthy.changed(enabled=False):
            return await healthy.ask("address", public_url=None)

    [found] = [each for each in examined(tmp_path, disabled) if each.check == "address"]
    assert found.level == Level.OK


def test_some_checks_run_with_what_they_build_on(tmp_path: Path) -> None:
    """And a name that is none is answered with the nearest."""

    async def some(healthy: Clinic) -> list[Finding]:
        with pytest.raises(SettingInvalid, match="the closest is clock"):
            await healthy.ask("clok")
        with pytest.raises(SettingInvalid, match=r"use one of database, .*, application\.$"):
            await healthy.ask("zzz")
        return await healthy.ask("clock", "disk")

    findings = examined(tmp_path, some)
    assert [each.check for each in findings] == ["database", "disk", "api", "clock"]


def test_every_fault_of_the_table_is_found_by_a_test() -> None:
    """There are 25 at least."""
    found = {code for each in ALL.values() for code in each.codes}
    assert found | ELSEWHERE == set(FAULTS)
    assert len(found) >= 25


def test_every_check_is_told_of() -> None:
    """On the page about the command, in order."""
    page = (PAGE.parent / "commands/doctor.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [each.name for each in CHECKS]


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_fault_has_its_place_in_the_docs(name: str) -> None:
    """An anchor of its name, and words below it."""
    assert anchored(name)


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, LogtoWebhooksError)
    ),
)
def test_every_error_has_its_place_in_the_docs(name: str) -> None:
    """The same."""
    assert anchored(name)


def anchored(name: str) -> bool:
    return bool(re.search(rf"^### `{name}`\n\n\S", PAGE.read_text(), re.MULTILINE))


Run = Callable[..., Awaitable[subprocess.CompletedProcess[str]]]


def commanded(folder: Path, test: Callable[[Clinic, Run], Awaitable[None]]) -> None:
    """Run a test with the command, in the folder and with the settings of a healthy system."""

    async def main(healthy: Clinic) -> list[Finding]:
        async def run(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
            settings = credentials(healthy.logto) | {"DATABASE_URL": "sqlite:///app.db"} | changed
            return await asyncio.to_thread(command, "doctor", *words, folder=folder, **settings)

        await test(healthy, run)
        return []

    examined(folder, main)


def test_the_command_says_what_to_do(tmp_path: Path) -> None:
    """A line for each check, what to do below it, how many there are; exit codes 0 and 1."""

    async def test(healthy: Clinic, run: Run) -> None:
        well = await run()
        assert well.returncode == 0, well.stdout + well.stderr
        assert len(well.stdout.splitlines()) == len(CHECKS) + 1, "without vacuum"
        assert well.stdout.endswith("0 broken, 0 warnings, 2 checks skipped.\n")
        healthy.logto.add_hook(f"{healthy.url}/", name="\x1b[31mtwin")
        warned = await run("--only", "webhook, clock")
        assert warned.returncode == 1
        assert "! webhook: Several webhooks lead to" in warned.stdout
        assert "\n    docs/troubleshooting.md#webhook_twice\n" in warned.stdout
        assert "\x1b" not in warned.stdout

    commanded(tmp_path, test)


def test_the_command_prints_json(tmp_path: Path) -> None:
    """A list of findings, without a secret; exit code 2, for it is broken."""

    async def test(healthy: Clinic, run: Run) -> None:
        told = await run("--json", LOGTO_WEBHOOK_SIGNING_KEY=OTHER_KEY)
        assert told.returncode == 2
        findings = msgspec.json.decode(told.stdout)
        [key] = [each for each in findings if each["check"] == "key"]
        assert {name: key[name] for name in ("code", "level", "docs", "details")} == {
            "code": "key_differs",
            "level": "broken",
            "docs": "docs/troubleshooting.md#key_differs",
            "details": {"webhook": "the webhook"},
        }
        assert not any(secret in told.stdout for secret in SECRETS)

    commanded(tmp_path, test)


def test_the_command_knows_the_application(tmp_path: Path) -> None:
    """Its handlers are asked what they need, and whether its database is this one."""
    (tmp_path / "mine.py").write_text(
        "from logto_webhooks import LogtoWebhooks, events\n"
        "logto = LogtoWebhooks(signing_key='x', database_url='sqlite:///other.db')\n"
        "@logto.on('No.Such.Event', unknown=True)\n"
        "def hear(event): ...\n"
    )

    async def test(healthy: Clinic, run: Run) -> None:
        other = await run("--app", "mine:logto", "--only", "application,events", "--json")
        codes = {each["code"]: each["details"] for each in msgspec.json.decode(other.stdout)}
        assert codes["events_missing_handlers"] == {
            "handlers": ["mine:hear"],
            "events": ["No.Such.Event"],
        }
        assert codes["application_database"]["theirs"] == str(tmp_path / "other.db")
        assert other.returncode == 2
        same = await healthy.ask("application", application=healthy.app)
        assert [each.level for each in same] == [Level.OK]

    commanded(tmp_path, test)
