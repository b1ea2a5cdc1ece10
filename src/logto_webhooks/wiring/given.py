"""The application's own engine as a Database: opened and disposed of by the application."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Union

import sqlalchemy as sa

from logto_webhooks.errors import SettingInvalid
from logto_webhooks.wiring.databases import Database, SqliteFile

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

Engine = Union[sa.Engine, "AsyncEngine"]
_PLAIN: Final = "give the engine that it was made of"


def given_database(engine: Engine, schema: str | None) -> Database:
    """Choose by the engine. Of SQLite the file alone is taken: how it is written must be durable,
    and one writes at a time. Raises SettingInvalid."""
    if not isinstance(getattr(engine, "url", None), sa.URL):
        problem = f"it must be an Engine or an AsyncEngine, not {type(engine).__name__}"
        hint = "; a URL is given as database_url"
        raise SettingInvalid(name="engine", problem=f"{problem}{hint}")
    backend = engine.url.get_backend_name()
    if backend == "sqlite":
        file = engine.url.database
        if not file or file == ":memory:":
            problem = "it names no file, and what is only in memory can't be durable"
            raise SettingInvalid(name="engine", problem=problem)
        return SqliteFile(Path(file))
    if backend != "postgresql":
        problem = f"it must be of SQLite or PostgreSQL, not {backend}"
        raise SettingInvalid(name="engine", problem=problem)
    # Imported only when used: greenlet comes with the extra `postgres`.
    from logto_webhooks.adapters.stores.postgres import LEVEL
    from logto_webhooks.wiring.postgres import Postgres, ThreadedPostgres

    level = str(engine.get_execution_options().get("isolation_level", LEVEL))
    if level.upper().replace("_", " ") != LEVEL:
        problem = f"its execution_options say {level}, which can't be changed: {_PLAIN}"
        raise SettingInvalid(name="engine", problem=problem)
    if isinstance(engine, sa.Engine):
        return ThreadedPostgres(engine, schema)
    return Postgres(engine, schema, owns=False)
