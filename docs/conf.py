"""How Sphinx builds the docs: `make docs`. The pages are plain Markdown, linked as on GitHub."""

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

project = "logto-webhooks"
extensions = ["myst_parser"]
root_doc = "docs/README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**.md",
    "examples/*/README.md",
]
myst_heading_anchors = 4
html_theme = "alabaster"
lexers["mermaid"] = TextLexer()  # GitHub draws it; here it is read
