"""pytest fixtures: in `conftest.py`, import them beside a fixture `logto` of your own.

from logto_webhooks.testing.pytest_plugin import logto_app, logto_connection

Without the second, have a fixture `logto_connection` of your own.
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
    """None: SQLite in memory. Have one of your own that gives an open connection, and rolls it
    back."""
    return None


@pytest.fixture
def logto_app(
    logto: LogtoWebhooks, logto_connection: sa.Connection | AsyncConnection | None
) -> testing.App | testing.AsyncApp:
    """The application under test, with the handlers of the fixture `logto`; on SQLite in
    memory unless there is a connection."""
    return testing.app(logto, logto_connection)
