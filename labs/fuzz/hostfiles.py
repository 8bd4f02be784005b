"""Hostfiles, a launcher's command line and a launcher's variables, with something changed."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

from ds_gradprune.commands.hostfile import read_hostfile
from labs.fuzz.damage import damaged
from launch.support.place import export_place, find_place
from launch.support.rendezvous import hosts_of_launcher, port_of

HOSTFILE = (
    b"# the two hosts\nhost-a slots=2\n\nhost-b  slots = 2   # the slower one\nhost-c slots=2\n"
)
SCRAPS = (
    b"slots=", b"=", b"#", b"\n", b"\r\n", b"\0", b"\xff\xfe", b" slots=0", b"slots=-1", b"\t",
    b"slots=" + b"9" * 5000, "slots=²".encode(), "slots=\u0661".encode(), b"host-a slots=2\n",
    b"x" * 100_000, b"slots=1e3", b"\xe2\x80\xa8", b"",
)  # fmt: skip
ENVIRON = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29500",
}
VALUES = ("", "-1", "x", "1.0", "9" * 5000, "²", "\u0661", "0", "3", "65536", " 1", "\0", "None")


def attempt(rng: random.Random, path: Path) -> None:
    """One of the three, mutated, on the way of a start.

    Args:
        rng: decides which and how.
        path: of a file that is overwritten.

    Raises:
        ConfigError: it was refused.
    """
    kind = rng.randrange(3)
    if kind == 0:
        path.write_bytes(_mutated(rng, HOSTFILE))
        read_hostfile(path)
    elif kind == 1:
        hosts_of_launcher(["--world_info=" + _words(rng)], rng.choice((1, 2, 3)))
    else:
        environ = dict(ENVIRON)
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(list(ENVIRON))
            if rng.random() < 0.2:
                environ.pop(name, None)
            else:
                environ[name] = rng.choice(VALUES)
        export_place(find_place(environ), environ)
        port_of(environ)


def _mutated(rng: random.Random, data: bytes) -> bytes:
    return damaged(rng, data, SCRAPS, 4, kinds=4)


def _words(rng: random.Random) -> str:
    """DeepSpeed's word with the hosts of all ranks, damaged before or after it is encoded."""
    document: object = rng.choice(
        ({"host-a": [0, 1], "host-b": [0]}, {}, [], None, 1, {"a": None}, {"a": 5}, {"": [[]]}, "x")
    )
    text = json.dumps(document).encode()
    if rng.random() < 0.5:
        text = _mutated(rng, text)
    word = base64.urlsafe_b64encode(text)
    if rng.random() < 0.5:
        word = _mutated(rng, word)
    return word.decode("utf-8", "replace")
