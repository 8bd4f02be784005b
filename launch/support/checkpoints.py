"""DeepSpeed's checkpoints, with faults told by name: saved only if finite, loaded, written out.

Every function is collective: all ranks call it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ds_gradprune.deepspeed.disks import is_refusal
from ds_gradprune.deepspeed.tags import check_tag
from ds_gradprune.errors import CheckpointError, GradPruneError, NonFiniteError

from .peers import Peers
from .run_folder import RunFolder, checkpoint_tag


def save_checkpoint(
    engine: Any, folder: RunFolder, peers: Peers, step: int, state: dict[str, Any]
) -> None:
    """Save a checkpoint that `--resume` continues from, and drop old ones.

    Args:
        engine: of DeepSpeed.
        folder: of the run.
        peers: all ranks.
        step: optimizer steps done.
        state: plain data, given back by `load_checkpoint`.

    Raises:
        NonFiniteError: weights or optimizer state hold inf or nan on some rank; nothing is saved,
            so the newest checkpoint stays one to resume from.
        CheckpointError: the disk refuses; what was begun is removed.
    """
    broken = peers.gather(not _is_finite(engine))
    if any(broken):
        ranks = ", ".join(str(rank) for rank, is_broken in enumerate(broken) if is_broken)
        before = folder.newest()
        kept = f"{before} is kept; it is the newest that is finite" if before else "there is none"
        raise NonFiniteError(
            f"weights or optimizer state hold inf or nan after step {step} on rank {ranks}, so no "
            f"checkpoint is saved: {kept}. Lower optimizer.params.lr or clip the gradients "
            "(gradient_clipping), and --resume."
        )
    tag = checkpoint_tag(step)
    with whole_or_nothing(folder, lambda: tag):
        engine.save_checkpoint(
            str(folder.checkpoints), tag=tag, client_state=state, save_latest=False
        )
    # DeepSpeed names it before the other ranks' files are there.
    peers.together(lambda: folder.name_newest(tag) if peers.is_first else None)
    is_on_own_disk = peers.place.local_rank == 0 and folder.newest() != tag
    peers.together(lambda: folder.name_newest(tag) if is_on_own_disk else None)
    if peers.place.local_rank == 0:
        folder.drop_old_checkpoints()


@contextlib.contextmanager
def whole_or_nothing(folder: RunFolder, tag: Callable[[], str]) -> Iterator[None]:
    """What a disk refuses is told by name, and a checkpoint that was begun is removed. Local.

    Args:
        folder: of the run.
        tag: name of the checkpoint that may have been begun.

    Raises:
        CheckpointError: it could not be saved.
    """
    try:
        yield
    except CheckpointError:  # on all ranks alike: none has a use for what another one wrote
        folder.drop_unfinished(tag())
        raise
    except (OSError, RuntimeError, SafetensorError) as exc:
        if not is_refusal(exc):
            raise
        folder.drop_unfinished(tag())
        raise CheckpointError(
            f"{folder.checkpoints} must be writable, but {tag()} could not be saved: "
            f"{_reason(exc)} ({_free(folder.path)}). Make room and --resume."
        ) from exc


def load_checkpoint(engine: Any, folder: RunFolder, tag: str) -> dict[str, Any]:
    """Restore a checkpoint.

    Args:
        engine: of DeepSpeed.
        folder: of the run.
        tag: see `resumed_tag`; nothing outside the folder is read.

    Returns:
        The state that was saved with it.

    Raises:
        CheckpointError: it is not there, or damaged.
        GradPruneError: whatever else the engine refuses by name.
    """
    advice = f"Write the name of an older one into {folder.checkpoints / 'latest'}."
    check_tag(tag, str(folder.checkpoints / "latest"))
    if not (folder.checkpoints / tag).is_dir():
        raise CheckpointError(
            f"{folder.checkpoints} must hold the checkpoint that its file latest names, but has "
            f"no folder {tag}. {advice}"
        )
    try:
        path, client_state = engine.load_checkpoint(str(folder.checkpoints), tag=tag)
    except GradPruneError:
        raise
    # A damaged file raises whatever its reader raises. It is told, never passed over.
    except Exception as exc:
        raise CheckpointError(
            f"The checkpoint {tag} in {folder.checkpoints} must be readable: "
            f"{type(exc).__name__} {_reason(exc)}. {advice}"
        ) from exc
    if path is None:
        raise CheckpointError(
            f"{folder.checkpoints / tag} must be a checkpoint of DeepSpeed, but is not. {advice}"
        )
    return dict(client_state)


@contextlib.contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """Every weight of the model on every rank, shared ones where islands train, for the block."""
    handle = getattr(engine, "gradprune", None)
    shared = handle.shared_weights() if handle is not None else contextlib.nullcontext()
    with shared:
        if engine.zero_optimization_stage() < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            yield


def _is_finite(engine: Any) -> bool:
    """Whether this rank's weights and what its optimizer remembers are finite. Local."""
    tensors = [getattr(weight, "ds_tensor", weight) for weight in engine.module.parameters()]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in getattr(inner, "state", {}).values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200].rstrip(".")


def _free(folder: Path) -> str:
    """What is left on the disk."""
    return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free"
