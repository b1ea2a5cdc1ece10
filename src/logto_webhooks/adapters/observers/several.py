"""Several observers as one."""

from __future__ import annotations

import logging

from logto_webhooks.core.ports import Observer
from logto_webhooks.core.reports import Report

logger = logging.getLogger("logto_webhooks")


def several(*observers: Observer) -> Observer:
    """Tell each of them; one that raises hurts nobody, and is logged once."""
    broken: set[int] = set()

    def observe(report: Report) -> None:
        for number, each in enumerate(observers):
            try:
                each(report)
            except Exception:
                if number not in broken:
                    broken.add(number)
                    logger.exception("an observer fails; that is said only now")

    return observe
