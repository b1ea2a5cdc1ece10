"""Imports all that commands import, for processes that are forked."""

import importlib
import pkgutil

import logto_webhooks

for name in ("alembic.command", "asyncpg", "httptools", "psycopg", "uvicorn.loops.uvloop"):
    importlib.import_module(name)
for module in pkgutil.walk_packages(logto_webhooks.__path__, "logto_webhooks."):
    if ".migrations." not in module.name and not module.name.endswith(
        ("pytest_plugin", "__main__")
    ):
        importlib.import_module(module.name)
