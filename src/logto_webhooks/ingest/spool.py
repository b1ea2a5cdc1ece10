"""The spool directory: deliveries that couldn't be stored in time, one file each."""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import shlex
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from logto_webhooks import private_files
from logto_webhooks.batch_sizes import BatchSizer
from logto_webhooks.clock import SystemClock
from logto_webhooks.database import Database
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.deliveries import RECENT, NewDelivery, estimate_ahead, identify
from logto_webhooks.errors import (
    NoAnswer,
    NotADelivery,
    RowRejected,
    SettingInvalid,
    StoreUnavailable,
    TimedOut,
    describe,
)
from logto_webhooks.event_loop import forever, run_in_background, run_in_thread
from logto_webhooks.instrumentation import NotUnspooled, Observer, Unspooled
from logto_webhooks.settings import Settings
from logto_webhooks.signing_keys import trust

_NAME: Final = re.compile(r"(\d{13,})-([0-9a-f]{48})\.json")
_PART: Final = re.compile(rf"{_NAME.pattern}\.\d+-\d+\.part")
# Writing a file never takes so long. From another container, its process can't be seen.
_LEFT_S: Final = 3600
_PLACE: Final = "database"  # a file that says to which database the deliveries go
IN_USE_S: Final = 60  # a running service writes that file more often
CLAIM_S: Final = 20.0
_PROBE_BYTES: Final = 64 * 1024  # more than almost any delivery


class SpoolDirectory:
    """A directory of deliveries. Several processes may share it: storing a delivery twice is
    harmless."""

    def __init__(self, folder: Path, setting: str = "spool_dir") -> None:
        """`setting` is the name of the setting with the folder, for errors."""
        self._folder = folder.absolute()  # a handler may change the working directory
        self._setting = setting

    def make(self) -> None:
        """Create the directory if it doesn't exist, for this user only. Raises SettingInvalid."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            allowed = os.access(self._folder, os.W_OK | os.X_OK)
        except OSError as error:
            problem = f"{self._folder} can't be made ({error.strerror})"
            raise SettingInvalid(name=self._setting, problem=problem) from None
        if not allowed:
            problem = f"this user has no write permission for {self._folder}"
            raise SettingInvalid(name=self._setting, problem=problem)
        if problem := self.find_stranger():
            raise SettingInvalid(name=self._setting, problem=problem)

    def claim(self, place: str) -> None:
        """Note that the directory is for the database at `place`. Blocks.

        Raises SettingInvalid if it is for another one, because each service that has the directory
        takes all deliveries in it as its own, and OSError.
        """
        file = self._folder / _PLACE
        with contextlib.suppress(FileNotFoundError):
            is_in_use = time.time() - file.stat().st_mtime < IN_USE_S or self.count() > 0
            owner = file.read_text(errors="replace")
            if owner == place:
                os.utime(file)
                return
            if is_in_use:
                problem = (
                    f"{self._folder} is the spool directory of a service with another database "
                    f"({owner}); use another directory. If you moved the database, delete {file}, "
                    "and restart"
                )
                raise SettingInvalid(name=self._setting, problem=problem)
        temporary = file.with_name(f"{_PLACE}.{os.getpid()}")
        private_files.write(temporary, place.encode())
        os.replace(temporary, file)

    def find_stranger(self) -> str:
        """Say who else can write to the directory, because files in it count as verified. "" if
        nobody can, or if there is no directory."""
        with contextlib.suppress(OSError):
            status = self._folder.stat()
            if not _is_ours(status):
                return (
                    f"{self._folder} belongs to another user (uid {status.st_uid}), who could add "
                    "deliveries; use a directory of this user's, such as a new one"
                )
            if os.name != "nt" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return (
                    f"other users can write to {self._folder}, and could add deliveries; "
                    f"run: chmod 700 {shlex.quote(str(self._folder))}"
                )
        return ""

    def write(self, deliveries: Sequence[NewDelivery]) -> None:
        """Write deliveries, and return once they are on disk. Blocks. Raises OSError."""
        for delivery in deliveries:
            name = f"{delivery.received_at:013d}-{delivery.digest.hex()}.json"
            # Two threads that write copies of a delivery must not use the same file.
            temporary = self._folder / f"{name}.{os.getpid()}-{threading.get_ident()}.part"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(delivery.body)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._folder / name)
            except OSError:
                with contextlib.suppress(OSError):  # free the space, because the disk may be full
                    temporary.unlink()
                raise
        _sync_directory(self._folder)

    def try_write(self) -> None:
        """Write a file that has no name. Blocks. Raises OSError if nothing can be written now."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())

    def count(self) -> int:
        """Count the deliveries; 0 if there is no such directory."""
        return sum(1 for _ in self._list_names())

    def oldest(self, limit: int, but: Collection[str] = ()) -> deque[str]:
        """Return the names of the oldest deliveries, `but` some. This goes through all files."""
        names = (name for name in self._list_names() if name not in but)
        return deque(heapq.nsmallest(limit, names))

    def take(self, names: deque[str], limit: int, max_bytes: int) -> list[str]:
        """Remove from `names` the first ones that fit, at least one, and return those of them whose
        file is still there."""
        taken: list[str] = []
        size = 0
        while names and len(taken) < limit:
            with contextlib.suppress(FileNotFoundError):
                size += (self._folder / names[0]).stat().st_size
                if taken and size > max_bytes:
                    break
                taken.append(names[0])
            names.popleft()
        return taken

    def read(self, name: str, ahead: int = 0) -> NewDelivery | None:
        """Read a delivery; None if another process stored it. `ahead` is how far Logto's clock is
        ahead of ours (ms). Raises OSError, NotADelivery."""
        try:
            with (self._folder / name).open("rb") as file:
                if not _is_ours(os.fstat(file.fileno())):
                    raise NotADelivery(problem="the file belongs to another user")
                body = file.read()
        except FileNotFoundError:
            return None
        return identify(trust(body), int(name.partition("-")[0]), ahead=ahead)

    def remove(self, names: Sequence[str]) -> None:
        """Remove stored deliveries. Raises OSError."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        """Rename a file that holds no delivery, so that it isn't tried again. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._folder / name, self._folder / f"{name}.refused")

    def finish(self) -> None:
        """Finish the files of killed processes: keep complete deliveries, remove partial ones."""
        for part in self._list_names(_PART):
            with contextlib.suppress(OSError):
                if time.time() - (self._folder / part).stat().st_mtime < _LEFT_S:
                    continue
                try:
                    self.read(part)
                except NotADelivery:
                    self.remove([part])
                else:
                    os.replace(self._folder / part, self._folder / part.rsplit(".", 2)[0])

    def _list_names(self, pattern: re.Pattern[str] = _NAME) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                if pattern.fullmatch(entry.name):
                    yield entry.name


