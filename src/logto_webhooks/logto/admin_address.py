"""Recognize the admin address of a self-hosted Logto."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

ADMIN_PORT: Final = 3002
ADMIN_APPLICATION: Final = "m-default"
CORE: Final = (
    "Set LOGTO_ENDPOINT to Logto's core address (port 3001 unless you changed it), and "
    "LOGTO_M2M_APP_ID and LOGTO_M2M_APP_SECRET to a machine-to-machine application that you made "
    "in Logto's console."
)


def signs_of_admin(endpoint: str | None, app_id: str | None) -> str:
    """What says that settings are of the admin side; empty if nothing does."""
    signs = []
    try:
        port = urlsplit(endpoint or "").port
    except ValueError:
        port = None
    if port == ADMIN_PORT:
        signs.append(f"LOGTO_ENDPOINT has port {ADMIN_PORT}, the port of Logto's admin side")
    if (app_id or "").strip() == ADMIN_APPLICATION:
        signs.append(
            f"LOGTO_M2M_APP_ID is {ADMIN_APPLICATION}, the built-in application of Logto's "
            "admin side"
        )
    return ", and ".join(signs)
