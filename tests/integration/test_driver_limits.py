"""An application's engine whose driver waits less long for a statement than we would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from logto_webhooks.database.postgres import Postgres
from logto_webhooks.database.store import STATEMENT_S
from logto_webhooks.mapping.apply import OWED, retry_unsettled
from tests.integration.test_mapping_slow_rows import (
    OTHERS,
    SLOW_USERS,
    check_done,
    created,
    renamed,
    slow_down,
)
from tests.support import postgres
from tests.support.mapped_application import Application, counts_of
from tests.support.stores import Copy

COMMAND_TIMEOUT_S = 1.0


@pytest.mark.postgres
def test_a_slow_row_is_found_before_the_driver_gives_up(tmp_path: Path) -> None:
    """The driver would lose the connection, and with it the transaction of all."""

    async def live(application: Application) -> None:
        await application.host.close()
        engine: Any = create_async_engine(
            postgres.server_url().set(drivername="postgresql+asyncpg"),
            connect_args={"command_timeout": COMMAND_TIMEOUT_S},
        )
        application.host = Postgres(engine, postgres.schema(), owns=False).host
        host = await application.map()
        await Copy(host).take(created("slow", *OTHERS))
        slow_down(application, application.users, "update", SLOW_USERS, 2.0)
        assert COMMAND_TIMEOUT_S < 2.0 < STATEMENT_S
        await Copy(host).take(renamed("slow", *OTHERS))
        await check_done(host)
        await retry_unsettled(host, application.mappings, OWED)
        counts = await counts_of(host, application.users)
        assert (counts.ok, counts.owed) == (len(OTHERS), 1)
        await host.close()
        await engine.dispose()

    Application.run("asyncpg", tmp_path, live)
