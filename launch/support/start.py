"""Brings DeepSpeed up for a script: configuration file, accelerator, process group.

DeepSpeed is imported inside the functions, because replies on a CPU do without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ds_gradprune.config import load_block, read_config
from ds_gradprune.deepspeed.build_locks import SHM_OP
from ds_gradprune.errors import ConfigError
from ds_gradprune.wire.silence import LATE_S, deadline, within
from ds_gradprune.wire.stand_in import run_that_goes_on, stand_in

from .kept_store import keep_apart
from .peers import Peers
from .place import Place
from .rendezvous import meet, port_of

_LR_BEFORE = "Attempting to get learning rate from scheduler before it has started"

LEAVE_LIMIT_S = 5.0
"""So long threads of the process group may take to end; one that waits for a dead peer does not."""


def read_ds_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed configuration that --config names. Local.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, or gives a key twice.
    """
    import hjson

    if not path.exists():
        raise ConfigError(f"--config must be a file that exists, got {path}.")
    return read_config(path, hjson.loads)


def choose_accelerator() -> None:
    """Tell DeepSpeed to run on the CPU where there is nothing else; before it is imported. Local.

    A user's own DS_ACCELERATOR stays.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def connect(place: Place, timeout_s: float, *, apart: bool = False) -> Peers:
    """Open the process group. Collective: all ranks.

    On a CPU it is made here, so that ranks can agree on a fault before DeepSpeed does anything;
    DeepSpeed adopts a group that exists. On a GPU DeepSpeed makes it. Either way no wait in a group
    that torch or DeepSpeed makes later is longer than `timeout_s`.

    Args:
        place: of this process; its variables must be in the environment.
        timeout_s: a rank that has not come by then never will.
        apart: the store of the ranks lies in a process of its own, so that rank 0 may be lost.
            Where such a run goes on already, this process takes the place of its lost rank.

    Raises:
        AbsentRanks: some rank never came.
        TransportError: the ranks' store failed.
    """
    if place.world_size == 1:
        return Peers(place, timeout_s)
    if apart:
        run = run_that_goes_on(os.environ["MASTER_ADDR"], port_of(os.environ))
        if run is not None:
            stand_in(run, place.rank, place.world_size, timeout_s)
            return Peers(place, timeout_s, apart=True, joins=True)
        keep_apart(place, os.environ)
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if not on_cpu:
        import deepspeed
    store = meet(place, os.environ, timeout_s)
    limit = timedelta(seconds=timeout_s)
    # torch gives a new group its own half hour, whatever the first group was given.
    dist.distributed_c10d.default_pg_timeout = limit
    dist.distributed_c10d.default_pg_nccl_timeout = limit  # type: ignore[attr-defined]
    with deadline(timeout_s + LATE_S, "making the first process groups"):
        if on_cpu:
            dist.init_process_group("gloo", timeout=limit)
        else:
            deepspeed.init_distributed(timeout=limit)
        del store  # until here, or its server would have ended
        return Peers(place, timeout_s, apart=apart)


def quiet_deepspeed() -> None:
    """Let DeepSpeed tell warnings only, without the one that its own start causes. Local.

    DeepSpeed 0.19.8 asks a schedule for its learning rate before the first step, and then warns of
    it (runtime/lr_schedules.py, get_lr).
    """
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(lambda record: _LR_BEFORE not in record.getMessage())


def skip_shm_op() -> None:
    """Make DeepSpeed do without its CPU shared-memory op, which only inference calls. Local.

    DeepSpeed 0.19.8 compiles it for a minute when its backend is made (comm/torch.py,
    build_shm_op), fails where there is no compiler, and waits for ever behind the lock of a start
    that was killed.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__[SHM_OP] = False


def check_ds_config(ds_config: dict[str, Any]) -> Any:
    """DeepSpeed's own reading of the configuration, batch sizes resolved. Local.

    Args:
        ds_config: left as it is. DeepSpeed's backend must be up, or it assumes one rank.

    Returns:
        A `deepspeed.runtime.config.DeepSpeedConfig`.

    Raises:
        ConfigError: DeepSpeed refuses it.
        UnsupportedError: its ZeRO stage is not for our mode.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    from ds_gradprune.deepspeed.compat import check_stage

    try:
        read = DeepSpeedConfig(dict(ds_config))
    # What DeepSpeed 0.19.8 raises on a bad value: assertions, pydantic's errors, its own
    # DeepSpeedConfigError, which has no base but Exception, and whatever the value itself trips.
    except Exception as exc:
        lines = [line.strip() for line in str(exc).strip().splitlines() if line.strip()]
        raise ConfigError(f"DeepSpeed refuses the configuration: {' '.join(lines[:4])}.") from exc
    block = load_block(ds_config)
    if block.enabled:
        check_stage(block.prune, int(read.zero_optimization_stage))
    return read


def end_process(code: int) -> NoReturn:
    """End this process at once; no thread of gloo that waits for a dead peer can hold it. Local.

    A thread of gloo drops the last collective's tensors only after the collective has returned, and
    needs Python's lock for it. One that comes for the lock when the interpreter is already ending
    aborts the process, and its exit code is lost. So the interpreter does not end: it is left.
    """
    if code == 0 and dist.is_available() and dist.is_initialized():
        within(LEAVE_LIMIT_S, dist.destroy_process_group)
    mpi = sys.modules.get("mpi4py.MPI")
    if code == 0 and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpirun takes a rank that leaves without it for a fault
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
    os._exit(code)
