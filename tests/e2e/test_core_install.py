"""An installation without extras: it works, or names the extra that is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[2]
CALL: Final = """
import asyncio
from logto_webhooks import LogtoWebhooks, events, tables

try:
    logto = LogtoWebhooks(signing_key="k" * 32, {arguments})
    logto.on(events.UserCreated, name='x')(lambda event: None)
    asyncio.run(logto.{call})
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def distributions(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Find what these requirements install here, with what they require themselves."""
    found: dict[str, metadata.Distribution] = {}
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            distribution = metadata.distribution(requirement.name)
            found[distribution.metadata["Name"]] = distribution
            found |= distributions(distribution.requires or [])
    return found


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that the package itself needs, and no others."""
    folder = tmp_path_factory.mktemp("core")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for distribution in distributions(project["dependencies"]).values():
        tops = {file.parts[0] for file in distribution.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def run(core: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these packages only."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{core}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "call", "says"),
    [
        ('database_url="sqlite:///a.db"', "status()", r"StoreUnavailable: .*a\.db"),
        (
            'database_url="postgresql://u:p@127.0.0.1:1/x"',
            "status()",
            r'SettingInvalid: .* the extra "postgres"',
        ),
        (
            'database_url="postgresql+psycopg://u:p@127.0.0.1:1/x"',
            "status()",
            r'SettingInvalid: .* the extra "psycopg"',
        ),
        (
            'database_url="sqlite:///a.db", endpoint="http://h", app_id="a", app_secret="b"',
            "endpoints()",
            r'ExtraMissing: .* the extra "api"',
        ),
    ],
    ids=["sqlite", "postgres", "psycopg", "api"],
)
@pytest.mark.process
def test_the_library_needs_no_extra(
    core: Path, tmp_path: Path, arguments: str, call: str, says: str
) -> None:
    """It is imported, takes handlers, and says in one line which extra a feature needs."""
    done = run(core, tmp_path, "-c", CALL.format(arguments=arguments, call=call))
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert re.match(says, line)


@pytest.mark.process
def test_the_command_line_names_its_extra(core: Path, tmp_path: Path) -> None:
    """In one line, with exit code 2."""
    done = run(core, tmp_path, "-m", "logto_webhooks", "status")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "typer isn't installed" in line
