"""The names of the checkpoints that a database keeps."""

from __future__ import annotations

from typing import Final

RECOVER: Final = "recover"
RECONCILE: Final = "reconcile"
