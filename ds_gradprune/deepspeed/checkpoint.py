"""Every rank's pruning state beside DeepSpeed's checkpoint files.

DeepSpeed lets one island save the model, but every rank owes something else and draws other
random numbers. So each rank writes a file of its own into the tag folder, before DeepSpeed writes
its files and, last, `latest`: a run killed in between resumes from the checkpoint before.

Whatever goes wrong on one rank is raised on all, so that nobody waits in DeepSpeed's barriers for a
rank that has left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_gradprune.deepspeed import resize, statefile
from ds_gradprune.deepspeed.agree import gather_texts, raise_together
from ds_gradprune.deepspeed.generators import random_state, set_random_state
from ds_gradprune.deepspeed.statefile import Stamp
from ds_gradprune.deepspeed.tags import check_tag, latest_tag
from ds_gradprune.errors import CheckpointError, GradPruneError
from ds_gradprune.wire.transport import Transport

__all__ = [
    "Loaded",
    "Seat",
    "agree_on",
    "agree_tag",
    "latest_tag",
    "load",
    "random_state",
    "save",
    "set_random_state",
    "state_path",
]

logger = logging.getLogger(__name__)

FILE_NAME = re.compile(r"gradient_pruning_island_(\d{5})_shard_(\d{5})\.pt")
_OLD_NAME = re.compile(r"gradient_pruning_rank_\d{5}_of_\d{5}\.pt")
"""What release 0.1 called its files; it had no islands of several ranks."""


@dataclass(frozen=True)
class Seat:
    """A rank's place in the run, which names its file.

    Attributes:
        transport: over all ranks, for agreement.
        island: index of the rank's island; with pruned gradients every rank is one.
        num_islands: islands of the run.
        shard: index of the rank inside its island.
        num_shards: ranks of an island.
    """

    transport: Transport
    island: int
    num_islands: int
    shard: int = 0
    num_shards: int = 1

    @property
    def is_first(self) -> bool:
        """This rank writes what is written once."""
        return self.transport.place == 0


@dataclass(frozen=True)
class Loaded:
    """What a rank has read.

    Attributes:
        state: what `save` was given, by this rank, or by island 0's of the same shard if the run
            has another number of islands now.
        random: for `set_random_state`.
        step: optimizer steps that were done.
        num_islands: islands of the run that saved it.
        is_resized: their number is another one now.
        handed: what they hand over then.
        paths: (island, shard) -> file, as far as this host has them.
    """

    state: dict[str, Any]
    random: dict[str, Any]
    step: int
    num_islands: int
    is_resized: bool
    handed: resize.Handed | None
    paths: Mapping[tuple[int, int], str]


def state_path(folder: str, tag: str, island: int, shard: int) -> str:
    """The file of one rank."""
    return os.path.join(folder, tag, f"gradient_pruning_island_{island:05d}_shard_{shard:05d}.pt")


def save(save_dir: str, tag: str, seat: Seat, state: Mapping[str, Any], step: int = 0) -> None:
    """Write every rank's state.

    Raises:
        CheckpointError: some rank's state cannot be saved or its file not be written; on all ranks.

    Collective: all ranks of the seats' transport.
    """
    error: CheckpointError | None = None
    try:
        check_tag(tag, "the tag")
        path = state_path(save_dir, tag, seat.island, seat.shard)
        stamp = Stamp(seat.island, seat.num_islands, seat.shard, seat.num_shards, step)
        statefile.write(path, {"pruning": state, "random": random_state()}, stamp)
        _drop_leftovers(os.path.dirname(path), seat)
    except CheckpointError as exc:
        error = exc
    agree_on(error, seat)


def load(load_dir: str, tag: str, seat: Seat) -> Loaded | None:
    """Read every rank's state, if every rank can read it. Nothing else is changed.

    Returns:
        This rank's, or None if this is a checkpoint of a run without pruning.

    Raises:
        CheckpointError: on all ranks alike, if some rank's file is missing, damaged or of another
            save, or if an island has another number of ranks now.

    Collective: all ranks of the seats' transport.
    """
    folder = os.path.join(load_dir, tag)
    files = _files(folder)
    ranks = _tell(seat, _seen(folder, files, seat))
    _raise_faults(folder, ranks)
    if not any(rank["found"] for rank in ranks):
        if any(rank["old"] for rank in ranks):
            raise CheckpointError(
                f"checkpoint {folder} was saved by ds_gradprune 0.1, whose files this version "
                "does not read. Resume with version 0.1, or load it with "
                "load_optimizer_states=False to go on from its weights."
            )
        logger.warning(
            "checkpoint %s holds no pruning state: a run without gradient pruning saved it. The "
            "residual starts at zero and the controller with its warm-up.",
            folder,
        )
        return None
    num_islands = _saved_islands(folder, ranks, seat)
    is_resized = num_islands != seat.num_islands
    island = 0 if is_resized else seat.island
    content, step, fault = None, -1, None
    try:
        content, stamp = statefile.read(state_path(load_dir, tag, island, seat.shard))
        step = stamp.step
    except CheckpointError as exc:
        fault = str(exc)
    ranks = _tell(seat, {"fault": fault, "step": step})
    _raise_faults(folder, ranks)
    _raise_differing(folder, "step", [rank["step"] for rank in ranks], ranks)
    assert content is not None
    state, handed = content["pruning"], None
    if is_resized:
        paths = {island: path for (island, shard), path in files.items() if shard == seat.shard}
        handed = resize.collect(seat.transport, paths, state, stamp)
    return Loaded(state, content["random"], step, num_islands, is_resized, handed, files)


def agree_on(error: GradPruneError | None, seat: Seat) -> None:
    """Raise on all ranks if one has an error; see `agree.raise_together`. Collective."""
    raise_together(seat.transport, error)


# ---- which tag -----------------------------------------------------------------------------------


def agree_tag(load_dir: str, tag: Any, seat: Seat, latest: str = "latest") -> str | None:
    """The tag to load, equal on all ranks: the one given, or what the file `latest` says.

    A host without a `latest` takes what rank 0's says.

    Returns:
        None if no tag is given and no rank has a `latest` file, which DeepSpeed then tells of.

    Raises:
        CheckpointError: it cannot be read or is no name of a folder, or hosts have different ones;
            on all ranks alike.

    Collective: all ranks of the seats' transport.
    """
    found, fault = None, None
    try:
        found = check_tag(str(tag), "the tag") if tag is not None else latest_tag(load_dir, latest)
    except CheckpointError as exc:
        fault = str(exc)
    ranks = _tell(seat, {"fault": fault, "tag": found})
    _raise_faults(load_dir, ranks)
    first: str | None = ranks[0]["tag"]
    _raise_differing(load_dir, "tag", [rank["tag"] or first for rank in ranks], ranks)
    return first


# ---- what is there -------------------------------------------------------------------------------


def _files(folder: str) -> dict[tuple[int, int], str]:
    """(island, shard) -> path of every state file in a tag's folder."""
    found = {}
    for name in _listed(folder):
        if match := FILE_NAME.fullmatch(name):
            found[int(match[1]), int(match[2])] = os.path.join(folder, name)
    return found


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _drop_leftovers(folder: str, seat: Seat) -> None:
    """Files of an earlier save under this tag, by a run with more islands or larger ones."""
    for (island, shard), path in _files(folder).items():
        if island >= seat.num_islands or shard >= seat.num_shards:
            with contextlib.suppress(OSError):  # another rank was faster
                os.unlink(path)


