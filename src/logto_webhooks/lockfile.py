"""A lock between processes, by a file: who has it keeps it until it ends."""

from __future__ import annotations

import importlib
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from logto_webhooks import private_files
from logto_webhooks.errors import NotWritable

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
        """Take the lock unless somebody else has it; say whether it is ours. Raises NotWritable."""
        if self._held is None:
            try:
                self._held = (_descriptor if _fcntl else _transaction)(self._file)
            except OSError as error:
                raise NotWritable(path=self._file, problem=error.strerror) from None
            except sqlite3.Error as error:
                raise NotWritable(path=self._file, problem=str(error)) from None
        return self._held is not None

    def release(self) -> None:
        """Let the next one have it."""
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
    descriptor = private_files.open_for_writing(file)
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


def _transaction(file: Path) -> _Transaction | None:
    file = file.resolve()
    if file not in _TRANSACTIONS:
        private_files.create(file)
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