def _is_ours(status: os.stat_result) -> bool:
    return os.name == "nt" or status.st_uid == os.geteuid()


def _sync_directory(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a directory
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def spool_of(settings: Settings) -> SpoolDirectory | None:
    """Return the spool directory, if one is configured. Opens nothing."""
    if not settings.spool_dir:
        return None
    return SpoolDirectory(Path(settings.spool_dir), settings.name_of("spool_dir"))


@contextlib.asynccontextmanager
async def unspool_in_background(
    settings: Settings, database: Database, observe: Observer, stored: Callable[[], None]
) -> AsyncIterator[None]:
    """Create the spool directory, and store the deliveries in it, within the block.

    Raises SettingInvalid.
    """
    spool = spool_of(settings)
    if spool is None:
        yield
        return
    spool.make()
    with contextlib.suppress(OSError):  # the disk may be full, or read-only for a while
        await run_in_thread(spool.claim, database.place)
    unspooler = Unspooler(spool, database.host, observe, stored)

    async def claim() -> None:
        await forever(lambda: run_in_thread(spool.claim, database.place), CLAIM_S, _ignore)

    def tell(problem: str, _: float) -> None:
        observe(NotUnspooled("", problem))

    async with run_in_background(unspooler.keep, claim, tell=tell):
        yield


def _ignore(error: Exception) -> float:
    return CLAIM_S


STORE_S: Final = 10.0
LOOK_S: Final = 1.0
MAX_ROWS: Final = 512
MAX_BYTES: Final = 16 * 2**20
MAX_NAMES: Final = 100_000  # in memory, although a directory can have more files
LONGEST_WAIT_S: Final = 60.0  # until a file that the database refused is tried again


class Unspooler:
    """Moves deliveries from the spool to the inbox, the oldest first."""

    def __init__(
        self,
        spool: SpoolDirectory,
        host: TransactionRunner,
        observe: Observer,
        stored: Callable[[], None],
    ) -> None:
        """`stored` is called when new deliveries are in the inbox."""
        self._spool = spool
        self._host = host
        self._observe = observe
        self._stored = stored
        self._reported: set[str] = set()  # files that can't be read or renamed
        self._failed: set[str] = set()  # files that this turn skips from now on
        self._refused: dict[str, tuple[float, float]] = {}  # -> its wait, and when that ends
        self._sizer = BatchSizer(STORE_S / 2, MAX_ROWS)

    async def keep(self) -> None:
        """Store spooled deliveries repeatedly, until cancelled."""
        await forever(self.turn, LOOK_S, self._report_failure)

    def _report_failure(self, error: Exception) -> float:
        # `status` counts the deliveries in the spool.
        if not isinstance(error, StoreUnavailable | OSError):
            self._observe(NotUnspooled("", describe(error)))
        return LOOK_S

    async def turn(self) -> int:
        """Store all deliveries that can be stored. Return how many. Raises StoreUnavailable,
        OSError."""
        now = time.monotonic()
        self._failed = {name for name, (_, due_at) in self._refused.items() if due_at > now}
        await run_in_thread(self._spool.finish)
        stored = 0
        while names := await run_in_thread(self._spool.oldest, MAX_NAMES, self._failed):
            while names:
                most = self._sizer.weight
                max_bytes = MAX_BYTES * most // MAX_ROWS
                batch = await run_in_thread(self._spool.take, names, most, max_bytes)
                stored += await self._store(await self._read(batch))
        return stored

    async def _read(self, names: Sequence[str]) -> list[tuple[str, NewDelivery]]:
        clocks = await self._host.read(lambda store: store.clocks(RECENT))
        ahead = estimate_ahead(SystemClock().now(), clocks)
        spooled: list[tuple[str, NewDelivery]] = []
        for name in names:
            try:
                delivery = await run_in_thread(self._spool.read, name, ahead)
            except NotADelivery as error:
                self._refuse(name, str(error))
            except OSError as error:  # such as a file of another user, which is skipped
                self._report_once(name, str(error))
            else:
                if delivery is not None:
                    spooled.append((name, delivery))
        return spooled

    async def _store(self, spooled: Sequence[tuple[str, NewDelivery]]) -> int:
        if not spooled:
            return 0
        deliveries = [delivery for _, delivery in spooled]
        started = time.perf_counter()
        try:
            # `accept` as for a new one: its file is removed, so it must be durable.
            await self._host.accept(lambda store: store.add(deliveries), STORE_S)
        except (RowRejected, TimedOut) as error:
            if len(spooled) == 1:
                name = spooled[0][0]
                if isinstance(error, TimedOut):  # another transaction inserts the same digest
                    self._failed.add(name)
                else:
                    self._try_later(name, str(error))
                return 0
            # A bad row must not harm others: halve the batch until it is alone.
            middle = len(spooled) // 2
            return await self._store(spooled[:middle]) + await self._store(spooled[middle:])
        except NoAnswer:
            self._sizer.shrink()
            raise
        self._sizer.adjust(len(spooled), time.perf_counter() - started)
        for name, _ in spooled:
            self._refused.pop(name, None)
        await run_in_thread(self._spool.remove, [name for name, _ in spooled])
        self._observe(Unspooled(len(spooled)))
        self._stored()
        return len(spooled)

    def _try_later(self, name: str, problem: str) -> None:
        """Keep a file that the database refuses: a trigger that fails may be mended. Wait twice as
        long each time."""
        wait_s, _ = self._refused.get(name, (LOOK_S / 2, 0.0))
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self._refused[name] = (wait_s, time.monotonic() + wait_s)
        self._report_once(name, problem)

    def _refuse(self, name: str, problem: str) -> None:
        """Rename a file that holds no delivery."""
        try:
            self._spool.set_aside(name)
        except OSError as error:
            self._report_once(name, f"{problem}; nor can it be renamed: {error}")
        else:
            self._observe(NotUnspooled(name, problem))

    def _report_once(self, name: str, problem: str) -> None:
        """Report a file only once, although it is tried repeatedly."""
        self._failed.add(name)
        if name not in self._reported:
            self._reported.add(name)
            self._observe(NotUnspooled(name, problem))
