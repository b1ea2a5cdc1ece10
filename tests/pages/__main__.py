"""Write the generated parts of all pages, or of those that are named: `make pages`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.pages import examples, made, scene


def main() -> None:
    """Make what is made of each page, and what its examples print."""
    with tempfile.TemporaryDirectory() as folder:
        filled = Path(folder, "filled")
        filled.mkdir()
        scene.fill(filled)
        for page in made.pages():
            page.write_text(made.rewritten(page.read_text()))
        for page in filter(examples.are_in, sorted(made.DOCS.rglob("*.md"))):
            if sys.argv[1:] and page.stem not in sys.argv[1:]:
                continue
            copied = shutil.copytree(filled, Path(folder, page.stem))
            with scene.stage(copied, page.stem):
                page.write_text(examples.rewritten(page.read_text()))


main()
