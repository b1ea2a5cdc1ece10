"""Warns about public names that the API reference lacks, which fails the build."""

import importlib
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

_logger = logging.getLogger(__name__)

MODULES = (
    "logto_webhooks",
    "logto_webhooks.errors",
    "logto_webhooks.events",
    "logto_webhooks.fastapi",
    "logto_webhooks.starlette",
    "logto_webhooks.tables",
    "logto_webhooks.testing",
    "logto_webhooks.testing.fake",
    "logto_webhooks.testing.make",
    "logto_webhooks.testing.pytest_plugin",
)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Compare each public module's names with what autodoc wrote."""
    documented = env.domaindata["py"]["objects"].keys() | env.domaindata["py"]["modules"].keys()
    for name in MODULES:
        for member in public_names(name):
            if f"{name}.{member}" not in documented:
                _logger.warning("the API reference lacks %s.%s: has it a docstring?", name, member)


def public_names(name: str) -> list[str]:
    """Return what a module's `__all__` names, or else the public things it defines."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        member
        for member, value in vars(module).items()
        if not member.startswith("_") and getattr(value, "__module__", None) == name
    ]


def tidy_signature(
    app: Sphinx,
    what: str,
    name: str,
    value: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Write a default that has no literal as `...`."""
    return signature and re.sub(r"<[^>]+>", "...", signature), returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
