"""The blocks of a page that are made: between `<!-- options: COMMAND -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.pages import events, fake, states, tree

DOCS: Final = tree.FOLDER.parent
_MAKERS: Final[dict[str, Callable[[str], str]]] = {
    "commands": lambda _: tree.index(),
    "options": lambda words: tree.options(tuple(words.split())),
    "events": events.section,
    "fake": lambda _: fake.table(),
    "states": states.diagram,
}
_BLOCK: Final = re.compile(
    rf"<!-- ({'|'.join(_MAKERS)})(?:: ([a-z -]+))? -->\n.*?<!-- end -->", re.DOTALL
)


def pages() -> list[Path]:
    """Those that have such blocks."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _BLOCK.search(page.read_text())]


def rewritten(page: str) -> str:
    """The page with its blocks as they must be."""
    return _BLOCK.sub(_block, page)


def told(page: str) -> set[tree.Path]:
    """The commands whose options a page has."""
    blocks = _BLOCK.finditer(page)
    return {tuple(found[2].split()) for found in blocks if found[1] == "options"}


def _block(found: re.Match[str]) -> str:
    title = found[1] + (f": {found[2]}" if found[2] else "")
    return f"<!-- {title} -->\n\n{_MAKERS[found[1]](found[2] or '')}\n\n<!-- end -->"
