"""Count what became of all records in a run that writes mapped rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

from logto_webhooks.database.mapped_rows import RegisteredMapping, RowState
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.ends import blocker
from logto_webhooks.mapping.links import AMBIGUOUS, COMPARING
from logto_webhooks.mapping.table_writer import PlannedRow
from logto_webhooks.records.record import Key

Result = tuple[str, PlannedRow, RowState]  # of a mapping: what was planned, and what became of it
Unwritten = Literal["waiting", "held", "ambiguous", "refused"]
Outcome = Literal["excluded", "linked", "created", "changed", "deleted"] | Unwritten
_UNWRITTEN: Final = ("waiting", "held", "ambiguous", "refused")


class Page(Struct, frozen=True):
    """Records of one transaction, and what was done. With `is_again`, they were put off in an
    earlier page, or the memberships are over."""

    keys: Sequence[Key]
    results: Sequence[Result]
    is_again: bool


class AppliedMapping(Struct, kw_only=True):
    """What became of all records of a mapping: how many get no row, because of `where` or
    `create=False`, of how many an existing row was linked, a row was created, changed or deleted,
    of how many the deletion is held, how many could be linked in
    several ways, how many wait for another row or a value, and how many others weren't written."""

    mapping: str
    records: int = 0
    excluded: int = 0
    linked: int = 0
    created: int = 0
    changed: int = 0
    deleted: int = 0
    held: int = 0
    ambiguous: int = 0
    waiting: int = 0
    refused: int = 0


class Tally:
    """Counts each record of each mapping once: by its own page, or by what a later page made of a
    row that was refused. A row can also be written with an earlier page, because another row wants
    a value that it gives up."""

    def __init__(self, mappings: Mappings, run: ApplyRun) -> None:
        self._by_name = {each.name: AppliedMapping(mapping=each.name) for each in mappings.all}
        self._entities = {each.name for each in mappings.entities}
        # What other rows can wait for, as their states name it.
        self._ends: dict[str, str] = {each.name: each.kind for each in mappings.entities}
        self._ends |= {each.name: each.pair for each in mappings.pairs}
        self._unwritten: dict[str, dict[str, Outcome]] = {name: {} for name in self._by_name}
        self._early: dict[str, dict[str, Outcome]] = {name: {} for name in self._by_name}
        self._run = run
        self._begun: list[str] = []
        self._last = ""

    def finish(self) -> list[AppliedMapping]:
        """Return the counts of all mappings, with rows that are on no page, such as those of
        memberships that are over."""
        for name, outcomes in self._early.items():
            for outcome in outcomes.values():
                self._count(name, outcome, 1)
        return list(self._by_name.values())

    @property
    def records(self) -> int:
        """How many records were counted."""
        return sum(each.records for each in self._by_name.values())

    def begin(self, mapping: RegisteredMapping) -> None:
        """Begin with the pages of a mapping."""
        self._begun.append(mapping.name)
        self._last = ""

    def add_page(self, page: Page) -> None:
        """Count the records of a page."""
        name = self._begun[-1]
        own = {key.id for key in page.keys}
        if not page.is_again:
            self._by_name[name].records += len(page.keys)
            self._last = page.keys[-1].id
        for of, plan, state in page.results:
            if of == name and state.reason == COMPARING:
                if self._run.rehearses and not page.is_again:
                    self._run.find_rows(name).records.append(plan.logto_id)
                continue
            outcome = self._judge(of, plan, state)
            # A record can have several rows in a mapping of roles.
            if of == name and (plan.logto_id in own or of not in self._entities):
                self._count_own(of, plan.logto_id, outcome)
            elif outcome is not None:
                is_later = of not in self._begun or (of == name and plan.logto_id > self._last)
                self._count_other(of, plan.logto_id, outcome, is_later)

    def _count_own(self, name: str, logto_id: str, outcome: Outcome | None) -> None:
        early = self._early[name].pop(logto_id, None)
        if early is not None and early not in _UNWRITTEN:
            outcome = early
        if outcome is not None:
            self._count(name, outcome, 1)
        if outcome in _UNWRITTEN:
            self._unwritten[name][logto_id] = outcome

    def _count_other(self, name: str, logto_id: str, outcome: Outcome, is_later: bool) -> None:
        if is_later:
            self._early[name][logto_id] = outcome
            return
        before = self._unwritten[name].pop(logto_id, None)
        if before is None:
            return
        self._count(name, before, -1)
        self._count(name, outcome, 1)
        if outcome in _UNWRITTEN:
            self._unwritten[name][logto_id] = outcome

    def _count(self, name: str, outcome: Outcome, by: int) -> None:
        applied = self._by_name[name]
        setattr(applied, outcome, getattr(applied, outcome) + by)

    def _judge(self, name: str, plan: PlannedRow, state: RowState) -> Outcome | None:
        outcome = find_outcome(plan, state, self._run)
        note_parent(self._ends[name], plan, outcome, self._run)
        return outcome


def find_outcome(plan: PlannedRow, state: RowState, run: ApplyRun) -> Outcome | None:
    """Return what became of a row, or what would have, if this is a rehearsal: then what a row
    waits for isn't in the database. None if there was nothing to do."""
    if state.state in ("held", "excluded"):
        return state.state
    if plan.waits_for_end and run.has_parent(state.blocked_by):
        return "created"
    if state.state == "waiting":
        return "waiting"
    if state.state != "ok":
        return "ambiguous" if state.reason in AMBIGUOUS else "refused"
    if plan.links:
        return "linked"
    outcomes: dict[str, Outcome] = {"insert": "created", "update": "changed", "delete": "deleted"}
    return outcomes.get(plan.action)


def note_parent(kind: str, plan: PlannedRow, outcome: Outcome | None, run: ApplyRun) -> None:
    """Note in a rehearsal whether other rows could refer to a row. If there was nothing to do, it
    is there, or was written before others in this transaction, and noted earlier."""
    if run.rehearses and outcome is not None and kind in ("user", "organization", "member"):
        is_written = outcome in ("created", "linked")
        run.note_parent(blocker(kind, plan.logto_id), is_written=is_written)
