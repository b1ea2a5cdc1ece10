"""What a fault is, and how some are mended."""

from __future__ import annotations

from typing import Final, NamedTuple


class Fault(NamedTuple):
    """How bad it is, what is said of it, and what to do."""

    level: str
    text: str
    do: str


SEE_LOG: Final = "The service's log says why, at the time of each."
MAKE: Final = (
    "In Logto's console, make an application of the type machine-to-machine, give it the role "
    '"Logto Management API access", and set LOGTO_ENDPOINT, LOGTO_M2M_APP_ID and '
    "LOGTO_M2M_APP_SECRET."
)
CONSOLE: Final = "in Logto's console, under Webhooks"
