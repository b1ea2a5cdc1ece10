"""Notes of what is to be given back, a file each, in a folder that no repository takes along."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from logto_webhooks.adapters import private_files
from logto_webhooks.errors import NotWritable
from logto_webhooks.service.borrow import Note


class NoteFolder:
    """The notes of a folder; it is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> None:
        """Make the folder. Raises NotWritable."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            private_files.write(self._folder / ".gitignore", b"*\n")
        except OSError as error:
            raise NotWritable(path=self._folder, problem=error.strerror) from None

    def all(self) -> list[Note]:
        """All that are kept; what isn't whole was never acted on."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            with suppress(OSError, msgspec.DecodeError):
                found.append(msgspec.json.decode(file.read_bytes(), type=Note))
        return found

    def write(self, note: Note) -> None:
        """Keep one: it is on disk when this returns. Raises NotWritable."""
        try:
            descriptor = private_files.open_for_writing(self._file(note), new=True)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(note))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NotWritable(path=self._folder, problem=error.strerror) from None

    def remove(self, note: Note) -> None:
        """Forget one."""
        self._file(note).unlink(missing_ok=True)

    def _file(self, note: Note) -> Path:
        digest = hashlib.sha256(note.session.encode()).hexdigest()
        return self._folder / f"{digest[:16]}.json"
