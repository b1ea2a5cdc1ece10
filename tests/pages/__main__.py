"""Write what is made of the pages: `make pages`."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from tests.pages import examples, made, scene


def main() -> None:
    """Make what is made of each page, and what the examples print."""
    with tempfile.TemporaryDirectory() as folder:
        filled = Path(folder, "filled")
        filled.mkdir()
        scene.fill(filled)
        for page in made.pages():
            text = made.rewritten(page.read_text())
            if re.search("^```console", text, re.MULTILINE):
                copied = shutil.copytree(filled, Path(folder, page.stem))
                with scene.stage(copied, page.stem):
                    text = examples.rewritten(text)
            page.write_text(text)


main()
