"""What the bed needs from the machine, and the sentence that says what is missing."""

from __future__ import annotations

import os
import shutil
import sys

from ds_gradprune.errors import MissingDependencyError

PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}
"""Command -> the Debian or Ubuntu package that has it."""

SBIN = ("/usr/sbin", "/sbin", "/usr/local/sbin")
"""Searched as well: a user's path often lacks them."""


def find_command(name: str) -> str | None:
    """The full path of a command, also from the administrator's folders."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    return shutil.which(name, path=path)


def missing() -> str | None:
    """One sentence naming all that is missing, with the command that installs it; None: nothing."""
    if not sys.platform.startswith("linux"):
        return f"The test bed needs Linux's network namespaces, got {sys.platform}."
    absent = [name for name in PACKAGES if find_command(name) is None]
    wants = (["root"] if os.geteuid() != 0 else []) + absent
    if not wants:
        return None
    fixes = ["start it with sudo"] if os.geteuid() != 0 else []
    if absent:
        packages = sorted({PACKAGES[name] for name in absent})
        fixes.append(f"apt-get install {' '.join(packages)}")
    return f"The test bed needs {', '.join(wants)}: {'; '.join(fixes)}."


def check() -> None:
    """Raise unless the bed can be set up.

    Raises:
        MissingDependencyError: names everything that is missing in one sentence.
    """
    sentence = missing()
    if sentence is not None:
        raise MissingDependencyError(sentence)
