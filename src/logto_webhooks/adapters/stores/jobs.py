"""Handlers, their jobs and the lines in which those wait, on a Connection whose transaction is the
caller's.

Who holds a line runs its first job. Whoever adds a job, or moves one by hand, touches its line,
which waits for who is just ending a job of it: so no job is left in a line that nobody wakes.
Lines are held before the jobs in them, and in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from logto_webhooks.adapters.stores import job_lists
from logto_webhooks.adapters.stores import job_statements as statements
from logto_webhooks.adapters.stores.dialect import INSERT, now
from logto_webhooks.adapters.stores.schema import handlers, jobs, lines
from logto_webhooks.core.jobs import (
    Job,
    JobCount,
    JobFilter,
    JobOutcome,
    JobRow,
    NewJob,
    Registered,
)
from logto_webhooks.core.lifecycle import JobMove, JobState, job_targets

LOCKED_MS: Final = 1_000  # until a job is looked at again that was locked


class SqlJobs:
    """The Jobs of a SqlStore."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def handlers(self) -> list[Registered]:
        """All that are registered, whichever process has their code."""
        found = self._connection.scalars(statements.HANDLERS)
        return [msgspec.convert(options, Registered) for options in found]

    def register(self, new: Sequence[Registered]) -> None:
        """Make them known, or known as they are now."""
        for each in sorted(new, key=lambda handler: handler.name):
            insert = INSERT[self._connection.dialect.name](handlers)
            options = msgspec.to_builtins(each)
            values = {"name": each.name, "options": options, "registered_at": now()}
            self._connection.execute(
                insert.values(values).on_conflict_do_update(
                    index_elements=["name"], set_={"options": insert.excluded.options}
                )
            )

    def forget(self, name: str) -> int:
        """Take a handler out with what waits for it; return how many jobs that were."""
        waiting = (jobs.c.handler == name, jobs.c.state == JobState.WAITING)
        self._connection.execute(sa.delete(handlers).where(handlers.c.name == name))
        self._connection.execute(statements.LOCK_OF_HANDLER, {"name": name})
        self._connection.execute(sa.delete(lines).where(lines.c.handler == name))
        over = sa.update(jobs).where(*waiting).values(state=JobState.DISCARDED, finished_at=now())
        return self._connection.execute(over).rowcount

    def add(self, new: Sequence[NewJob]) -> None:
        """Make jobs, each once for its handler and key, and see that their lines are due."""
        if not new:
            return
        rows = [_row(each) for each in new]
        self._write(statements.add_jobs(self._connection.dialect.name), rows)
        self._touch({(each.handler, each.line) for each in new})

    def claim(
        self,
        token: str,
        room: Mapping[str, int],
        lease_s: float,
        *,
        lost: bool = True,
        skip_locked: bool = False,
    ) -> list[Job]:
        """Take the first job of each due line, of so many of each handler; nobody else gets a
        line during the lease.

        Of lines whose lease ran out it takes one, or none unless `lost`.
        To `skip_locked` is to take no job whose row another transaction holds.
        """
        due: list[int] = []
        of_lost: list[int] = []
        for name, most in room.items():
            wanted = {"name": name, "most": most, "lost": lost and not of_lost}
            for line, holder in self._connection.execute(statements.DUE, wanted):
                (due if holder is None else of_lost).append(line)
        due += of_lost[:1]
        if not due:
            return []
        held = {"ids": due, "by": token, "lease_ms": int(lease_s * 1000)}
        self._connection.execute(statements.HOLD, held)
        heads = statements.FREE_HEADS if skip_locked else statements.HEADS
        rows = self._connection.execute(heads, {"ids": due}).mappings().all()
        ids = {"ids": [row["id"] for row in rows]}
        self._connection.execute(statements.COUNT, ids)
        empty = set(due) - {row["line_id"] for row in rows}
        if empty:
            self._connection.execute(statements.DROP_EMPTY, {"ids": list(empty)})
            if skip_locked:  # what is left of them has a first job that is locked
                later = {"ids": list(empty), "wait_ms": LOCKED_MS}
                self._connection.execute(statements.FREE, later)
        return [Job(**row | {"late": bool(row["late"])}) for row in map(dict, rows)]

    def lock(self, line_ids: Sequence[int]) -> None:
        """Let nobody change lines until the transaction ends, in the order of `_touch`."""
        self._connection.execute(statements.LOCK, {"ids": list(line_ids)})

    def held_elsewhere(
        self, line_ids: Sequence[int], job_ids: Sequence[int]
    ) -> tuple[set[int], set[int]]:
        """Hold lines and jobs without waiting; return those that another transaction holds."""
        return (
            self._busy(statements.LOCK_FREE_LINES, statements.KNOWN_LINES, line_ids),
            self._busy(statements.LOCK_FREE_JOBS, statements.KNOWN_JOBS, job_ids),
        )

    def renew(self, token: str, line_ids: Sequence[int], lease_s: float) -> None:
        """Hold lines longer."""
        held = {"ids": list(line_ids), "by": token, "lease_ms": int(lease_s * 1000)}
        self._connection.execute(statements.RENEW, held)

    def finish(self, token: str, outcomes: Sequence[JobOutcome]) -> list[int]:
        """Write outcomes, and let the lines go on; return the ids of jobs no longer held by
        `token`, or discarded meanwhile, of which nothing was written."""
        lines_held = {"ids": [each.line_id for each in outcomes], "by": token}
        held = set(self._connection.scalars(statements.HELD, lines_held))
        ours = [each for each in outcomes if each.line_id in held]
        if not ours:
            return [each.id for each in outcomes]
        begun = set(self._connection.scalars(statements.BEGUN, {"ids": [each.id for each in ours]}))
        kept = [each for each in ours if each.id in begun]
        waits = {each.line_id: int(each.after_s * 1000) for each in kept}
        self._alike(statements.FINISH, {each.id: _outcome(each) for each in kept})
        self._alike(statements.FREE, {line: {"wait_ms": waits.get(line, 0)} for line in held})
        self._connection.execute(statements.DROP_EMPTY, {"ids": sorted(held)})
        written = {each.id for each in kept}
        return [each.id for each in outcomes if each.id not in written]

    def counts(self) -> list[JobCount]:
        """Count jobs by handler and state; the oldest that waits, too."""
        return job_lists.counts(self._connection)

    def find(self, wanted: JobFilter) -> list[JobRow]:
        """List jobs, the newest first."""
        return job_lists.find(self._connection, wanted)

    def move(self, ids: Sequence[int], move: JobMove) -> list[int]:
        """Repeat or discard jobs by hand, where that can be; return the ids of those."""
        some = {"ids": list(ids)}
        targets = job_targets(move)
        in_line = {state for state, to in targets.items() if JobState.WAITING in (state, to)}
        places = self._connection.execute(statements.PLACES, some).all()
        self._touch({(at.handler, at.line) for at in places if at.state in in_line}, wake=True)
        moved: set[int] = set()
        for state in targets:  # what waits first: so nothing is moved twice
            moved.update(self._connection.scalars(statements.moving(state, move), some))
        return sorted(moved)

    def mend(self) -> int:
        """Make the lines that are missing where jobs wait; return how many."""
        return self._connection.execute(statements.mend(self._connection.dialect.name)).rowcount

    def _busy(self, lock_free: Any, known: Any, ids: Sequence[int]) -> set[int]:
        wanted = {"ids": list(ids)}
        free = set(self._connection.scalars(lock_free, wanted))
        if free.issuperset(ids):
            return set()
        return set(self._connection.scalars(known, wanted)) - free

    def _touch(self, touched: set[tuple[str, str]], *, wake: bool = False) -> None:
        statement = statements.touch_lines(self._connection.dialect.name, wake)
        if touched:
            names = [{"handler": handler, "line": line} for handler, line in sorted(touched)]
            self._write(statement, names)

    def _alike(self, statement: Any, changes: dict[int, dict[str, Any]]) -> None:
        """Change rows by id, all that change alike at once: mostly that is all of them."""
        together: dict[tuple[Any, ...], list[int]] = {}
        for row, values in changes.items():
            together.setdefault(tuple(values.items()), []).append(row)
        for alike, ids in together.items():
            self._connection.execute(statement, dict(alike) | {"ids": ids})

    def _write(self, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
        at_once = self._connection.dialect.name == "postgresql"
        arrays = {name: [row[name] for row in rows] for name in rows[0]}
        self._connection.execute(statement, arrays if at_once else rows)


def _row(job: NewJob) -> dict[str, Any]:
    return {
        "handler": job.handler,
        "key": job.key,
        "event": job.event.replace("\0", ""),
        "subject": job.subject,
        "line": job.line,
        "occurred_at": job.occurred_at,
        "delivery_id": job.delivery_id,
        "payload": job.payload,
    }


def _outcome(each: JobOutcome) -> dict[str, Any]:
    return {
        "state": each.state.value,
        "error": None if each.error is None else _clean(each.error),
        "failed": int(each.failed),
        "not_counted": int(not each.counts),
        "is_over": each.state is not JobState.WAITING,
    }


def _clean(text: str) -> str:
    """As any database takes it: no NUL, no lone surrogates."""
    return text.replace("\0", "").encode(errors="backslashreplace").decode()
