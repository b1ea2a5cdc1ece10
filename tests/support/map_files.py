"""Databases with an application's own tables, which a file maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from tests.support import postgres

Kind = Literal["sqlite", "asyncpg", "psycopg"]
KINDS: tuple[Kind, ...] = ("sqlite", "asyncpg", "psycopg")


class OwnDatabase:
    """A database of an application, and what a service needs to use it."""

    def __init__(self, folder: Path, url: sa.URL, driver: str) -> None:
        self.folder = folder
        self.engine = sa.create_engine(url.set(drivername=driver))
        self.url = url.render_as_string(hide_password=False)

    @property
    def variables(self) -> dict[str, str]:
        """The settings of the database."""
        return {"DATABASE_URL": self.url}

    def execute(self, *statements: str) -> None:
        """Run SQL."""
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Read rows."""
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def write(self, text: str, name: str = "logto-webhooks.toml") -> Path:
        """Write the file with mappings."""
        file = self.folder / name
        file.write_text(text)
        return file


@contextmanager
def own_database(kind: Kind, folder: Path) -> Iterator[OwnDatabase]:
    """An empty database."""
    if kind == "sqlite":
        url = sa.make_url(f"sqlite:///{folder / 'app.db'}")
        database = OwnDatabase(folder, url, "sqlite")
        yield database
        database.engine.dispose()
        return
    with postgres.own_database() as url:
        named = url.set(drivername="postgresql" if kind == "asyncpg" else "postgresql+psycopg")
        database = OwnDatabase(folder, named, "postgresql+psycopg")
        yield database
        database.engine.dispose()
