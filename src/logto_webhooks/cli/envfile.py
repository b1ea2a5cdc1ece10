"""Read `.env`, and warn of lines that set nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Final

from dotenv.parser import Binding, Original, parse_stream

from logto_webhooks.cli import output
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.settings import FILE_VARIABLES, VARIABLES

_KNOWN: Final = (*chain(*VARIABLES.values()), *FILE_VARIABLES)
_OURS: Final = ("LOGTO_WEBHOOK_", "LOGTO_WEBHOOKS_")
logging.getLogger("dotenv").setLevel(logging.ERROR)  # its warning names no file, `_warn` does


def read(file: Path) -> dict[str, str]:
    """Read its values; warn of each line and name that sets nothing. Raises SettingInvalid."""
    bindings = _parse(file)
    _warn(file, bindings)
    return _to_values(bindings)


def values(file: Path) -> dict[str, str]:
    """Read its values, without warnings. Raises SettingInvalid."""
    return _to_values(_parse(file))


def _parse(file: Path) -> list[Binding]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return list(parse_stream(lines))
    except OSError as error:
        problem = f"it can't be read ({error.strerror})"
        raise SettingInvalid(name=str(file), problem=problem) from None
    except ValueError:
        raise SettingInvalid(name=str(file), problem="it isn't a UTF-8 text file") from None


def _to_values(bindings: Iterable[Binding]) -> dict[str, str]:
    return {binding.key: binding.value for binding in bindings if binding.key and binding.value}


def _warn(file: Path, bindings: Iterable[Binding]) -> None:
    for binding in bindings:
        if binding.error:
            line = f"{file}, line {_line_number(binding.original)}"
            output.warn(f"{line} is ignored, because it isn't of the form NAME=value.")
        elif binding.key and binding.key.startswith(_OURS) and binding.key not in _KNOWN:
            [near] = get_close_matches(binding.key, _KNOWN, n=1, cutoff=0.0)
            output.warn(f"{file}: there is no setting {binding.key}. Did you mean {near}?")


def _line_number(original: Original) -> int:
    before, _, _ = original.string.partition(original.string.strip())  # blank lines are included
    return original.line + before.count("\n")
