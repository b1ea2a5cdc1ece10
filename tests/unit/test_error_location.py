"""Where something was raised."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable

import pytest

from logto_webhooks.handlers.call import error_location


def raises() -> None:
    json.loads("{")


def wraps() -> None:
    raises()


def caught(function: Callable[[], None]) -> Exception:
    with pytest.raises(json.JSONDecodeError) as found:
        function()
    return found.value


def test_the_line_of_the_application_is_told() -> None:
    """The innermost of the handler's own module, not of what it calls."""
    where = error_location(caught(wraps), wraps)
    assert where == f"test_error_location.py:{raises.__code__.co_firstlineno + 1} raises"


def test_what_was_raised_elsewhere_has_no_line() -> None:
    """As when its time was over."""
    assert error_location(caught(wraps), traceback.format_exc) is None
    assert error_location(ValueError("never raised"), wraps) is None
