"""DeepSpeed's hostfile: one host a line, with the number of its ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ds_gradprune.errors import ConfigError

_LINE = re.compile(r"(\S{1,255})\s+slots\s*=\s*([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class HostLine:
    """A line of the hostfile.

    Attributes:
        name: for ssh.
        slots: ranks.
    """

    name: str
    slots: int = 1


def read_hostfile(path: Path) -> list[HostLine]:
    """The hosts, in order.

    Raises:
        ConfigError: the file cannot be read, or a line is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--hostfile must be readable, got {path}: {exc.strerror}.") from exc
    except UnicodeError as exc:
        raise ConfigError(f"--hostfile must be a text file in UTF-8, got {path}: {exc}.") from exc
    hosts: list[HostLine] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if not found or not int(found[2]):
            raise ConfigError(
                f'{path}, line {number} must read "NAME slots=N" with N >= 1, got {line!r:.80}.'
            )
        if found[1] in [host.name for host in hosts]:
            raise ConfigError(f"{path}, line {number} must name a new host, got {found[1]} again.")
        hosts.append(HostLine(found[1], int(found[2])))
    if not hosts:
        raise ConfigError(f"--hostfile must name at least one host, got {path} without any.")
    if len({host.slots for host in hosts}) > 1:
        raise ConfigError(f"{path} must give all hosts equally many slots: islands are equal.")
    return hosts
