"""Files for their owner alone, whatever the umask: mode 0600."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

MODE: Final = 0o600
_CLOSE_ON_EXEC: Final = getattr(os, "O_CLOEXEC", 0)  # Windows has none, and needs none


def open_for_writing(file: Path, *, new: bool = False) -> int:
    """Open a file, and make it unless it exists; return its descriptor. The mode of one that
    exists stays. With `new`, raise FileExistsError if it exists. Raises OSError."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC, MODE)
    except FileExistsError:
        if new:
            raise
        return os.open(file, os.O_RDWR | os.O_CREAT | _CLOSE_ON_EXEC, MODE)
    try:
        os.chmod(file, MODE)  # what the umask took away
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def create(file: Path) -> None:
    """Make an empty file unless it exists. Raises OSError."""
    if not file.exists():
        os.close(open_for_writing(file))


def write(file: Path, content: bytes) -> None:
    """Replace what is in a file, which is made unless it exists. Raises OSError."""
    with os.fdopen(open_for_writing(file), "wb") as opened:
        opened.truncate()
        opened.write(content)


def close_to_others(file: Path) -> None:
    """Take the rights of everybody but owner and group from a file that gets a secret. Raises
    OSError."""
    if os.name != "nt":
        mode = file.stat().st_mode & 0o777
        if mode & 0o007:
            file.chmod(mode & ~0o007)


def too_open(file: Path) -> str | None:
    """The mode of a file that others than its owner can read or write; None if they can't, if
    there is no such file, or on Windows."""
    if os.name == "nt":
        return None
    try:
        mode = file.stat().st_mode & 0o777
    except OSError:
        return None
    return f"{mode:04o}" if mode & 0o077 else None
