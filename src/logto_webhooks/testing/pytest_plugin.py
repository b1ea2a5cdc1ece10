"""pytest fixtures: import them in `conftest.py`, next to a fixture `logto` of your own.

`from logto_webhooks.testing.pytest_plugin import logto_app, logto_connection`

Instead of importing the second, you can write a fixture `logto_connection` of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from logto_webhooks import testing

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

    from logto_webhooks.app import LogtoWebhooks


@pytest.fixture
def logto_connection() -> sa.Connection | AsyncConnection | None:
    """None, for SQLite in memory. Write your own to return an open connection, and roll it back."""
    return None


@pytest.fixture
def logto_app(
    logto: LogtoWebhooks, logto_connection: sa.Connection | AsyncConnection | None
) -> testing.App | testing.AsyncApp:
    """The application under test, with the handlers of the fixture `logto`, on SQLite in memory
    unless there is a connection."""
    return testing.app(logto, logto_connection)
