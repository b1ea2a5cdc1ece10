"""What status and searches read: small indexes, and not the tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from logto_webhooks.database.schema import is_doubtful
from logto_webhooks.database.store import Store
from tests.integration.conftest import Run
from tests.support.plans import explain, noting


def reads_no_row(store: Store, work: Callable[[Store], object], place: int) -> bool:
    """Whether a statement of some work reads only an index."""
    connection = store.connection
    if connection.dialect.name == "postgresql":
        return "Index Only Scan" in explain(store, work)[place]
    with noting(connection) as ran:
        work(store)
    statement, values = ran[place]
    steps = connection.exec_driver_sql(f"EXPLAIN {statement}", values).all()
    table = next(step.p1 for step in steps if step.opcode == "OpenRead")
    return not any(step.opcode == "Column" and step.p1 == table for step in steps)


@pytest.mark.parametrize(
    ("work", "place", "index"),
    [
        (lambda store: store.count_records(is_doubtful), 0, "logto_records_doubtful"),
        (Store.oldest_pending_s, 0, "logto_deliveries_due"),
        (Store.count_deliveries, 1, "logto_deliveries_due"),
    ],
)
def test_what_a_scrape_counts_is_read_from_an_index(
    run: Run, work: Callable[[Store], object], place: int, index: str
) -> None:
    """Not from the rows, which may be millions and have the bodies."""
    assert index in run(lambda store: explain(store, work)[place])
    assert run(lambda store: reads_no_row(store, work, place))


def test_a_status_counts_records_in_doubt_in_their_index(run: Run) -> None:
    """It is used only for the very words of its condition."""
    plans = run(lambda store: explain(store, Store.status))
    assert any("logto_records_doubtful" in plan for plan in plans)


def test_a_user_is_found_by_email_in_any_case_with_an_index(run: Run) -> None:
    """Together with all other ways to name a user."""

    def find(store: Store) -> str:
        connection = store.connection
        with noting(connection) as ran:
            store.find("user", "Ana@Example.com", 1)
        words = "EXPLAIN QUERY PLAN"
        if connection.dialect.name == "postgresql":
            words = "EXPLAIN"
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
        statement, values = ran[0]
        plan = connection.exec_driver_sql(f"{words} {statement}", values)
        return "\n".join(str(row) for row in plan)

    plan = run(find)
    assert "logto_users_email_folded" in plan
    assert "logto_users_username" in plan
