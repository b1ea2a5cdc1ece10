"""One run of reconcile: what it found, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.apply import batch
from logto_webhooks.database.checkpoints import RECONCILE, Checkpoint
from logto_webhooks.database.dry_run import run_or_rehearse
from logto_webhooks.database.store import Store, TransactionRunner
from logto_webhooks.errors import RowRejected, TimedOut
from logto_webhooks.events.local import Source
from logto_webhooks.logto.api_responses import PAGE
from logto_webhooks.logto.clock_skew import SpanClock
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.records.drift import Drift, agrees, drifts_of
from logto_webhooks.records.record import ROLE, Absent, Change, Key, Record

MOST: Final = 1_000  # differences that are told one by one
MOST_LOCKED: Final = 20  # records that are left out because something else holds them
RESUME_MS: Final = 86_400_000  # how old a look may be that is gone on with


class ReconcileResult(Struct, kw_only=True):
    """The result of a comparison with Logto. `fields` counts the columns that differed.

    `began` is the time (ms) from which on its data are valid. A comparison that was `resumed` only
    counts its own part.
    """

    began: int = 0
    resumed: bool = False
    users: int = 0
    organizations: int = 0
    members: int = 0
    roles: int = 0
    drifted: int = 0
    fields: dict[str, int] = {}
    drifts: list[Drift] = []
    doubts: list[str] = []  # what can't be told


# What is being listed, how many of it were, and how much of all that is, from 0 to 1.
Progressed = Callable[[str, int, float], None]


class ReconcileRun:
    """What a look learns goes through here; a `dry` one changes nothing, and keeps no place."""

    def __init__(
        self,
        host: TransactionRunner,
        when: SpanClock,
        tenant: TenantCheck,
        *,
        dry: bool,
        source: Source | None,
        progressed: Progressed,
    ) -> None:
        """`source` is what handlers are told; without one they are told nothing."""
        self.host = host
        self.when = when
        self._tenant = tenant
        self.found = ReconcileResult()
        # In a dry look, which notes nowhere who was asked about, and which roles were listed.
        self._asked: set[Key] = set()
        self._roles: dict[Key, set[str]] = {}
        self._unequal: dict[Key, None] = {}
        self._told: set[Key] = set()  # what differed, in a dry look
        self._settles = False
        self._locked = 0
        self._dry = dry
        self._source = source
        self._progressed = progressed

    async def resume(self, now: int) -> None:
        """Go on with a look that didn't end, if there is one that isn't too old."""
        reached = await self._read("began")
        if not self._dry and reached and reached.count and reached.at > now - RESUME_MS:
            self.found.began, self.found.resumed = reached.at, True

    async def start(self, began: int) -> None:
        """Say since when what is compared is true, if it isn't known."""
        if not self.found.began:
            self.found.began = began
            await self._note({"began": Checkpoint(began, 1)})

    async def place(self, stage: str) -> tuple[int, int | None]:
        """Return the page at which a stage goes on, and the total of the page before."""
        page, total = await self._read(stage), await self._read(f"{stage} total")
        if not self.found.resumed or not page or page.at != self.found.began:
            return 1, None
        return page.count, total.count if total else None

    async def keep_place(self, stage: str, page: int, total: int | None) -> None:
        """Note at which page a stage goes on."""
        began = self.found.began
        await self._note(
            {stage: Checkpoint(began, page), f"{stage} total": Checkpoint(began, total or 0)}
        )
        listed = min((page - 1) * PAGE, total or 0)
        self._progressed(stage, listed, listed / total if total else 1.0)

    async def end(self) -> None:
        """Note that all was compared."""
        began = self.found.began

        def note(store: Store) -> None:
            store.save_checkpoint(RECONCILE, Checkpoint(began, self.found.drifted))
            store.save_checkpoint(f"{RECONCILE} began", Checkpoint(began, 0))

        if not self._dry:
            await self.host.run(note)

    async def forget_place(self) -> None:
        """Let the next look begin anew: it may be at another Logto."""
        await self._note({"began": Checkpoint(self.found.began, 0)})

    async def learn(self, changes: Sequence[Change]) -> None:
        """Apply what Logto answered, and count what differed. Raises WrongTenant."""
        if not changes:
            return
        if any(isinstance(change, Absent) for change in changes):
            await self._tenant.ensure_same_tenant()

        def learn(store: Store) -> list[tuple[Record, Record]]:
            return batch.apply_reads(store, changes, self._source)

        try:
            changed = await run_or_rehearse(self.host, learn, self._dry)
        except (RowRejected, TimedOut) as error:
            await self._halve(changes, error)
            return
        if self._dry:
            self._remember(changes, [before for before, _ in changed])
        for before, after in changed:
            self._count(before.key, drifts_of(before, after))
        now = {after.key: after for _, after in changed}
        for change in changes:
            record = now.get(change.key)
            if record is not None and not agrees(record, change):
                self._unequal[_subject(change.key)] = None
        restored = [entry.key for entry in now.values() if entry.key.kind == "user"]
        self._unequal |= {key: None for key in restored if now[key].is_restored}

    def unequal(self) -> list[Key]:
        """Return the users and organizations, once each, about which must be asked again: what is
        known of one is newer than the answer, or one is back whose memberships are unknown."""
        keys, self._unequal, self._settles = list(self._unequal), {}, True
        if len(keys) > MOST:
            self.doubt(f"{len(keys) - MOST} records changed while they were listed: run it again")
        return keys[:MOST]

    def asked_about(self, key: Key, roles: bool) -> bool:
        """Whether a dry look did ask already; of roles, about each that is known here."""
        return not self._roles.get(key, {""}) if roles else key in self._asked

    async def _halve(self, changes: Sequence[Change], error: RowRejected | TimedOut) -> None:
        """One bad row, or one that is locked, harms nobody else. Raises TimedOut if very much is
        locked."""
        if len(changes) == 1:
            key = changes[0].key
            if isinstance(error, TimedOut):
                self._locked += 1
                if self._locked > MOST_LOCKED:
                    raise error
            self.doubt(f"the {key.kind} {key.id} isn't kept: {error}")
            return
        middle = len(changes) // 2
        await self.learn(changes[:middle])
        await self.learn(changes[middle:])

    def _remember(self, changes: Sequence[Change], before: Sequence[Record]) -> None:
        for record in before:
            here = {name for name in record.groups if name.startswith(ROLE)}
            self._roles.setdefault(record.key, here)
        for change in changes:
            listed = [name for name in getattr(change, "contents", {}) if name.startswith(ROLE)]
            if listed:
                self._roles[change.key] = self._roles.get(change.key, set()) - set(listed)
            else:
                self._asked.add(change.key)

    def doubt(self, why: Any) -> None:
        """Note what can't be told."""
        self.found.doubts.append(str(why))

    def _count(self, key: Key, drifts: Sequence[Drift]) -> None:
        found = self.found
        if not drifts or (self._settles and key in self._told):
            return
        if self._dry:
            self._told.add(key)
        found.drifted += 1
        for field in (field for drift in drifts for field in drift.fields):
            found.fields[field] = found.fields.get(field, 0) + 1
        found.drifts += drifts[: MOST - len(found.drifts)]

    async def _read(self, name: str) -> Checkpoint | None:
        return await self.host.read(lambda store: store.checkpoint(f"{RECONCILE} {name}"))

    async def _note(self, reached: dict[str, Checkpoint]) -> None:
        def note(store: Store) -> None:
            for name, checkpoint in reached.items():
                store.save_checkpoint(f"{RECONCILE} {name}", checkpoint)

        if not self._dry:
            await self.host.run(note)


def _subject(key: Key) -> Key:
    """Whom to ask about: of a membership, the user."""
    return key.organization_and_user[1] if key.kind == "membership" else key
