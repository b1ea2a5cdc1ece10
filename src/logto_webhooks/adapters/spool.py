"""The spool directory: deliveries that the database didn't take in time, one file each.

A file's name is when the delivery was received and its digest, and its content is the body as it
was signed. It is written under another name first, so that what has the name is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from logto_webhooks.core.delivery import Delivery, identify
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import SettingInvalid

_NAME: Final = re.compile(r"(\d{13,})-([0-9a-f]{48})\.json")
_VARIABLE: Final = "LOGTO_WEBHOOKS_SPOOL_DIR"


class SpoolDirectory:
    """Several processes may use one: to store a delivery twice does no harm."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> None:
        """Make the directory unless it exists, for this user alone. Raises SettingInvalid."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            allowed = os.access(self._folder, os.W_OK | os.X_OK)
        except OSError as error:
            problem = f"{self._folder} can't be made ({error.strerror})"
            raise SettingInvalid(name=_VARIABLE, problem=problem) from None
        if not allowed:
            problem = f"this user may not write to {self._folder}"
            raise SettingInvalid(name=_VARIABLE, problem=problem)

    async def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Return once they are on disk. Raises OSError."""
        await asyncio.to_thread(self._keep, deliveries)

    def keep_now(self, delivery: Delivery) -> None:
        """The same, blocking. Raises OSError."""
        self._keep([delivery])

    def count(self) -> int:
        """How many wait; 0 if there is no such directory."""
        return sum(1 for _ in self._names())

    def oldest(self, limit: int, max_bytes: int) -> list[str]:
        """Name those that were received first: as many as fit, at least one."""
        names: list[str] = []
        size = 0
        for name in sorted(self._names())[:limit]:
            with contextlib.suppress(FileNotFoundError):
                size += (self._folder / name).stat().st_size
                if names and size > max_bytes:
                    break
                names.append(name)
        return names

    def read(self, name: str) -> Delivery | None:
        """Read one; None if another process has stored it. Raises OSError, NotADelivery."""
        try:
            body = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        return identify(vouch(body), int(name.partition("-")[0]))

    def remove(self, names: Sequence[str]) -> None:
        """Remove what is stored by now. Raises OSError."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        """Rename what can't be stored, so that it isn't tried again. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._folder / name, self._folder / f"{name}.refused")

    def _names(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as found:
            for entry in found:
                if _NAME.fullmatch(entry.name):
                    yield entry.name

    def _keep(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            name = f"{delivery.received_at:013d}-{delivery.digest.hex()}.json"
            temporary = self._folder / f"{name}.{os.getpid()}.part"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(delivery.body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / name)
        _sync_directory(self._folder)


def _sync_directory(folder: Path) -> None:
    if os.name == "nt":  # where a directory can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
