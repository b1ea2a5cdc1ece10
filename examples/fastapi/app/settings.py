"""Settings, read from the environment. README.md lists them."""

from __future__ import annotations

import os


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise SystemExit(f"{name} must be set: see README.md")
    return value


DATABASE_URL = _required("DATABASE_URL")
LOGTO_WEBHOOK_SIGNING_KEY = _required("LOGTO_WEBHOOK_SIGNING_KEY")
# Only for the stand-in for Logto's tokens in auth.py.
TOKEN_SECRET = _required("TOKEN_SECRET")
