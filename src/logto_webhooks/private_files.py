"""Files for their owner alone, whatever the umask (mode 0600), and locks between processes."""

from __future__ import annotations

import importlib
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from logto_webhooks.errors import NotWritable

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
    """Create an empty file unless it exists. Raises OSError."""
    if not file.exists():
        os.close(open_for_writing(file))


def write(file: Path, content: bytes) -> None:
    """Replace the content of a file, or create the file. Raises OSError."""
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


def find_open_mode(file: Path) -> str | None:
    """The mode of a file that others than its owner can read or write; None if they can't, if
    there is no such file, or on Windows."""
    if os.name == "nt":
        return None
    try:
        mode = file.stat().st_mode & 0o777
    except OSError:
        return None
    return f"{mode:04o}" if mode & 0o077 else None


_fcntl: Any = None
with suppress(ImportError):  # Windows has no such module
    _fcntl = importlib.import_module("fcntl")


class LockFile:
    """Held from the first `acquire` that succeeds; given back by `release`, or when we die.

    It is the process's: two objects of one process have it together.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._held: _Descriptor | _Transaction | None = None

    def acquire(self) -> bool:
        """Take the lock unless another process has it; return whether this process has it. Raises
        NotWritable."""
        if self._held is None:
            try:
                self._held = (_descriptor if _fcntl else _lock_transaction)(self._file)
            except OSError as error:
                raise NotWritable(path=self._file, problem=error.strerror) from None
            except sqlite3.Error as error:
                raise NotWritable(path=self._file, problem=str(error)) from None
        return self._held is not None

    def release(self) -> None:
        """Release the lock."""
        if self._held is not None:
            self._held.release()
            self._held = None


class _Descriptor:
    """A lock of POSIX: a process's own, and gone with it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


def _descriptor(file: Path) -> _Descriptor | None:
    descriptor = open_for_writing(file)
    try:
        _fcntl.lockf(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return _Descriptor(descriptor)


class _Transaction:
    """Where there is no such lock, SQLite's: a transaction on the file, which stays empty.

    SQLite's locks are a connection's, so a process has one connection for all.
    """

    def __init__(self, file: Path, connection: sqlite3.Connection) -> None:
        self._file = file
        self._connection = connection
        self.users = 0

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            self._connection.close()
            del _TRANSACTIONS[self._file]


_TRANSACTIONS: Final[dict[Path, _Transaction]] = {}


def _lock_transaction(file: Path) -> _Transaction | None:
    file = file.resolve()
    if file not in _TRANSACTIONS:
        create(file)
        connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return None
        _TRANSACTIONS[file] = _Transaction(file, connection)
    held = _TRANSACTIONS[file]
    held.users += 1
    return held
