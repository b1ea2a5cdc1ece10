"""Commands as processes of their own that needn't import the product first: forked from one that
has. Most tests of commands wait for little else."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

WIDTH = {"COLUMNS": "200"}  # is read when the product is imported
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["logto_webhooks.cli", __name__])


def run(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str], seconds: float
) -> tuple[int, str, str]:
    """Run a command to its end; return its exit code, and what it printed."""
    os.environ.update(WIDTH)
    with tempfile.TemporaryDirectory() as printed:
        files = Path(printed, "out"), Path(printed, "err")
        process = _CONTEXT.Process(target=_main, args=(arguments, folder, environment, files))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{arguments} took longer than {seconds} s")
        code = process.exitcode
        process.close()
        return code, files[0].read_text(), files[1].read_text()


def _main(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str], files: tuple[Path, Path]
) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["logto-webhooks", *arguments]
    from logto_webhooks.__main__ import main

    main()
