"""`docs/testing.md` as its reader uses it: each block in a file, run by pytest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import postgres
from tests.support.doc_runner import Page

TEXT = Path(__file__).parents[2] / "docs" / "testing.md"
FILES = (
    *("shop", "conftest", "test_greetings", "test_retries", "club", "test_people"),
    *("test_awaited", "test_fixture", "test_http"),
)
# What the page says in words: the fixture on an AsyncConnection, and in memory.
FIXTURES = """
import pytest
import test_awaited
from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.testing.pytest_plugin import logto_app, logto_connection
from test_awaited import anyio_backend, engine

class TestAwaited:
    @pytest.fixture
    def logto(self):
        return test_awaited.logto

    @pytest.fixture
    async def logto_connection(self, logto):
        await logto.migrate()
        async with engine.connect() as connection:
            yield connection
            await connection.rollback()
        await engine.dispose()

    @pytest.mark.anyio
    async def test_everybody_is_greeted(self, logto_app):
        delivered = await logto_app.deliver(testing.make.sign_up())
        assert delivered.ran == ["test_awaited:greet"]

class TestInMemory:
    @pytest.fixture
    def logto(self):
        logto = LogtoWebhooks(signing_key="x", database_url="sqlite:///never.db")
        logto.on(events.PostSignIn, name="tell")(lambda event: None)
        return logto

    def test_everybody_is_told(self, logto_app):
        assert logto_app.deliver(testing.make.post_sign_in()).ran == ["tell"]
"""
PYTEST = "python -m pytest -q -W error -p no:cacheprovider"
PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "anyio.pytest_plugin"}


@pytest.fixture
def url() -> Iterator[str]:
    """A database of its own: the page names no schema."""
    with postgres.own_database() as made:
        yield made.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)


def test_the_page_about_testing_runs_as_printed(tmp_path: Path, url: str) -> None:
    """Synchronous, with retries and mapped tables, awaited, by the fixture, and over HTTP."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT.read_text(), re.DOTALL)
    page = Page(tmp_path, environment=PLUGINS | {"TEST_DATABASE_URL": url})
    for name, block in zip(FILES, blocks, strict=True):
        page.write(f"{name}.py", block)
    page.write("test_fixtures.py", FIXTURES)
    assert "13 passed" in page.run(PYTEST)