def _seen(folder: str, files: Mapping[tuple[int, int], str], seat: Seat) -> dict[str, Any]:
    """What this rank can say of a checkpoint before it reads its file."""
    seen: dict[str, Any] = {"found": len(files), "fault": None, "islands": 0, "shards": 0}
    seen["old"] = any(_OLD_NAME.fullmatch(name) for name in _listed(folder))
    if not os.path.isdir(folder):
        seen["fault"] = f"{folder} is missing, or is no folder that can be read."
    # Island 0's speaks for the whole save; hosts that share no disk have their own only.
    path = files.get((0, seat.shard)) or files.get((seat.island, seat.shard))
    if path is not None:
        try:
            stamp = statefile.read_stamp(path)
            seen |= {"islands": stamp.num_islands, "shards": stamp.num_shards}
        except CheckpointError as exc:
            seen["fault"] = str(exc)
    return seen


def _tell(seat: Seat, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's, in rank order. Collective."""
    texts = gather_texts(seat.transport, json.dumps({"host": socket.gethostname()} | mine))
    return [json.loads(text) for text in texts]


def _saved_islands(folder: str, ranks: Sequence[Mapping[str, Any]], seat: Seat) -> int:
    known = [rank for rank in ranks if rank["islands"]]
    _raise_differing(folder, "number of islands", [rank["islands"] for rank in known], known)
    if not known:
        raise CheckpointError(
            f"checkpoint {folder} lacks the files of island 0 and of this run's ranks. Resume from "
            "a folder that holds all its files on every host."
        )
    shards = max(rank["shards"] for rank in known)
    if shards != seat.num_shards:
        raise CheckpointError(
            f"checkpoint {folder} was saved with {shards} ranks in an island, and now an island "
            f"has {seat.num_shards}. The number of islands may change, but not their size: start "
            f"{shards} ranks per island, or load it with load_optimizer_states=False to go on "
            "from its weights."
        )
    return int(known[0]["islands"])


def _raise_faults(folder: str, ranks: Sequence[Mapping[str, Any]]) -> None:
    faults = [
        f"rank {rank} on {told['host']}: {told['fault']}"
        for rank, told in enumerate(ranks)
        if told["fault"]
    ]
    if faults:
        more = f" {len(faults) - 4} more ranks tell the like." if len(faults) > 4 else ""
        raise CheckpointError(
            f"checkpoint {folder} cannot be resumed: {' '.join(faults[:4])}{more} Resume from "
            "another checkpoint, or from a folder that holds all its files on every host."
        )


def _raise_differing(
    folder: str, name: str, values: Sequence[Any], ranks: Sequence[Mapping[str, Any]]
) -> None:
    if len(set(values)) > 1:
        pairs = zip(values, ranks, strict=True)
        by_host = ", ".join(dict.fromkeys(f"{value} on {told['host']}" for value, told in pairs))
        raise CheckpointError(
            f"checkpoint {folder} has not the same {name} everywhere: {by_host}. A save was cut "
            "short, or hosts have different folders. Copy the folder to every host, or name an "
            "older tag that every host has."
        )
