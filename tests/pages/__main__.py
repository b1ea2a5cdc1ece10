"""Write what is made of the pages: `make pages`."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from tests.pages import examples, made, scene, tree


def main() -> None:
    """Make the options, the list of commands, and what the examples print."""
    with tempfile.TemporaryDirectory() as folder:
        filled = Path(folder, "filled")
        filled.mkdir()
        scene.fill(filled)
        for page in sorted(tree.FOLDER.glob("*.md")):
            text = made.rewritten(page.read_text())
            if re.search("^```console", text, re.MULTILINE):
                copied = shutil.copytree(filled, Path(folder, page.stem))
                with scene.stage(copied, page.stem):
                    text = examples.rewritten(text)
            page.write_text(text)


main()
