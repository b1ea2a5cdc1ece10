"""Looking at handlers and jobs, and moving jobs by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks.database import open_database
from logto_webhooks.database.store import Store
from logto_webhooks.jobs import JobOutcome, JobState, NewJob, RegisteredHandler
from logto_webhooks.testing import make
from tests.pages import tree
from tests.support.service import command, one_line
from tests.support.stores import delivery


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A database with a dead job, one that waits, and one of a handler that nobody registered."""
    assert command("migrate", folder=tmp_path).returncode == 0
    write(tmp_path, fill)
    return tmp_path


def write(folder: Path, work: Callable[[Store], None]) -> None:
    database = open_database(f"sqlite:///{folder / 'logto-webhooks.db'}")
    asyncio.run(database.host.run(work))
    asyncio.run(database.host.close())


def fill(store: Store) -> None:
    store.jobs.register([RegisteredHandler(name="app:greet", patterns=("User.Created", "Local*"))])
    store.jobs.add([job("a", "app:greet", "ana"), job("b", "app:greet", "bo"), job("c", "old:x")])
    error = f"Traceback\n  somewhere {'far ' * 30}away\nValueError: of no use"
    finish_one(store, state=JobState.DEAD, error=error, failed=True)


def receive(folder: Path, *bodies: bytes) -> None:
    def add(store: Store) -> None:
        store.add([delivery(body) for body in bodies])

    write(folder, add)


def finish_one(store: Store, **outcome: Any) -> None:
    [held] = store.jobs.claim("t", {"app:greet": 1}, 60)
    store.jobs.finish("t", [JobOutcome(id=held.id, queue_key_id=held.queue_key_id, **outcome)])


def job(key: str, handler: str, user: str = "ana") -> NewJob:
    subject = f"user:{user}"
    return NewJob(
        handler=handler,
        key=key,
        event="User.Created",
        subject=subject,
        queue_key=subject,
        occurred_at=1,
        payload=b"{}",
    )


def said(folder: Path, *arguments: str, code: int = 0) -> str:
    done = command(*arguments, folder=folder)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def told(folder: Path, *arguments: str) -> Any:
    return msgspec.json.decode(said(folder, *arguments, "--json"))


def test_handlers_are_listed_with_their_jobs(folder: Path) -> None:
    """Those nobody registered, too."""
    greet, old = told(folder, "handlers", "list")
    assert (greet["handler"], greet["waiting"], greet["dead"]) == ("app:greet", 1, 1)
    assert (old["handler"], old["events"], old["waiting"]) == ("old:x", "not registered", 1)
    assert "Local*" in said(folder, "handlers", "list")


def test_a_handler_is_forgotten(folder: Path) -> None:
    """What waits for it is discarded; one that isn't there is said so."""
    assert "discarded 1 job" in said(folder, "handlers", "forget", "app:greet")
    [dead] = told(folder, "jobs", "list", "--handler", "app:greet", "--state", "dead")
    assert dead["error"].endswith("of no use")
    assert "There is no handler named" in one_line(said(folder, "handlers", "forget", "no", code=1))


def test_jobs_are_listed_and_shown(folder: Path) -> None:
    """By filter, page by page, by error; one with its traceback."""
    assert len(told(folder, "jobs", "list")) == 3
    assert len(told(folder, "jobs", "list", "--subject", "user:bo")) == 1
    first = command("jobs", "list", "--limit", "1", "--json", folder=folder)
    assert "--after" in first.stderr
    [last] = msgspec.json.decode(first.stdout)
    assert len(told(folder, "jobs", "list", "--after", str(last["id"]))) == 2
    groups = told(folder, "jobs", "list", "--group")
    assert {(each["error"], each["jobs"]) for each in groups if each["state"] == "dead"} == {
        ("ValueError: of no use", 1)
    }
    [dead] = told(folder, "jobs", "list", "--state", "dead")
    printed = said(folder, "jobs", "show", str(dead["id"]))
    assert f"\n  somewhere {'far ' * 30}away\nValueError: of no use\n" in printed, "unfolded"
    assert "no job with the ID 99" in one_line(said(folder, "jobs", "show", "99", code=1))


@pytest.mark.parametrize("name", ["retry", "discard"])
def test_without_a_selection_it_says_how_to_make_one(folder: Path, name: str) -> None:
    """And does nothing."""
    line = one_line(said(folder, "jobs", name, code=2))
    assert line == "error: Pass job IDs, or --handler NAME for all its dead jobs."


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--delivery", "99"], []),
        (["--event", "PostSignIn"], []),
        (
            ["--event", "Foo"],
            ["this release doesn't know the event 'Foo'; use one of PostRegister"],
        ),
        (["--event", "LocalUserCreate"], ["the closest is LocalUserCreated."]),
        (["--group", "--handler", "app:gret"], ["app:greet (did you mean this?)"]),
        (
            ["--handler", "nope"],
            ["There is no handler named 'nope'. Known handlers: app:greet, old:x."],
        ),
        (["--handler", "app:greet", "--state", "done"], []),
    ],
)
def test_no_job_is_found(folder: Path, options: list[str], says: list[str]) -> None:
    """A name that nothing has is a warning."""
    first, *warnings = said(folder, "jobs", "list", *options, code=1).splitlines()
    assert first == "No jobs found."
    assert len(warnings) == len(says)
    for warning, text in zip(warnings, says, strict=True):
        assert warning.startswith("warning: ")
        assert text in warning


