"""Adds an SBOM to the wheel: what `requirements.txt` installs beside it, as CycloneDX (PEP 770)."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "logto-webhooks.cdx.json"
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def components(requirements: str) -> list[dict[str, Any]]:
    """The packages that a file with pins and hashes names."""
    return [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
            "externalReferences": [
                {
                    "type": "distribution",
                    "url": f"https://pypi.org/project/{name}/{version}/",
                    "hashes": [{"alg": "SHA-256", "content": each} for each in _HASH.findall(rest)],
                }
            ],
        }
        for name, version, rest in _PINNED.findall(requirements)
    ]


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Writes the SBOM when a wheel is built, but for an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the file to hatchling, which puts it into `.dist-info/sboms`."""
        if version == "editable":
            return
        ours = f"pkg:pypi/logto-webhooks@{self.metadata.version}"
        made = components((Path(self.root) / "requirements.txt").read_text(encoding="utf-8"))
        bom = {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {
                "component": {
                    "type": "library",
                    "bom-ref": ours,
                    "name": "logto-webhooks",
                    "version": self.metadata.version,
                    "purl": ours,
                }
            },
            "components": made,
            "dependencies": [{"ref": ours, "dependsOn": [each["bom-ref"] for each in made]}],
        }
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / NAME
        file.write_text(json.dumps(bom, indent=1, sort_keys=True), encoding="utf-8")
        build_data["sbom_files"].append(str(file))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was written."""
        if version != "editable":
            self._folder.cleanup()
