"""How Sphinx builds the docs: `make docs`. The pages are plain Markdown, linked as on GitHub."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "logto-webhooks"
author = "The logto-webhooks authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "api", "mermaid"]
root_doc = "docs/README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**.md",
    "examples/*/README.md",
]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# Docstrings are Markdown with few marks: what stands in backquotes is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
# Types of other packages and private types have no page. `-n` still finds broken links in pages.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "logto-webhooks"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}  # the first page is docs/README.html
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#4b45c6", "color-brand-content": "#4b45c6"},
    "dark_css_variables": {"color-brand-primary": "#a8a4ff", "color-brand-content": "#a8a4ff"},
}

# Copy commands without their prompt and without what they print.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
