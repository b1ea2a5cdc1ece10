"""A lock between processes, by a file: who has it keeps it until it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from logto_webhooks.errors import NotWritable


class LockFile:
    """Held from the first `acquire` that succeeds; given back by `release`, or when we die.

    It is the process's: two objects of one process have it together.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock unless somebody else has it; say whether it is ours. Raises NotWritable."""
        if self._descriptor is None:
            descriptor = self._opened()
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                return False
            self._descriptor = descriptor
        return True

    def _opened(self) -> int:
        try:
            return os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise NotWritable(path=self._file, problem=error.strerror) from None

    def release(self) -> None:
        """Let the next one have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
