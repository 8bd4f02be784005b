"""DeepSpeed's checkpoint files, read against the checksums inside them before they are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ds_gradprune.deepspeed.agree import raise_together
from ds_gradprune.deepspeed.checkpoint import FILE_NAME
from ds_gradprune.deepspeed.zipped import zip_fault
from ds_gradprune.errors import CheckpointError
from ds_gradprune.wire.transport import Transport

_MAGIC = b"PK\x03\x04"
_PLACES = (
    ("LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    ("OMPI_COMM_WORLD_LOCAL_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
)
"""Where launchers say which of so many ranks of its host this one is."""


def check_files(folder: str, ranks: Transport) -> None:
    """Read DeepSpeed's files of a checkpoint; ours have a checksum over everything.

    Args:
        folder: of the tag.
        ranks: all of them.

    Raises:
        CheckpointError: names a damaged file, on all ranks alike.

    Collective: all ranks of `ranks`.
    """
    theirs = [
        path for path in archives_in(folder) if not FILE_NAME.fullmatch(os.path.basename(path))
    ]
    fault = first_fault(theirs, os.environ)
    error = None
    if fault is not None:
        error = CheckpointError(
            f"{fault}. Nothing was loaded. Resume from another checkpoint: write the name of an "
            "older tag into the file latest."
        )
    raise_together(ranks, error)


def fault_of(path: str) -> str | None:
    """What is wrong with a file; None: nothing, or it is no archive of torch.save. Local."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
    except OSError as exc:
        return f"{path} is damaged: {exc}"
    return zip_fault(path)


def first_fault(paths: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """What is wrong with the first damaged file; the ranks of a host share the work. Local.

    Args:
        paths: the same list on all ranks of a host.
        environ: says which of how many ranks this is; if it does not, all files are read here.
    """
    first, stride = _share(environ)
    faults = (fault_of(path) for path in sorted(paths)[first::stride])
    return next((fault for fault in faults if fault is not None), None)


def archives_in(folder: str) -> list[str]:
    """Files below a folder that torch.save may have written. Local."""
    return [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith((".pt", ".pth", ".bin"))
    ]


def _share(environ: Mapping[str, str]) -> tuple[int, int]:
    for rank_name, size_names in _PLACES:
        for size_name in size_names:
            rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
            if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
                return int(rank), int(size)
    return 0, 1
