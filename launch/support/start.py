"""Brings DeepSpeed up for a script: configuration file, accelerator, process group, CPU op.

DeepSpeed is imported inside the functions, because replies on a CPU do without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from ds_gradprune.errors import CheckpointError, ConfigError, GradPruneError
from launch.support.rendezvous import meet
from launch.support.peers import Peers, Place

STALE_LOCK_S = 900.0
"""A lock this old belongs to a compilation that was killed; DeepSpeed would wait for it forever."""


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration as DeepSpeed does: hjson, no key twice. Local.

    Raises:
        ConfigError: the file cannot be read, or is no JSON object.
    """
    import hjson

    try:
        document = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as exc:
        raise ConfigError(f"--config must be readable, got {path}: {exc.strerror}.") from exc
    except ValueError as exc:
        raise ConfigError(f"--config must be JSON, got {path}: {exc}.") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"--config must hold a JSON object, got {path} with {document!r:.80}.")
    return document


def choose_accelerator() -> None:
    """Tell DeepSpeed to run on the CPU where there is nothing else; before it is imported. Local.

    A user's own DS_ACCELERATOR stays.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def connect(place: Place, timeout_s: float) -> Peers:
    """Open the process group. Collective: all ranks.

    On a CPU it is made here, so that ranks can agree on a fault before DeepSpeed compiles anything;
    DeepSpeed adopts a group that exists. On a GPU DeepSpeed makes it.

    Args:
        place: of this process; its variables must be in the environment.
        timeout_s: a rank that has not come by then never will.

    Raises:
        AbsentRanks: some rank never came.
        TransportError: the ranks' store failed.
    """
    if place.world_size > 1:
        store = meet(place, os.environ, timeout_s)
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            torch.distributed.init_process_group("gloo")
        else:
            import deepspeed

            deepspeed.init_distributed()
        del store  # until here, or its server would have ended
    return Peers(place)


def check_ds_config(ds_config: dict[str, Any]) -> Any:
    """DeepSpeed's own reading of the configuration, batch sizes resolved. Local.

    Args:
        ds_config: left as it is. DeepSpeed's backend must be up, or it assumes one rank.

    Returns:
        A `deepspeed.runtime.config.DeepSpeedConfig`.

    Raises:
        ConfigError: DeepSpeed refuses it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        return DeepSpeedConfig(dict(ds_config))
    # What DeepSpeed 0.19.8 raises on a bad value: assertions, pydantic's errors, its own
    # DeepSpeedConfigError, which has no base but Exception, and whatever the value itself trips.
    except Exception as exc:
        lines = [line.strip() for line in str(exc).strip().splitlines() if line.strip()]
        raise ConfigError(f"DeepSpeed refuses the configuration: {' '.join(lines[:4])}.") from exc


def prepare_shm_op(peers: Peers, say: Callable[[str], None]) -> None:
    """Build DeepSpeed's CPU shared-memory op, or make DeepSpeed do without it.

    DeepSpeed 0.19.8 compiles it when its backend is made (comm/torch.py, build_shm_op), though only
    inference uses it, and fails where it cannot. Call this before.

    Args:
        peers: one rank that cannot have it means none has it.
        say: shows one line to the user; called on rank 0 only.

    Collective: all ranks.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    # A virtual environment's ninja is beside its python, which need not be on the path.
    beside_python = str(Path(sys.executable).parent)
    if beside_python not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + beside_python
    silent: Callable[[str], None] = lambda text: None  # noqa: E731
    reasons = peers.gather(_build(builder, say if peers.rank == 0 else silent))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False
        if peers.rank == 0:
            say(f"DeepSpeed trains without its shared-memory op: {reason}")


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Restore the checkpoint that the folder's file `latest` names.

    Returns:
        The client state that was saved with it.

    Raises:
        CheckpointError: it is not there, or damaged.
        GradPruneError: whatever else the engine refuses by name.

    Collective: all ranks.
    """
    try:
        path, client_state = engine.load_checkpoint(str(folder))
    except GradPruneError:
        raise
    # A damaged file raises whatever its reader raises. It is told, never passed over.
    except Exception as exc:
        first = (str(exc).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"The checkpoint in {folder} must be readable: {type(exc).__name__} {first[:200]}. "
            f"Write the name of an older one into {folder / 'latest'}."
        ) from exc
    if path is None:
        raise CheckpointError(
            f"{folder} must hold the checkpoint that its file latest names, but does not."
        )
    return dict(client_state)


def _build(builder: Any, say: Callable[[str], None]) -> str | None:
    """Load the op, compiling it the first time. Local.

    Returns:
        Why that failed; None if it did not.
    """
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    if not (folder / f"{builder.name}.so").exists():
        compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call] # torch
        for tool in (str(compiler), "ninja"):
            if shutil.which(tool) is None:
                return f"{tool} is not installed"
        lock = folder / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > STALE_LOCK_S:
            return f"an earlier compilation was killed; delete {lock}"
        say("DeepSpeed compiles its shared-memory op once, about a minute ...")
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as exc:
        return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(twice)} is there twice")
    return document
