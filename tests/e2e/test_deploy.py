"""Deploying: the image's steps are run without Docker; what files and the page name is there."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from logto_webhooks.runtime import LONGEST_STOP_S
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.server import GRACE_S, KEEP_ALIVE_S
from logto_webhooks.settings import Settings
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import container, names_in_docs
from tests.support.container import Container, Instruction
from tests.support.servers import free_port
from tests.support.service import PATH
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
UNIT = ROOT / "deploy" / "logto-webhooks.service"
PAGE = ROOT / "docs" / "how-to" / "deploy.md"
BUILD, IMAGE = container.stages(DOCKERFILE)
COMPOSE_FILE = ROOT / "compose.yaml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
OURS = ("migrate", "receiver", "worker")
USER = container.only(IMAGE, "USER").text
STOP_S = GRACE_S + LONGEST_STOP_S + 5


def environment() -> dict[str, str]:
    """The image's."""
    given = dict(each.split("=", 1) for each in container.only(IMAGE, "ENV").text.split())
    return given | {"PATH": given["PATH"].replace("$PATH", "/usr/bin:/bin")}


def services() -> Iterator[tuple[str, Any]]:
    return ((name, COMPOSE["services"][name]) for name in OURS)


class Unit(configparser.ConfigParser):
    """systemd's: names are case-sensitive; of those that are there several times, the last."""

    def __init__(self) -> None:
        super().__init__(strict=False, interpolation=None)
        self.read(UNIT)

    def optionxform(self, optionstr: str) -> str:
        return optionstr


class Running:
    """The image's own command, in a root of its own."""

    def __init__(self, image: Container, log: Path) -> None:
        self.image = image
        self.port = free_port()
        self._log = log
        entry, command = (container.only(IMAGE, each).words for each in ("ENTRYPOINT", "CMD"))
        loopback = ["127.0.0.1" if each == "0.0.0.0" else each for each in command]
        self.settings = {
            "LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY,
            "LOGTO_WEBHOOKS_PORT": str(self.port),
        }
        with log.open("wb") as file:
            self.process = image.start(*entry, *loopback, more=self.settings, log=file)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def is_healthy(self) -> bool:
        """What the image's health check says."""
        check = container.only(IMAGE, "HEALTHCHECK").words
        return self.image.run(*check, more=self.settings).returncode == 0

    def ready(self) -> int:
        """What /readyz answers."""
        return self._request("GET", "/readyz")

    def listens(self) -> bool:
        assert self.process.poll() is None, self.log
        return "listening on" in self.log

    def post(self, delivery: SignedRequest) -> int:
        return self._request("POST", PATH, delivery.body, dict(delivery.headers))

    def _request(self, method: str, path: str, *sent: Any) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, *sent)
        status = connection.getresponse().status
        connection.close()
        return status


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """Built as the Dockerfile says, of what it copies, but with the packages that are here."""
    if not container.possible():
        pytest.skip("needs Linux, and root or user namespaces")
    folder = tmp_path_factory.mktemp("image")
    source, wheels = folder / "src", folder / "root" / "dist"
    copy_what_is_copied(BUILD, source)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*pip, *build, "--wheel-dir", wheels, source], check=True)
    [wheel] = wheels.iterdir()
    made = Container(folder / "root", USER, environment())
    install = ["-q", "--no-index", "--no-deps", "--no-cache-dir", "-I"]
    for words in (
        [made.python, "-m", "venv", "--without-pip", "/app"],
        ["/app/bin/python", "-m", "pip", "install", *install, f"/dist/{wheel.name}"],
    ):
        done = made.run(*words, build=True, more={"PYTHONPATH": made.packages})
        assert done.returncode == 0, done.stderr
    [packages] = (made.root / "app" / "lib").glob("python*/site-packages")
    (packages / "here.pth").write_text(made.packages)
    return made


@pytest.fixture
def running(image: Container, tmp_path: Path) -> Iterator[Running]:
    started = Running(image, tmp_path / "log")
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.wait()


