"""The sync of a backlog, beside the bare SQL of it; and with an inbox full of finished rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import msgspec
import sqlalchemy as sa

from bench.load import deliveries
from logto_webhooks.database import Database, open_database
from logto_webhooks.database.schema import deliveries as inbox
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, identify
from logto_webhooks.runtime import make_worker
from logto_webhooks.settings import Settings
from logto_webhooks.signing_keys import trust

BATCH = 512


def backlog(count: int, seed: int) -> list[NewDelivery]:
    """Deliveries that nobody applied yet."""
    return [identify(trust(each.body), 2_000_000_000_000) for each in deliveries(count, seed)]


async def fill(database: Database, some: Sequence[NewDelivery]) -> float:
    """Put them into the inbox; return how many a second."""
    started = time.perf_counter()
    for start in range(0, len(some), BATCH):
        part = some[start : start + BATCH]
        await database.host.run(partial(_add, part))
    return len(some) / (time.perf_counter() - started)


def _add(some: Sequence[NewDelivery], store: Store) -> None:
    store.add(some)


async def filled(url: str, count: int, seed: int) -> None:
    """Accept a backlog."""
    database = open_database(url)
    await fill(database, backlog(count, seed))
    await database.host.close()


async def synced(url: str, count: int, seed: int) -> tuple[float, float]:
    """Accept and apply a backlog; return both rates."""
    database = open_database(url)
    await database.migrate()
    accepts = await fill(database, backlog(count, seed))
    worker = make_worker(Settings(), database, lambda report: None)
    started = time.perf_counter()
    while await worker.step():
        pass
    rate = count / (time.perf_counter() - started)
    await database.host.close()
    return accepts, rate


def bare(engine: sa.Engine, count: int, seed: int) -> float:
    """Read, parse, upsert, mark done, in batches of 512, with nothing else; return the rate."""
    asyncio.run(_fill_alone(engine, count, seed))
    raw = engine.raw_connection()
    cursor = raw.cursor()
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    parts = ", ".join([mark] * 5)
    upsert = (
        "INSERT INTO bare_users (logto_id, email, name, custom_data, updated_at) "
        f"VALUES ({parts}) ON CONFLICT (logto_id) DO UPDATE SET email = excluded.email, "
        "name = excluded.name, custom_data = excluded.custom_data, updated_at = excluded.updated_at"
    )
    select = f"SELECT id, body FROM bare_inbox WHERE done = 0 ORDER BY id LIMIT {BATCH}"
    started = time.perf_counter()
    while True:
        cursor.execute(select)
        rows = cursor.fetchall()
        if not rows:
            break
        values = [_values(msgspec.json.decode(bytes(body))) for _, body in rows]
        cursor.executemany(upsert, values)
        done = f"UPDATE bare_inbox SET done = 1 WHERE id = {mark}"
        cursor.executemany(done, [(row[0],) for row in rows])
        raw.commit()
    took = time.perf_counter() - started
    raw.close()
    return count / took


def _values(payload: dict[str, dict[str, object]]) -> tuple[object, ...]:
    user = payload.get("data") or payload["user"]
    data = msgspec.json.encode(user["customData"]).decode()
    return user["id"], user["primaryEmail"], user["name"], data, user["updatedAt"]


async def _fill_alone(engine: sa.Engine, count: int, seed: int) -> None:
    data = sa.MetaData()
    table = sa.Table(
        "bare_inbox",
        data,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.LargeBinary),
        sa.Column("done", sa.Integer, index=True),
    )
    sa.Table(
        "bare_users",
        data,
        sa.Column("logto_id", sa.Text, primary_key=True),
        *[sa.Column(name, sa.Text) for name in ("email", "name", "custom_data")],
        sa.Column("updated_at", sa.BigInteger),
    )
    data.drop_all(engine)
    data.create_all(engine)
    with engine.begin() as connection:
        bodies = [{"body": each.body, "done": 0} for each in deliveries(count, seed)]
        connection.execute(table.insert(), bodies)


def finished_rows(engine: sa.Engine, count: int) -> None:
    """Fill the inbox with rows that are done, older than all else."""
    digest = {
        "sqlite": "CAST(printf('%024d', n) AS BLOB)",
        "postgresql": "convert_to(lpad(n::text, 24, '0'), 'UTF8')",
    }[engine.dialect.name]
    body = {"sqlite": "zeroblob(300)", "postgresql": "decode(repeat('00', 300), 'hex')"}
    series = {
        "sqlite": "WITH RECURSIVE s(n) AS "
        f"(SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {count}) SELECT n FROM s",
        "postgresql": f"SELECT n FROM generate_series(1, {count}) AS s(n)",
    }[engine.dialect.name]
    columns = "digest, body, event, occurred_at, received_at, origin, state, attempts, due_at"
    values = f"{digest}, {body[engine.dialect.name]}, 'User.Created', n, n, 'webhook', 'done', 1, n"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO {inbox.name} ({columns}) SELECT {values} FROM ({series}) AS given"
        )
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"ANALYZE {inbox.name}")
