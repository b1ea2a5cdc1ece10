"""The blocks of a page that are made: between `<!-- options: COMMAND -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from typing import Final

from tests.pages import tree

COMMANDS: Final = "commands"
_BLOCK: Final = re.compile(r"<!-- (commands|options: ([a-z -]+)) -->\n.*?<!-- end -->", re.DOTALL)


def rewritten(page: str) -> str:
    """The page with its blocks as they must be."""
    return _BLOCK.sub(_block, page)


def told(page: str) -> set[tree.Path]:
    """The commands whose options a page has."""
    return {tuple(found[2].split()) for found in _BLOCK.finditer(page) if found[2]}


def _block(found: re.Match[str]) -> str:
    path = tuple((found[2] or "").split())
    content = tree.options(path) if path in tree.COMMANDS else tree.index()
    return f"<!-- {found[1]} -->\n\n{content}\n\n<!-- end -->"
