"""`docs/tutorial.md` as its reader uses it: each block in its file, or run, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.pages.examples import alike
from tests.support import postgres
from tests.support.doc_reader import Reader, steps

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BEGINNING = "\n## Start the service\n"  # the text before it says how to install


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with postgres.own_database() as url:
        psycopg = url.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(psycopg, poolclass=sa.NullPool)
        mine = url.render_as_string(hide_password=False)
        theirs = ("-h 127.0.0.1 -U postgres tutorial", "postgresql://postgres@127.0.0.1/tutorial")
        made = Reader(tmp_path, engine, {theirs[0]: f"'{mine}'", theirs[1]: mine})
        try:
            yield made
        finally:
            made.end()


def test_the_tutorial_runs_as_printed(reader: Reader) -> None:
    """From a service on an empty database to a dead job that is mended, and what is printed."""
    printed = ""
    [_, page] = PAGE.read_text().split(BEGINNING)
    for language, text, name in steps(page):
        if language == "sh":
            printed = reader.run(text)
        elif language == "text":
            assert alike(text, printed), printed
        else:
            assert name, text
            reader.write(name, text)
