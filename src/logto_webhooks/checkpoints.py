"""The names of the checkpoints that a database keeps."""

from __future__ import annotations

from typing import Final

RECOVER: Final = "recover"
RECONCILE: Final = "reconcile"
INSTALLED: Final = "installed"  # before that, nothing runs handlers
CLOCK: Final = "clock"  # the latest moment that the database's clock told
FLOW: Final = "flow"
SILENT: Final = "silent"
