"""`docs/tutorial.md` as its reader uses it: each block in its file, or run, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support import postgres
from tests.support.doc_runner import Page

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
BEGINNING = "\n## Start the service\n"  # the text before it says how to install


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with postgres.own_database() as url:
        psycopg = url.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(psycopg, poolclass=sa.NullPool)
        mine = url.render_as_string(hide_password=False)
        theirs = ("-h 127.0.0.1 -U postgres tutorial", "postgresql://postgres@127.0.0.1/tutorial")
        page = Page(tmp_path, {theirs[0]: f"'{mine}'", theirs[1]: mine}, engine=engine)
        try:
            yield page
        finally:
            page.end()


def test_the_tutorial_runs_as_printed(page: Page) -> None:
    """From a service on an empty database to a dead job that is mended, and what is printed."""
    [_, text] = TUTORIAL.read_text().split(BEGINNING)
    page.follow(text)
