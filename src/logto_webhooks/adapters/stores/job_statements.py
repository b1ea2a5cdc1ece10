"""The statements of jobs, each built once; those that insert differ per database."""

from __future__ import annotations

import functools
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores.dialect import INSERT, among, by_code, now
from logto_webhooks.adapters.stores.schema import deliveries, handlers, jobs, lines
from logto_webhooks.adapters.stores.write import given
from logto_webhooks.core.lifecycle import JOB_MOVES, JobMove, JobState

_IS_WAITING = jobs.c.state == sa.literal_column("'waiting'")
_FIRST = jobs.alias("first")
_NEWER = jobs.alias("newer")

HANDLERS = sa.select(handlers.c.options).order_by(handlers.c.name)
DUE = (
    sa.select(lines.c.id, lines.c.token)
    .where(lines.c.handler == sa.bindparam("name"), lines.c.due_at <= now())
    .where(lines.c.token.is_(None) | sa.bindparam("lost", type_=sa.Boolean))
    .order_by(lines.c.due_at)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
HOLD = (
    sa.update(lines)
    .where(among(lines.c.id, "ids"))
    .values(token=sa.bindparam("by"), due_at=now() + sa.bindparam("lease_ms"))
)
RENEW = (
    sa.update(lines)
    .where(among(lines.c.id, "ids"), lines.c.token == sa.bindparam("by"))
    .values(due_at=now() + sa.bindparam("lease_ms"))
)
_LOCKED = (
    sa.select(lines.c.id)
    .order_by(by_code(lines.c.handler), by_code(lines.c.line))  # as `touch_lines` is given them
    .with_for_update()
)
LOCK = _LOCKED.where(among(lines.c.id, "ids"))
LOCK_OF_HANDLER = _LOCKED.where(lines.c.handler == sa.bindparam("name"))
KNOWN_LINES = sa.select(lines.c.id).where(among(lines.c.id, "ids"))
LOCK_FREE_LINES = KNOWN_LINES.with_for_update(skip_locked=True)
KNOWN_JOBS = sa.select(jobs.c.id).where(among(jobs.c.id, "ids"))
LOCK_FREE_JOBS = KNOWN_JOBS.with_for_update(skip_locked=True)
HELD = LOCK.where(lines.c.token == sa.bindparam("by"))
_first_of_line = (
    sa.select(_FIRST.c.id)
    .where(
        _FIRST.c.handler == lines.c.handler,
        _FIRST.c.line == lines.c.line,
        _FIRST.c.state == sa.literal_column("'waiting'"),
    )
    .order_by(_FIRST.c.occurred_at, _FIRST.c.id)
    .limit(1)
    .correlate(lines)
    .scalar_subquery()
)
_is_late = (
    sa.select(sa.literal_column("1"))
    .where(
        _NEWER.c.handler == jobs.c.handler,
        _NEWER.c.line == jobs.c.line,
        _NEWER.c.state == sa.literal_column("'done'"),
        _NEWER.c.occurred_at > jobs.c.occurred_at,
    )
    .correlate(jobs)
    .exists()
)
HEADS = (
    sa.select(
        jobs.c.id,
        lines.c.id.label("line_id"),
        jobs.c.handler,
        jobs.c.key,
        jobs.c.event,
        jobs.c.subject,
        jobs.c.occurred_at,
        jobs.c.attempts,
        jobs.c.failures,
        jobs.c.runs,
        _is_late.label("late"),
        jobs.c.delivery_id,
        deliveries.c.received_at,
        deliveries.c.origin,
        sa.func.coalesce(jobs.c.payload, deliveries.c.body).label("payload"),
    )
    .select_from(lines)
    .join(jobs, jobs.c.id == _first_of_line)
    .outerjoin(deliveries, deliveries.c.id == jobs.c.delivery_id)
    .where(among(lines.c.id, "ids"))
)
FREE_HEADS = HEADS.with_for_update(of=jobs, skip_locked=True)
_IS_BEGUN = jobs.c.attempts > jobs.c.failures  # by who holds its line, or lost it
BEGUN = sa.select(jobs.c.id).where(among(jobs.c.id, "ids"), _IS_WAITING, _IS_BEGUN)
PLACES = sa.select(jobs.c.handler, jobs.c.line, jobs.c.state).where(among(jobs.c.id, "ids"))
COUNT = sa.update(jobs).where(among(jobs.c.id, "ids")).values(attempts=jobs.c.attempts + 1)
FINISH = (
    sa.update(jobs)
    .where(among(jobs.c.id, "ids"))
    .values(
        state=sa.bindparam("state"),
        error=sa.bindparam("error"),
        failures=jobs.c.failures + sa.bindparam("failed"),
        attempts=jobs.c.attempts - sa.bindparam("not_counted"),
        finished_at=sa.case((sa.bindparam("is_over", type_=sa.Boolean), now())),
    )
)
FREE = (
    sa.update(lines)
    .where(among(lines.c.id, "ids"))
    .values(token=None, due_at=now() + sa.bindparam("wait_ms"))
)
_somebody_waits = (
    sa.select(sa.literal_column("1"))
    .where(jobs.c.handler == lines.c.handler, jobs.c.line == lines.c.line, _IS_WAITING)
    .correlate(lines)
    .exists()
)
_is_held = (
    sa.select(sa.literal_column("1"))
    .where(lines.c.handler == jobs.c.handler, lines.c.line == jobs.c.line)
    .where(lines.c.token.is_not(None), lines.c.due_at > now())
    .correlate(jobs)
    .exists()
)
DROP_EMPTY = sa.delete(lines).where(among(lines.c.id, "ids"), ~_somebody_waits)

_COLUMNS = (
    "handler",
    "key",
    "event",
    "subject",
    "line",
    "occurred_at",
    "delivery_id",
    "payload",
)


@functools.cache
def add_jobs(dialect: str) -> Any:
    """Insert the jobs that aren't there; their place in the line is now, if none is given."""
    values, source = _values(dialect, jobs, _COLUMNS)
    values["occurred_at"] = sa.func.coalesce(values["occurred_at"], now())
    values["state"] = sa.literal_column(f"'{JobState.WAITING.value}'")
    values |= {name: sa.literal_column("0") for name in ("attempts", "failures", "runs")}
    return _inserted(dialect, jobs, values, source).on_conflict_do_nothing()


@functools.cache
def touch_lines(dialect: str, wake: bool = False) -> Any:
    """Insert the lines that aren't there; those that are, are held until the transaction ends.

    To `wake` them is to let them be due now, unless somebody holds them.
    """
    values, source = _values(dialect, lines, ("handler", "line"))
    values["due_at"] = now()
    statement = _inserted(dialect, lines, values, source)
    due = sa.case((lines.c.token.is_(None), statement.excluded.due_at), else_=lines.c.due_at)
    changed = {"due_at": due} if wake else {"line": statement.excluded.line}
    return statement.on_conflict_do_update(index_elements=["handler", "line"], set_=changed)


@functools.cache
def moving(state: JobState, move: JobMove) -> Any:
    """Repeat or discard those jobs that are in a state."""
    target = JOB_MOVES[state, move].value
    statement = (
        sa.update(jobs)
        .where(among(jobs.c.id, "ids"), jobs.c.state == sa.literal_column(f"'{state.value}'"))
        .returning(jobs.c.id)
    )
    if move is JobMove.DISCARD:
        return statement.values(state=target, finished_at=now())
    afresh: dict[str, Any] = {"attempts": 0, "failures": 0}
    if state is JobState.WAITING:
        return statement.where(~(_IS_BEGUN & _is_held)).values(afresh)
    afresh |= {"occurred_at": now(), "runs": jobs.c.runs + 1, "finished_at": None}
    return statement.values(state=target, **afresh)


@functools.cache
def mend(dialect: str) -> Any:
    """Insert the lines that are missing."""
    missing = (
        sa.select(jobs.c.handler, jobs.c.line, now())
        .where(_IS_WAITING)
        .where(
            ~sa.select(sa.literal_column("1"))
            .where(lines.c.handler == jobs.c.handler, lines.c.line == jobs.c.line)
            .correlate(jobs)
            .exists()
        )
        .distinct()
    )
    statement = INSERT[dialect](lines).from_select(["handler", "line", "due_at"], missing)
    return statement.on_conflict_do_nothing()


def _values(dialect: str, table: sa.Table, columns: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    if dialect != "postgresql":
        return {name: sa.bindparam(name, type_=table.c[name].type) for name in columns}, None
    source = given(table, columns)
    return {name: source.c[name] for name in columns}, source


def _inserted(dialect: str, table: sa.Table, values: dict[str, Any], source: Any) -> Any:
    statement = INSERT[dialect](table)
    if source is None:
        return statement.values(values)
    return statement.from_select(list(values), sa.select(*values.values()).select_from(source))
