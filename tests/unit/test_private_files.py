"""Locks on files."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from logto_webhooks.errors import NotWritable
from logto_webhooks.private_files import LockFile


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINTR, errno.EIO, errno.EAGAIN, errno.EACCES])
def test_only_what_another_process_has_is_taken(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without locks, for one, is told: nobody would ever work on its database."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = LockFile(tmp_path / "lock")
    if code in (errno.EAGAIN, errno.EACCES):
        assert not lock.acquire()
    else:
        with pytest.raises(NotWritable, match=f"lock: {os.strerror(code)}"):
            lock.acquire()