@pytest.mark.parametrize(
    ("options", "retried"),
    [(["1", "2"], "2 of 2 jobs"), (["--handler", "app:greet", "--state", "done"], "1 of 1 job")],
)
def test_a_job_that_is_done_runs_again(folder: Path, options: list[str], retried: str) -> None:
    """By ID or by state. The note tells it from those that are dead."""
    write(folder, lambda store: finish_one(store, state=JobState.DONE))
    states = {job["id"]: job["state"] for job in told(folder, "jobs", "list")}
    assert states == {1: "dead", 2: "done", 3: "waiting"}
    done = command("jobs", "retry", *options, folder=folder)
    assert done.stdout == f"{retried} queued for retry.\n"
    assert done.stderr == "1 job was already done and runs again.\n"


def test_dead_jobs_are_repeated_or_discarded(folder: Path) -> None:
    """By id or by handler; what can't be moved is said so."""
    [dead] = told(folder, "jobs", "list", "--state", "dead")
    assert "1 of 1 job queued for retry" in said(folder, "jobs", "retry", str(dead["id"]))
    [again] = [each for each in told(folder, "jobs", "list") if each["id"] == dead["id"]]
    assert (again["state"], again["runs"]) == ("waiting", 1)
    options = ("--handler", "app:greet", "--state", "waiting")
    assert "2 of 2 jobs discarded" in said(folder, "jobs", "discard", *options)
    none = one_line(said(folder, "jobs", "discard", *options, code=1))
    assert none == "app:greet has no waiting jobs: none discarded."
    assert "--handler" in one_line(said(folder, "jobs", "retry", code=2))
    number = str(dead["id"])
    assert "already discarded" in said(folder, "jobs", "discard", number, number, code=1)
    assert "ID: 98, 99." in one_line(said(folder, "jobs", "retry", number, "98", "99", code=1))
    assert "either" in one_line(said(folder, "jobs", "retry", number, *options[:2], code=2))
    assert "app:greet (did" in one_line(
        said(folder, "jobs", "retry", "--handler", "app:gret", code=2)
    )


def test_jobs_are_counted(folder: Path) -> None:
    """By state; what waits for a handler that nobody registered is told apart."""
    status = told(folder, "status")
    assert status["jobs"] == {"waiting": 2, "done": 0, "dead": 1, "discarded": 0}
    assert status["unrunnable"] == {"old:x": 1}
    printed = " ".join(said(folder, "status").split())
    assert "jobs dead 1" in printed
    assert "Jobs of unregistered handlers handler jobs old:x 1" in printed


def test_deliveries_are_replayed(tmp_path: Path) -> None:
    """A dry run tells what would differ; then they are applied again, with their jobs."""
    command("migrate", folder=tmp_path)
    at = time.time_ns() // 1_000_000 + 1_000  # after the installation
    old = make.user_created(id="ana", email="ana@example.com", at=at).body
    dead = make.user_created(id="bo", at=at).body.replace(b'"createdAt"', b'"never"', 1)

    def filled(store: Store) -> None:
        store.jobs.register([RegisteredHandler(name="app:greet", patterns=("User.Created",))])
        store.add([delivery(old), delivery(dead)])

    write(tmp_path, filled)
    command("worker", "--drain", folder=tmp_path)
    assert told(tmp_path, "deliveries", "replay", "1", "--dry-run")["drifts"] == []
    assert told(tmp_path, "deliveries", "replay", "1", "--sync-only")["jobs"] == 0
    [job] = told(tmp_path, "jobs", "list")
    said(tmp_path, "jobs", "discard", str(job["id"]))
    assert told(tmp_path, "deliveries", "replay", "1", "--dry-run")["jobs"] == 1
    done = told(tmp_path, "deliveries", "replay", "1", "2")
    assert (done["deliveries"], done["jobs"]) == (2, 1)
    listed = {each["id"]: each["state"] for each in told(tmp_path, "deliveries", "list")}
    assert listed == {1: "pending", 2: "pending"}
    [job] = told(tmp_path, "jobs", "list")
    assert (job["state"], job["runs"]) == ("waiting", 1)
    command("worker", "--drain", folder=tmp_path)
    listed = {each["id"]: each["state"] for each in told(tmp_path, "deliveries", "list")}
    assert listed == {1: "done", 2: "dead"}
    assert len(told(tmp_path, "jobs", "list")) == 1
    replay = ("deliveries", "replay")
    assert "ID: 8, 9." in one_line(said(tmp_path, *replay, "1", "8", "9", code=1))
    assert "app:greet" in one_line(said(tmp_path, *replay, "1", "--handler", "greet", code=2))


