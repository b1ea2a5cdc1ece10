"""Where something was raised, and what is kept of its traceback."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable

import pytest

from logto_webhooks.handlers.call import error_location, format_error


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


class Called:
    def __call__(self) -> None:
        raises()


@pytest.mark.parametrize(
    "function", [wraps, functools.partial(wraps), Called()], ids=["function", "partial", "object"]
)
def test_the_module_is_of_what_is_called(function: Callable[[], None]) -> None:
    """Not of functools, whose partial has a module, too."""
    assert str(error_location(caught(function), function)).endswith(" raises")


def test_a_traceback_without_the_application_is_whole() -> None:
    """As of what was raised before the handler was called."""
    error = caught(wraps)
    whole = "".join(traceback.format_exception(error))
    assert format_error(error, traceback.format_exc) == whole
