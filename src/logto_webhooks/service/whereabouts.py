"""Where in an application's code something was raised."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import PurePath
from typing import Any


def whereabouts(error: BaseException, function: Callable[..., Any]) -> str | None:
    """The innermost line of a function's own module, as `file.py:12 name`; None if there is none.

    No value is in it, and of the file only the name.
    """
    module = getattr(function, "__module__", None)
    inner = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if module is not None and frame.f_globals.get("__name__") == module:
            code = frame.f_code
            inner = f"{PurePath(code.co_filename).name}:{line} {code.co_qualname}"
    return inner