def test_a_job_that_waits_for_a_row_has_no_failure(folder: Path) -> None:
    """Its reason has a title of its own."""
    reason = "The job waits for its row in users: email is NOT NULL, but Logto has no value."
    write(folder, lambda store: finish_one(store, state=JobState.WAITING, error=reason, after_s=60))
    [waiting] = [row for row in told(folder, "jobs", "list") if row["error"] == reason]
    printed = said(folder, "jobs", "show", str(waiting["id"]))
    assert f"What it waits for\n{reason}" in printed
    assert "failure\n" not in printed


def test_deliveries_are_selected_to_be_replayed(tmp_path: Path) -> None:
    """With the options of `deliveries list`; a dry run tells how many there are."""
    command("migrate", folder=tmp_path)
    at = time.time_ns() // 1_000_000 + 1_000
    sent = [make.user_created(id=name, at=at).body for name in ("ana", "bo")]
    sent.append(make.user_data_updated(id="ana", name="Anna", at=at + 1000).body)
    receive(tmp_path, *sent)
    command("worker", "--drain", folder=tmp_path)

    def registered(store: Store) -> None:
        store.jobs.register([RegisteredHandler(name="app:greet", patterns=("User.*",))])

    write(tmp_path, registered)
    replay = ("deliveries", "replay")
    dry = command(*replay, "--subject", "user:ana", "--dry-run", folder=tmp_path)
    assert one_line(dry.stderr) == "2 deliveries match."
    assert [line.split()[-1] for line in dry.stdout.splitlines()] == ["2", "2"]
    said(tmp_path, "jobs", "list", code=1)
    assert told(tmp_path, *replay, "--event", "User.Created", "--text", '"bo"')["jobs"] == 1
    assert told(tmp_path, *replay, "--state", "pending", "--after", "1") == {
        "deliveries": 1,
        "jobs": 0,
        "drifts": [],
    }
    assert told(tmp_path, *replay, "--since", "2020-01-01", "--handler", "app:greet")["jobs"] == 2
    none = said(tmp_path, *replay, "--event", "User.Creatd", code=1).splitlines()
    assert none[0] == "No deliveries found."
    assert "the closest is User.Created" in none[1]
    both = one_line(said(tmp_path, *replay, "1", "--state", "dead", code=2))
    assert both == "error: Pass either delivery IDs, or options that select deliveries."
    neither = one_line(said(tmp_path, *replay, "--rerun", code=2))
    assert "Pass delivery IDs, or options that select deliveries, such as --state" in neither
    assert "--since can't be used" in one_line(said(tmp_path, *replay, "--since", "x", code=2))


def test_a_replay_selects_as_a_list_does() -> None:
    """Whatever can be listed can be replayed, with the same words."""
    listed, replayed = (tree.COMMANDS["deliveries", name].params for name in ("list", "replay"))
    words = {each.name: (each.opts, each.help) for each in replayed}
    of_a_page = {"limit", "oldest_first", "after"}
    for option in listed:
        if option.name not in of_a_page:
            assert words[option.name] == (option.opts, option.help)


def test_why_a_handler_asks_for_a_retry_is_shown(tmp_path: Path) -> None:
    """`RetryLater` has a reason, and no traceback hides it."""
    command("migrate", folder=tmp_path)
    (tmp_path / "app.py").write_text(
        "from logto_webhooks import LogtoWebhooks, RetryLater\n"
        "logto = LogtoWebhooks.from_env()\n"
        "@logto.on('User.Created', name='wait')\n"
        "def wait():\n"
        "    raise RetryLater('no email yet', after_s=3600)\n"
    )
    at = time.time_ns() // 1_000_000 + 1_000
    body = make.user_created(id="ana", at=at).body
    receive(tmp_path, body)
    drained = command("worker", "--drain", "--app", "app:logto", folder=tmp_path)
    assert drained.returncode == 0, drained.stderr
    shown = said(tmp_path, "jobs", "show", "1")
    assert "\nWhy it asked for a retry\n" in shown
    assert shown.endswith("RetryLater: asked for a retry in 3600 s: no email yet\n")
    assert "asked for a retry: no email yet" in said(tmp_path, "jobs", "list")
    [job] = told(tmp_path, "jobs", "list")
    assert (job["state"], job["failures"], job["due_at"] is not None) == ("waiting", 1, True)
