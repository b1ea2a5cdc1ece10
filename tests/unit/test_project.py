"""What the project promises of itself."""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from logto_webhooks import testing
from logto_webhooks.database import open_database
from logto_webhooks.database.schema import VERSION_TABLE, metadata_with_indexes

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_a_module_is_typed(module: Path) -> None:
    """No type is ignored."""
    assert "type: ignore" not in module.read_text()


# SQLAlchemy reads no index of an expression from SQLite.
@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    """No column or index is in one and not in the other."""
    file = tmp_path / "x.db"
    asyncio.run(open_database(f"sqlite:///{file}").migrate())
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata_with_indexes()) == []
    engine.dispose()


def test_nothing_names_a_machine() -> None:
    """No path of a machine and no registry's host is in what is tracked."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith("tests/recorded/") and "/histories/" not in name:
            text = (ROOT / name).read_text()
            assert not re.search(
                r"/(?:home|root|work|Users)/\w|--(?:extra-)?index-url|file:///\w", text
            ), name


def test_contributing_is_short() -> None:
    """At most 120 lines."""
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120


def test_the_example_of_testing_holds() -> None:
    """The docstring of `testing` is run."""
    import doctest

    result = doctest.testmod(testing)
    assert result.attempted > 0
    assert result.failed == 0
