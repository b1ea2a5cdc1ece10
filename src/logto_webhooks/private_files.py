"""Files that only their owner can access (mode 0600, whatever the umask), and file locks."""

from __future__ import annotations

import errno
import importlib
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from logto_webhooks.errors import NotWritable

MODE: Final = 0o600
_CLOSE_ON_EXEC: Final = getattr(os, "O_CLOEXEC", 0)  # Windows neither has nor needs it


def open_for_writing(file: Path, *, new: bool = False) -> int:
    """Open a file, or create it; return its descriptor. An existing file keeps its mode. With
    `new`, raise FileExistsError if the file exists. Raises OSError."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC, MODE)
    except FileExistsError:
        if new:
            raise
        return os.open(file, os.O_RDWR | os.O_CREAT | _CLOSE_ON_EXEC, MODE)
    try:
        os.chmod(file, MODE)  # the umask may have removed permissions
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
    """Remove all permissions of users other than owner and group, before a secret is written to the
    file. Raises OSError."""
    if os.name != "nt":
        mode = file.stat().st_mode & 0o777
        if mode & 0o007:
            file.chmod(mode & ~0o007)


def find_open_mode(file: Path) -> str | None:
    """Return the mode of a file that users other than its owner can access. Return None if they
    can't, if there is no such file, or on Windows."""
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
    """A lock that is held from the first successful `acquire` until `release`, or the process ends.

    It belongs to the process: two objects in one process can hold it at the same time.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._held: _Descriptor | _Transaction | None = None

    def acquire(self) -> bool:
        """Try to take the lock. Return False if another process has it. Raises NotWritable."""
        if self._held is None:
            try:
                self._held = (_lock_descriptor if _fcntl else _lock_transaction)(self._file)
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
    """A POSIX lock, which ends with its process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


def _lock_descriptor(file: Path) -> _Descriptor | None:
    descriptor = open_for_writing(file)
    try:
        _fcntl.lockf(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # POSIX allows both
            raise
        return None
    return _Descriptor(descriptor)


class _Transaction:
    """A SQLite transaction that locks the file where POSIX locks don't exist. The file stays empty.

    SQLite's locks belong to a connection, so all lock objects of a process share one.
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
