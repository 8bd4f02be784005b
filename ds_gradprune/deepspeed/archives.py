"""DeepSpeed's checkpoint files, read against the checksums inside them before they are loaded."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from ds_gradprune.deepspeed.agree import gather_texts, raise_together
from ds_gradprune.deepspeed.checkpoint import FILE_NAME
from ds_gradprune.deepspeed.zipped import zip_fault
from ds_gradprune.errors import CheckpointError
from ds_gradprune.wire.transport import Transport

_MAGIC = b"PK\x03\x04"
_PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")
_PLACES = (
    ("LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    ("OMPI_COMM_WORLD_LOCAL_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
)
"""Where launchers say which of so many ranks of its host this one is."""


def check_loadable(
    engine: Any, load_dir: str, tag: str, ranks: Transport, *, resumes: bool
) -> None:
    """See `check_files`, for what an engine is about to load.

    Args:
        engine: of DeepSpeed.
        load_dir: folder of the checkpoints.
        tag: of the one that is loaded.
        ranks: all of them.
        resumes: the optimizer's state is loaded, too.

    Raises:
        CheckpointError: see there.

    Collective: all ranks of `ranks`.
    """
    folder = os.path.join(load_dir, tag)
    parts = parts_of(engine) if resumes else None
    check_files(folder, ranks, parts, needed_by(engine, load_dir, tag, resumes=resumes))


def check_files(
    folder: str, ranks: Transport, parts: int | None = None, needed: Sequence[str] = ()
) -> None:
    """Read DeepSpeed's files of a checkpoint; ours have a checksum over everything.

    Args:
        folder: of the tag.
        ranks: all of them.
        parts: into so many DeepSpeed divides the optimizer now, if it is to be loaded; None: it is
            not, or in whatever parts it lies.
        needed: files without which DeepSpeed leaves this rank alone with an error.

    Raises:
        CheckpointError: names a damaged file, or one that is on other hosts only, or a run without
            pruning has saved other parts; on all ranks alike.

    Collective: all ranks of `ranks`.
    """
    files = archives_in(folder)
    theirs = [path for path in files if not FILE_NAME.fullmatch(os.path.basename(path))]
    if parts is not None:
        _check_parts(folder, parts, ranks, saves_ours=len(theirs) < len(files))
    _check_needed(folder, needed, ranks)
    fault = first_fault(theirs, os.environ)
    error = None
    if fault is not None:
        error = CheckpointError(
            f"{fault}. Nothing was loaded. Resume from another checkpoint: write the name of an "
            "older tag into the file latest."
        )
    raise_together(ranks, error)


def latest_file(engine: Any) -> str:
    """The name of the file from which an engine takes the newest tag. Local."""
    return "latest_universal" if engine.load_universal_checkpoint() else "latest"


def parts_of(engine: Any) -> int | None:
    """Into so many parts DeepSpeed divides an optimizer, which it reads in no others. Local.

    None: it divides none, or reads a universal checkpoint.
    """
    if not engine.zero_optimization() or engine.load_universal_checkpoint():
        return None
    return int(engine.seq_dp_world_size)


def needed_by(engine: Any, load_dir: str, tag: str, *, resumes: bool) -> list[str]:
    """The files that DeepSpeed 0.19.8 reads on this rank. Local."""
    if engine.load_universal_checkpoint():
        return []
    needed = [str(engine._get_ckpt_name(load_dir, tag))]
    if resumes and engine.zero_optimization():
        needed.append(str(engine._get_zero_ckpt_name(load_dir, tag)))
    return needed


def _check_needed(folder: str, needed: Sequence[str], ranks: Transport) -> None:
    """What no rank has, DeepSpeed tells on all of them; what some lack, on those alone."""
    absent = next((path for path in needed if not os.path.isfile(path)), None)
    mine = [socket.gethostname(), absent and os.path.basename(absent)]
    told = [json.loads(text) for text in gather_texts(ranks, json.dumps(mine))]
    lacking = [f"{name} on {host} (rank {rank})" for rank, (host, name) in enumerate(told) if name]
    if 0 < len(lacking) < len(told):
        raise CheckpointError(
            f"checkpoint {folder} must be whole on every host, but DeepSpeed's file is missing: "
            f"{', '.join(lacking[:4])}. Nothing was loaded. Resume from another checkpoint: write "
            "the name of an older tag into the file latest of every host."
        )


def _check_parts(folder: str, parts: int, ranks: Transport, *, saves_ours: bool) -> None:
    """A run without us divides an optimizer among all ranks, which islands do not."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    mine = [int(match[1]) for match in map(_PART.fullmatch, names) if match]
    told = [json.loads(text) for text in gather_texts(ranks, json.dumps([saves_ours, mine]))]
    saved = 1 + max((part for _, found in told for part in found), default=-1)
    error = None
    if saved not in (0, parts) and not any(ours for ours, _ in told):
        error = CheckpointError(
            f"checkpoint {folder} was saved without gradient pruning, by {saved} ranks that divide "
            f"the optimizer among them. Now {parts} do so, with islands those of one. "
            "Load it with load_optimizer_states=False to go on from its weights, or convert it "
            "with DeepSpeed's ds_to_universal.py and set checkpoint.load_universal."
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