def copy_what_is_copied(stage: list[Instruction], folder: Path) -> None:
    """As COPY does; what .dockerignore leaves out isn't there to be copied."""
    let_in = [each[1:] for each in (ROOT / ".dockerignore").read_text().split() if each[0] == "!"]
    folder.mkdir()
    for each in stage:
        if each.name == "COPY":
            *names, target = each.text.split()
            assert set(names) <= set(let_in)
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(
                        ROOT / name, folder / target, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(ROOT / name, folder / target)


class TestTheImage:
    def test_it_serves_and_ends(self, running: Running) -> None:
        """Healthy once it listens, even without its database, which a restart doesn't bring back;
        SIGTERM ends it with 0. It can write to nothing but /data and /tmp."""
        for folder in ("/app", "/usr", "/", "/data", "/tmp"):
            written = running.image.run("touch", f"{folder}/new").returncode == 0
            assert written == (folder in ("/data", "/tmp")), folder
        assert not running.is_healthy()
        until(running.listens, lambda: running.log)
        assert running.is_healthy(), running.log
        assert running.post(make.user_created(id="ana")) == 200
        until(lambda: "outcome=applied" in running.log, lambda: running.log)
        if os.geteuid() == 0:
            status = Path(f"/proc/{running.process.pid}/status").read_text()
            assert re.findall(r"^Uid:\t(\d+)\t(\d+)", status, re.MULTILINE) == [("10001", "10001")]
        for file in (running.image.root / "data").iterdir():
            file.unlink()
        until(lambda: running.ready() == 503, lambda: running.log)  # it looks once a second
        assert running.is_healthy(), running.log
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(STOP_S) == 0, running.log

    def test_its_stages_are_of_one_base(self) -> None:
        """A venv is a venv of the interpreter that made it."""
        assert BUILD[0].text == f"{IMAGE[0].text} AS build"

    @pytest.mark.parametrize(
        ("base", "is_taken"),
        [
            ("", False),
            ("python:3.11-slim", False),
            ("python:3.11-slim@sha256:", False),
            (f"python:3.11-slim@sha256:{'0' * 64}", True),
            (f"python@sha256:{'0' * 64}", True),
        ],
    )
    def test_a_base_without_a_digest_is_refused(self, base: str, is_taken: bool) -> None:
        """By the first step of the build; there is no default."""
        assert "\nARG PYTHON_IMAGE\nFROM ${PYTHON_IMAGE} AS build\n" in DOCKERFILE.read_text()
        check = next(each.text for each in BUILD if each.name == "RUN")
        checked = subprocess.run(["sh", "-c", check], env={"PYTHON_IMAGE": base}, check=False)
        assert (checked.returncode == 0) == is_taken

    def test_what_builds_the_wheel_is_pinned(self) -> None:
        """With hashes, and nothing is fetched without: pip makes no environment of its own."""
        pinned = pins(ROOT / "requirements-build.txt")
        assert needed("hatchling", frozenset()) <= pinned.keys()
        assert pinned.items() <= pins(ROOT / "requirements-dev.txt").items()
        for page in (DOCKERFILE, PAGE):
            wheels = [line for line in page.read_text().splitlines() if "pip wheel" in line]
            assert len(wheels) == 1
            assert "--no-build-isolation" in wheels[0]

    def test_the_wheel_has_an_sbom(self, image: Container) -> None:
        """With all that requirements.txt pins, and its hashes."""
        [file] = (image.root / "app/lib").glob("python*/site-packages/*.dist-info/sboms/*.json")
        bom = json.loads(file.read_text())
        assert (bom["bomFormat"], bom["metadata"]["component"]["name"]) == (
            "CycloneDX",
            "logto-webhooks",
        )
        listed = {each["name"]: each["version"] for each in bom["components"]}
        assert listed.keys() == pins(ROOT / "requirements.txt").keys()
        assert all(each["externalReferences"][0]["hashes"] for each in bom["components"])

    def test_packages_are_pinned(self) -> None:
        """All that the image needs, with hashes, as the tests are run with."""
        pinned = pins(ROOT / "requirements.txt")
        assert pinned.items() <= pins(ROOT / "requirements-dev.txt").items()
        assert needed("logto-webhooks", frozenset({"all"})) - {"logto-webhooks"} <= pinned.keys()


def pins(file: Path) -> dict[str, str]:
    """Version and hashes, by name."""
    found = re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^\w|\Z)", file.read_text(), re.DOTALL | re.M)
    assert all("--hash=sha256:" in more for _, _, more in found)
    return {
        name: f"{version} {sorted(re.findall('sha256:[0-9a-f]+', more))}"
        for name, version, more in found
    }


def needed(name: str, extras: frozenset[str]) -> set[str]:
    """A package, and what it needs here, by name."""
    found = {re.sub(r"[-_.]+", "-", name).lower()}
    for line in metadata.requires(name) or []:
        each = Requirement(line)
        marked = [
            not each.marker,
            *(each.marker.evaluate({"extra": e}) for e in extras or {""} if each.marker),
        ]
        if any(marked):
            found |= needed(each.name, frozenset(each.extras))
    return found


def env_file() -> str:
    """The `.env` that the page shows for Compose."""
    block = re.search(r"^```sh\n((?:[A-Z_]+=\S+\n)+)```", PAGE.read_text(), re.MULTILINE)
    assert block
    return block[1]


