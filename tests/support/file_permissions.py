"""A command that has no more rights to files than their modes give, though root starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.service import clean_environment

_BOUND = "--bounding-set=-dac_override,-dac_read_search"


def bound(*arguments: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the product to its end."""
    command = [sys.executable, "-m", "logto_webhooks", *arguments]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may write everywhere, and setpriv isn't here to take that away")
        command = [setpriv, _BOUND, *command]
    environment = clean_environment(more)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """Change a path's mode for a while."""
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)
