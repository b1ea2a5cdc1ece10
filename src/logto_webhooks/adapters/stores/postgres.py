"""The engine for PostgreSQL: any spelling of its URL, and durable commits."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from logto_webhooks.core import canonical
from logto_webhooks.errors import SettingInvalid

# A transaction in which what follows a lock sees what others committed before it.
LEVEL: Final = "READ COMMITTED"
CONNECT_S: Final = 3.0
CANCEL_EVERY_S: Final = 0.1
STATEMENT_S: Final = 8.0


def engine_of(url: sa.URL, **pool: Any) -> AsyncEngine:
    """Make an engine; it connects on first use. Raises SettingInvalid.

    `postgres://…` and `postgresql://…` use asyncpg; `+asyncpg` and `+psycopg` name a driver.
    `?pgbouncer=true` is for PgBouncer in transaction mode, which hands connections around:
    nothing is prepared ahead then.
    `pool` are SQLAlchemy's options of a pool, instead of ours.
    """
    driver = url.get_driver_name() if "+" in url.drivername else "asyncpg"
    if driver not in _OPTIONS:
        problem = f"the driver {driver} isn't asyncpg or psycopg"
        raise SettingInvalid(name="LOGTO_WEBHOOKS_DATABASE_URL", problem=problem)
    shared = url.query.get("pgbouncer") == "true"
    return create_async_engine(
        url.set(drivername=f"postgresql+{driver}").difference_update_query(["pgbouncer"]),
        connect_args=_OPTIONS[driver] | (_UNPREPARED[driver] if shared else {}),
        isolation_level=LEVEL,
        hide_parameters=True,
        json_serializer=lambda value: canonical.encode(value).decode(),
        json_deserializer=canonical.decode,
        **(pool or _POOL),
    )


def stop(connection: sa.Connection) -> None:
    """Close it, from any thread; a statement that runs is cancelled.

    psycopg crashes when it is closed while it sends something: its lock is waited for.
    """
    driver: Any = connection.connection.driver_connection
    lock = getattr(driver, "lock", None)
    while lock and not lock.acquire(timeout=CANCEL_EVERY_S):
        with suppress(Exception):  # what can't be cancelled ends by itself
            driver.cancel_safe(timeout=CONNECT_S)
    try:
        driver.close()
    finally:
        if lock:
            lock.release()


# A worker that was paused in the middle of a transaction must not hold its locks for ever.
_IDLE: Final = "10s"
_NAME: Final = "logto-webhooks"
_POOL: Final[dict[str, Any]] = {"pool_size": 5, "max_overflow": 5, "pool_timeout": CONNECT_S}
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {
        "timeout": CONNECT_S,
        "command_timeout": STATEMENT_S,
        "server_settings": {
            "application_name": _NAME,
            "idle_in_transaction_session_timeout": _IDLE,
            # Also where the client can't be reached any more, or has given up.
            "statement_timeout": f"{STATEMENT_S:.0f}s",
        },
    },
    "psycopg": {
        "application_name": _NAME,
        "connect_timeout": int(CONNECT_S),
        "options": f"-c idle_in_transaction_session_timeout={_IDLE} "
        f"-c statement_timeout={STATEMENT_S:.0f}s",
        "tcp_user_timeout": int(STATEMENT_S * 1000),
    },
}
_UNPREPARED: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {
        "server_settings": {"application_name": _NAME},
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"logto_{uuid.uuid4().hex}",
    },
    "psycopg": {"prepare_threshold": None, "options": ""},
}