class TestCompose:
    def test_ours_can_do_little(self) -> None:
        """Read-only, no capability, room to end, on 127.0.0.1 alone."""
        for name, each in services():
            assert each["read_only"], name
            assert set(each["tmpfs"]) == {"/tmp", "/data"}
            assert each["cap_drop"] == ["ALL"]
            assert "user" not in each, "the image's"
            assert int(each["stop_grace_period"].removesuffix("s")) >= STOP_S
        ports = [port for each in COMPOSE["services"].values() for port in each.get("ports", [])]
        assert ports == [f"127.0.0.1:8787:{environment()['LOGTO_WEBHOOKS_PORT']}"]
        assert USER.split(":")[0] not in ("0", "root")

    def test_each_waits_for_what_it_needs(self) -> None:
        """A healthy database, then a schema; what doesn't listen has no health check."""
        conditions = {
            name: {other: how["condition"] for other, how in each["depends_on"].items()}
            for name, each in services()
        }
        migrated = {"migrate": "service_completed_successfully"}
        assert conditions == {
            "migrate": {"postgres": "service_healthy"},
            "receiver": migrated,
            "worker": migrated,
        }
        assert COMPOSE["services"]["postgres"]["healthcheck"]["test"]
        unlistening = {name for name, each in services() if "healthcheck" in each}
        assert unlistening == {"migrate", "worker"}
        assert COMPOSE["services"]["migrate"]["restart"] == "no"

    def test_secrets_are_in_a_file_of_their_own(self) -> None:
        """None is written here; the one in a URL is asked for."""
        for _, each in services():
            assert each["env_file"] == ".env"
        values = [
            value
            for each in COMPOSE["services"].values()
            for name, value in each["environment"].items()
            if re.search("PASSWORD|SECRET|KEY|URL", name)
        ]
        assert len(values) == 1 + len(OURS)
        assert all("${POSTGRES_PASSWORD:?" in each for each in values)
        assert ".env" in (ROOT / ".gitignore").read_text().split()

    def test_the_page_names_what_compose_requires(self) -> None:
        """Compose stops at the first variable that `.env` lacks."""
        required = set(re.findall(r"\$\{(\w+):\?", COMPOSE_FILE.read_text()))
        assert required == {"PYTHON_IMAGE", "POSTGRES_PASSWORD"}
        assert required | {"LOGTO_WEBHOOK_SIGNING_KEY"} == set(
            re.findall(r"^(\w+)=", env_file(), re.MULTILINE)
        )

    def test_compose_can_read_it(self, tmp_path: Path) -> None:
        """Where there is a Compose to ask."""
        compose = ["docker", "compose"]
        if (
            not shutil.which("docker")
            or subprocess.run([*compose, "version"], check=False).returncode
        ):
            pytest.skip("needs docker compose")
        shutil.copy(COMPOSE_FILE, tmp_path)
        (tmp_path / ".env").write_text(env_file())
        subprocess.run([*compose, "config", "--quiet"], cwd=tmp_path, check=True)


class TestTheUnit:
    def test_it_is_started_again_and_let_end(self) -> None:
        """As a user of its own, on a file system that it can't change."""
        service = Unit()["Service"]
        assert service["Restart"] == "always"
        assert service["KillSignal"] == "SIGTERM"
        assert int(service["TimeoutStopSec"]) >= STOP_S
        assert service["DynamicUser"] == "yes"
        assert service["ProtectSystem"] == "strict"
        assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}"

    def test_a_migration_that_fails_does_not_keep_serve_from_starting(self) -> None:
        """With a spool directory, serve receives without the database. systemd ignores the failure
        of a command after "-"."""
        before = re.findall(r"^ExecStartPre=(.*)$", UNIT.read_text(), re.MULTILINE)
        assert before
        assert all(command.startswith("-/") for command in before)

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
    @pytest.mark.parametrize(
        "words", [("verify",), ("security", "--offline=yes", "--threshold=20")]
    )
    def test_systemd_finds_nothing_wrong(self, words: tuple[str, ...], tmp_path: Path) -> None:
        """Nor much that it could do."""
        file = tmp_path / UNIT.name
        program = Unit()["Service"]["ExecStart"].split()[0]
        file.write_text(UNIT.read_text().replace(program, shutil.which("true") or ""))
        command = ["systemd-analyze", "--no-pager", *words, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


class TestWhatIsNamed:
    """What the page names, tests/unit/test_docs.py asks."""

    @pytest.mark.parametrize("file", [DOCKERFILE, UNIT, COMPOSE_FILE], ids=lambda file: file.name)
    def test_settings_exist(self, file: Path) -> None:
        """Each variable of ours."""
        assert names_in_docs.unknown_settings(file.read_text()) == set()

    def test_commands_exist(self) -> None:
        """With their options."""
        service = Unit()["Service"]
        lines = [container.only(IMAGE, "CMD").words]
        lines += [each["command"] for _, each in services()]
        lines += [shlex.split(service[each])[1:] for each in ("ExecStart", "ExecStartPre")]
        assert names_in_docs.unknown_commands(lines) == []

    def test_the_proxy_lets_all_through(self) -> None:
        """As large as we take it, as patient as we are, and with no redirect."""
        [proxy] = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
        values = dict(re.findall(r"(\w+) ([^;{]+);", re.sub(" *#.*", "", proxy)))
        size = int(values["client_max_body_size"].removesuffix("m")) * 2**20
        assert size >= Settings().max_body_bytes
        assert int(values["keepalive_timeout"].removesuffix("s")) >= KEEP_ALIVE_S
        assert re.findall(r"location (\S+) {", proxy) == [Settings().path]
        assert not re.search(r"\b(return|rewrite|sub_filter)\b", proxy)
