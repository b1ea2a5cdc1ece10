"""Draws Mermaid code blocks as SVG when the docs are built, so that readers load no script."""

import re
from typing import Any

import mmdr
from docutils import nodes
from sphinx.application import Sphinx

_STYLE = re.compile(r"<style.*?</style>", re.DOTALL)  # _static/site.css has our own


def draw(app: Sphinx, doctree: nodes.document) -> None:
    """Replace each Mermaid block with its drawing."""
    for number, block in enumerate(list(doctree.findall(_is_mermaid)), 1):
        svg = _STYLE.sub("", mmdr.render(block.astext()).svg())
        # Ids are of the whole page, so each drawing needs its own.
        svg = re.sub(r'(id="|#)merman', rf"\1diagram-{number}", svg)
        html = f'<figure class="diagram">{svg}</figure>'
        block.replace_self(nodes.raw("", html, format="html"))


def _is_mermaid(node: nodes.Node) -> bool:
    return isinstance(node, nodes.literal_block) and node.get("language") == "mermaid"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("doctree-read", draw)
    return {"parallel_read_safe": True}
