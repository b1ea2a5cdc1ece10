"""The commands as typer knows them, and their options as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, Final, TypeAlias

from typer.main import get_command

from logto_webhooks.cli import app

Path: TypeAlias = tuple[str, ...]
FOLDER: Final = File(__file__).parents[2] / "docs" / "commands"
INDEX: Final = FOLDER / "README.md"
_VARIABLES: Final = re.compile(r"\s*\[([A-Z0-9_, ]+)\]$")


def walk(path: Path, command: Any) -> Iterator[tuple[Path, Any]]:
    """Every command and every group, by the words that name it; the whole has none."""
    yield path, command
    for name in sorted(getattr(command, "commands", ())):
        yield from walk((*path, name), command.get_command(None, name))


_ALL: Final = dict(walk((), get_command(app)))
COMMANDS: Final[dict[Path, Any]] = {
    path: each for path, each in _ALL.items() if not hasattr(each, "commands")
}
GROUPS: Final[dict[Path, Any]] = {path: each for path, each in _ALL.items() if path not in COMMANDS}


def page_of(path: Path) -> File:
    """Where a command is told of: a group has one page."""
    return FOLDER / f"{path[0]}.md"


def named_in(words: list[str]) -> Path | None:
    """The command, or the group, that a command line begins with."""
    found = [path for path in (*COMMANDS, *GROUPS) if tuple(words[: len(path)]) == path]
    return max(found, key=len, default=None)


def flags(path: Path) -> set[str]:
    """All spellings of a command's options."""
    return {"--help"} | {each for option in COMMANDS[path].params for each in _spelled(option)}


def summary(command: Any) -> str:
    """The first sentence of a help text."""
    return str(command.help or "").split("\n\n")[0].replace("\n", " ")


def options(path: Path) -> str:
    """A table of a command's arguments and options, as `--help` has them."""
    rows = [_row(each) for each in COMMANDS[path].params if not each.hidden]
    head = ["| option | default | variable | |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *("| " + " | ".join(cells) + " |" for cells in rows)])


def index() -> str:
    """A table of all commands, with links to their sections."""
    rows = [
        f"| [`{' '.join(path)}`]({page_of(path).name}#{anchor(path)}) | {summary(each)} |"
        for path, each in COMMANDS.items()
    ]
    return "\n".join(["| command | |", "| --- | --- |", *rows])


def anchor(path: Path) -> str:
    """What GitHub makes of the command's title."""
    return "-".join(path)


def _row(option: Any) -> tuple[str, str, str, str]:
    text = str(option.help or "").replace("|", "\\|")
    found = _VARIABLES.search(text)
    variables = ", ".join(f"`{each}`" for each in found[1].split(", ")) if found else ""
    return _name(option), _default(option), variables, _VARIABLES.sub("", text)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return f"`{option.default}`" if option.default else ""


def _name(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`"
    return ", ".join(f"`{each}`" for each in _spelled(option))


def _spelled(option: Any) -> list[str]:
    if option.param_type_name == "argument":
        return []
    return [*option.opts, *option.secondary_opts]
