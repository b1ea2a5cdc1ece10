"""Commands as processes of their own that needn't import the product first: forked from one that
has. Most tests of commands wait for little else."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

WIDTH = {"COLUMNS": "200"}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload", __name__])


class Forked:
    """A command that runs, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        out: Path | None = None,
        errors: Path | None = None,
        constants: Mapping[str, object] | None = None,
    ) -> None:
        """What it prints goes into the file `out`, if given. What it says on the other stream goes
        to the end of the file `errors`; without one it can be read from `stderr`.

        `constants` of the product, such as "package.module:NAME", have other values there.
        """
        os.environ.update(WIDTH)
        reader, writer = _CONTEXT.Pipe(duplex=False)
        given = (
            list(arguments),
            folder,
            dict(environment),
            dict(constants or {}),
            out,
            errors or writer,
        )
        self._process = _CONTEXT.Process(target=_main, args=given)
        self._process.start()
        writer.close()
        self.stderr: TextIO = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        assert self._process.pid
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("logto-webhooks", timeout or 0)
        return code

    def send_signal(self, sign: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sign)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> tuple[int, str, str]:
    """Run a command to its end; return its exit code, and what it printed."""
    with tempfile.TemporaryDirectory() as printed:
        out = Path(printed, "out")
        process = Forked(arguments, folder, environment, out)
        try:
            with process.stderr:
                errors = process.stderr.read()
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise TimeoutError(f"{arguments} took longer than {seconds} s") from None
        return code, out.read_text(), errors


def _main(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    constants: dict[str, object],
    out: Path | None,
    errors: Path | Connection,
) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(out or os.devnull, os.O_WRONLY | os.O_CREAT), 1)
    if isinstance(errors, Path):
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    else:
        os.dup2(errors.fileno(), 2)
        errors.close()
    # What Python opened at the start may be of another kind: a file, not a pipe.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["logto-webhooks", *arguments]
    for constant, value in constants.items():
        module, _, name = constant.partition(":")
        setattr(importlib.import_module(module), name, value)
    from logto_webhooks.__main__ import main

    main()
