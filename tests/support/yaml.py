"""As much of YAML as compose.yaml needs: mappings, scalars, lists in one line, anchors, merges."""

from __future__ import annotations

import re
from typing import Any

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w<-][\w.<-]*):(?: +(?P<value>.+))?")
_ITEM = re.compile(r'"(?:[^"\\]|\\.)*"|[^,\s][^,]*')


def parse(text: str) -> dict[str, Any]:
    """Read a mapping. Raises ValueError of what it doesn't know."""
    root: dict[str, Any] = {}
    anchors: dict[str, dict[str, Any]] = {}
    open_ones = [(-1, root)]
    for line in text.splitlines():
        code = re.sub(r"(^| )#.*", "", line).rstrip()
        if not code:
            continue
        found = _LINE.fullmatch(code)
        if not found:
            raise ValueError(f"what is {line!r}?")
        indent, key, value = len(found["indent"]), found["key"], found["value"]
        while open_ones[-1][0] >= indent:
            open_ones.pop()
        within = open_ones[-1][1]
        if key == "<<":
            within.update(anchors[value.removeprefix("*")])
        elif value is None or value.startswith("&"):
            made: dict[str, Any] = {}
            within[key] = made
            open_ones.append((indent, made))
            if value:
                anchors[value.removeprefix("&")] = made
        else:
            within[key] = _scalar(value)
    return root


def _scalar(text: str) -> Any:
    if text.startswith("["):
        return [_scalar(each.strip()) for each in _ITEM.findall(text[1:-1])]
    if text == "{}":
        return {}
    if text in ("true", "false"):
        return text == "true"
    return text[1:-1] if text.startswith('"') else text
