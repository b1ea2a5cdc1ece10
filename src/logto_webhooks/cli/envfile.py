"""The file `.env`: what it sets, and what in it sets nothing."""

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
    """What it sets; a warning for each line and name that sets nothing. Raises SettingInvalid."""
    bindings = _bindings(file)
    _warn(file, bindings)
    return _values(bindings)


def values(file: Path) -> dict[str, str]:
    """The same, of a file that was read before. Raises SettingInvalid."""
    return _values(_bindings(file))


def _bindings(file: Path) -> list[Binding]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return list(parse_stream(lines))
    except OSError as error:
        problem = f"it can't be read ({error.strerror})"
        raise SettingInvalid(name=str(file), problem=problem) from None
    except ValueError:
        raise SettingInvalid(name=str(file), problem="it isn't a file of UTF-8 text") from None


def _values(bindings: Iterable[Binding]) -> dict[str, str]:
    return {each.key: each.value for each in bindings if each.key and each.value}


def _warn(file: Path, bindings: Iterable[Binding]) -> None:
    for each in bindings:
        if each.error:
            line = f"{file}, line {_line(each.original)}"
            output.warn(f"{line} can't be read, and sets nothing; write NAME=value.")
        elif each.key and each.key.startswith(_OURS) and each.key not in _KNOWN:
            [near] = get_close_matches(each.key, _KNOWN, n=1, cutoff=0.0)
            output.warn(f"{file}: there is no setting {each.key}, the nearest is {near}.")


def _line(original: Original) -> int:
    before, _, _ = original.string.partition(original.string.strip())  # blank lines are a part
    return original.line + before.count("\n")
