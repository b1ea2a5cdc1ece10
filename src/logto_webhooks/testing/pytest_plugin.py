"""pytest fixtures. Import them in `conftest.py`, and write a fixture `logto`.

`from logto_webhooks.testing.pytest_plugin import logto_app, logto_connection`

Instead of importing `logto_connection`, you can write your own.
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
    """Return None, for SQLite in memory. Override it to use a connection, and roll that back."""
    return None


@pytest.fixture
def logto_app(
    logto: LogtoWebhooks, logto_connection: sa.Connection | AsyncConnection | None
) -> testing.App | testing.AsyncApp:
    """Return the application under test, with the handlers of the fixture `logto`. Without a
    connection, it runs on SQLite in memory."""
    return testing.app(logto, logto_connection)
