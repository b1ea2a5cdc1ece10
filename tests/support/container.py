"""What a Dockerfile makes, without Docker: a root of its own, read-only, for a plain user.

A mount namespace and chroot do it, so this needs Linux, and root or user namespaces.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Mounts what is shared with the host, shuts the root, opens what may be written, and goes in.
_ENTER = """
set -e
root=$1 user=$2 folder=$3; shift 3
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
for each in $WRITABLE; do mount --bind "$root$each" "$root$each"; done
for each in $SHARED; do  # after these, because it may be below them
    mount --bind "$each" "$root$each"
    mount -o remount,bind,ro "$root$each"
done
mount -o remount,bind,ro "$root"
exec chroot $user "$root" /usr/bin/env --ignore-environment --chdir="$folder" "$@"
"""
_NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


class Instruction(NamedTuple):
    """A line of a Dockerfile, its continuations included."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of the exec form: what is run, as it stands."""
        found: list[str] = json.loads(self.text[self.text.index("[") :])
        return found


@functools.cache
def possible() -> bool:
    """Whether this system lets us."""
    if not shutil.which("unshare"):
        return False
    bound = ["sh", "-c", "mount --bind /usr /usr && mount -o remount,bind,ro /usr"]
    return subprocess.run([*_NAMESPACE, *bound], capture_output=True, check=False).returncode == 0


def stages(dockerfile: Path) -> list[list[Instruction]]:
    """Read a Dockerfile: its stages, each from its FROM on."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    read: list[list[Instruction]] = []
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            read.append([])
        if not read:
            continue  # an ARG before the first FROM
        read[-1].append(Instruction(name, " ".join(rest.split())))
    return read


def only(stage: list[Instruction], name: str) -> Instruction:
    """The one instruction of that name."""
    [found] = [each for each in stage if each.name == name]
    return found


class Container:
    """A root in a folder; the interpreter and what the wheel depends on are the host's."""

    def __init__(self, root: Path, user: str, environment: Mapping[str, str]) -> None:
        """`user` is uid:gid; `environment` is all of it."""
        self.root = root
        self.python = os.path.realpath(sys.executable)
        self._user = user
        self._environment = dict(environment)
        [self.packages] = site.getsitepackages()
        self._shared = ["/usr", str(Path(self.python).parents[1]), self.packages]
        for each in ("/dev", "/data", "/tmp", "/app", *self._shared):
            Path(f"{root}{each}").mkdir(parents=True, exist_ok=True)
        for each in ("/data", "/tmp"):
            Path(f"{root}{each}").chmod(0o1777)
        for name in ("bin", "lib", "lib64"):
            self._share_system_folder(name)

    def command(self, words: Sequence[str], more: Mapping[str, str], build: bool) -> list[str]:
        """What runs `words` in it; while it is built, as root, who can write to /app, too."""
        environment = [f"{name}={value}" for name, value in {**self._environment, **more}.items()]
        user = f"--userspec={self._user}" if os.geteuid() == 0 and not build else ""
        folder = "/" if build else "/data"
        enter = [*_NAMESPACE, "sh", "-c", _ENTER, "sh", str(self.root), user, folder]
        shared, writable = " ".join(self._shared), "/data /tmp" + (" /app" if build else "")
        return ["env", f"SHARED={shared}", f"WRITABLE={writable}", *enter, *environment, *words]

    def run(
        self, *words: str, build: bool = False, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run something to its end, with `more` in its environment."""
        command = self.command(words, more or {}, build)
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def start(self, *words: str, more: Mapping[str, str], log: Any) -> subprocess.Popen[bytes]:
        """Start something: the process is that very one, so signals reach it."""
        return subprocess.Popen(self.command(words, more, False), stdout=log, stderr=log)

    def _share_system_folder(self, name: str) -> None:
        host, here = Path("/", name), self.root / name
        if host.is_symlink():
            here.symlink_to(os.readlink(host))
        elif host.is_dir():
            here.mkdir()
            self._shared.append(str(host))
