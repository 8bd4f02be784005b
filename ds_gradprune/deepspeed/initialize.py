"""The three ways in: `initialize`, `register`, `attach` (attach.py)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import deepspeed
import hjson
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block
from ds_gradprune.config.load import read_config
from ds_gradprune.deepspeed.agree import check_ranks
from ds_gradprune.deepspeed.asked import muon_steps_first, refuse_asked
from ds_gradprune.deepspeed.attach import attach, on_cpu
from ds_gradprune.deepspeed.build_locks import SHM_OP, refuse_stale_shm_lock, warn_of_locks
from ds_gradprune.deepspeed.facts import facts_before
from ds_gradprune.deepspeed.groups import Groups, kept
from ds_gradprune.deepspeed.trainers import join_trainers, leave_trainers, refuse_miscounted
from ds_gradprune.deepspeed.waits import asking, bounded, everyone
from ds_gradprune.deepspeed.zero3_setup import confine, repartition
from ds_gradprune.deepspeed.zero12 import MUON_FAULT
from ds_gradprune.errors import ConfigError, UnsupportedError
from ds_gradprune.wire.lost import translated
from ds_gradprune.wire.stand_in import run_that_goes_on, stand_in
from ds_gradprune.wire.torchdist import TorchDistTransport

_original = deepspeed.initialize


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with pruned gradients or updates: same arguments, same return.

    The block is validated before DeepSpeed opens anything. An engine without an optimizer, as a
    reference model has, exchanges nothing and is left alone.

    Returns:
        engine, optimizer, training_dataloader, lr_scheduler; `engine.gradprune` is the handle.

    Raises:
        ConfigError, UnsupportedError, RankMismatchError: see `attach`.

    Collective: all ranks.
    """
    result, is_ours = _make(args, kwargs)
    if is_ours:
        attach(result[0])
    return result


def create(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """What `initialize` does before `attach`: the engine, with an mpu if there are islands.

    Raises:
        ConfigError: the block is missing or wrong.
        UnsupportedError: the ranks cannot be islands.

    Collective: all ranks.
    """
    return _make(args, kwargs)[0]


def _make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, Any, Any, Any], bool]:
    """The engine and its companions, and whether it has anything to exchange."""
    given = inspect.signature(_original).bind(*args, **kwargs)
    ds_config = _ds_config(given.arguments)
    if not _has_optimizer(given.arguments, ds_config):
        return _reference(given, ds_config), False
    config = load_block(ds_config)
    if not config.enabled:
        return _call(given), True
    _refuse_strided(given.arguments["model"])
    refuse_asked(given.arguments, ds_config, config.prune)
    _open_comm(given.arguments, config.timeout_s, comes_back=config.min_islands is not None)
    with bounded("starting the engine", config.timeout_s):
        refuse_miscounted(comm.get_world_size())
        if comm.get_world_size() > 1:
            _compare(given.arguments, config)
            everyone(config.timeout_s)
        if comm.get_world_size() > 1 and config.prune == "update":
            groups = _divide(given.arguments, config)
            is_dense = config.warmup_steps and config.warmup_form == "dense"
            if groups.num_islands > 1 and is_dense and muon_steps_first(ds_config):
                raise UnsupportedError(MUON_FAULT)
        with kept():
            return _call(given), True


def _reference(
    given: inspect.BoundArguments, ds_config: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """An engine without an optimizer. At ZeRO stage 3 it gathers inside the island, too."""
    zero = ds_config.get("zero_optimization")
    is_divided = isinstance(zero, dict) and zero.get("stage") == 3
    if not is_divided or not _has_islands(ds_config):
        return _call(given)
    config = load_block(ds_config)
    _open_comm(given.arguments, config.timeout_s)
    if comm.get_world_size() == 1:
        return _call(given)
    with bounded("starting the engine", config.timeout_s):
        groups = _divide(given.arguments, config)
        with kept():
            result = _call(given)
        confine(result[0], groups)
    return result


def _divide(given: dict[str, Any], config: GradientPruningConfig) -> Groups:
    """Make the islands, and the model and the engine to come part of them. Collective."""
    groups = Groups(config.island.ranks, config.timeout_s)
    repartition(given["model"], groups)
    given["mpu"] = groups
    return groups


def _has_islands(ds_config: dict[str, Any]) -> bool:
    if BLOCK not in ds_config:
        return False
    config = load_block(ds_config)
    return config.enabled and config.prune == "update"


def _open_comm(given: dict[str, Any], timeout_s: float, *, comes_back: bool = False) -> None:
    """Open DeepSpeed's communication as `deepspeed.initialize` would, if nobody has yet.

    The others are waited for `timeout_s`, or as long as DEEPSPEED_TIMEOUT says, in minutes.

    Args:
        given: to `initialize`.
        timeout_s: see there.
        comes_back: where a run goes on without this rank, it takes that rank's place.

    Collective: all ranks.
    """
    warn_of_locks()
    names = ("distributed_port", "dist_init_required")
    options = {name: given[name] for name in names if name in given}
    options["dist_backend"] = get_accelerator().communication_backend_name()
    if comm.is_initialized() or dist.is_initialized():
        comm.init_distributed(**options)
        return
    if deepspeed.ops.__compatible_ops__.get(SHM_OP) and get_accelerator().device_name() == "cpu":
        refuse_stale_shm_lock()
        # DeepSpeed loads it first, and may compile it for a minute, which is no wait for a rank.
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    own = default_pg_timeout if "DEEPSPEED_TIMEOUT" in os.environ else timedelta(seconds=timeout_s)
    place = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    rank, world_size = (int(text) if text.isdecimal() else 0 for text in place)
    limit_s = own.total_seconds()
    if comes_back and (run := _run_of(os.environ)) is not None:
        stand_in(run, rank, world_size, timeout_s)
        comm.init_distributed(**options)
        return
    with translated("finding all ranks", rank, world_size, limit_s), asking(limit_s):
        comm.init_distributed(timeout=own, **options)


def _run_of(environ: Mapping[str, str]) -> Any:
    """The store of a run that goes on at the meeting point of this rank; None: there is none."""
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    return run_that_goes_on(address, int(port)) if address and port.isdecimal() else None


def _compare(given: dict[str, Any], config: GradientPruningConfig) -> None:
    """Ranks with different models would wait for each other inside DeepSpeed for half an hour.

    Collective: all ranks.
    """
    ranks = TorchDistTransport(on_cpu(dist.group.WORLD, config.timeout_s), config.timeout_s)
    check_ranks(ranks, facts_before(config, given["model"], given.get("optimizer")))


def register() -> None:
    """Make `deepspeed.initialize` itself prune, for code that calls it (HF Trainer, Accelerate).

    Trainers that are made from now on rotate our files with their own. Twice is fine. Local.
    """
    deepspeed.initialize = initialize
    join_trainers()


def unregister() -> None:
    """Undo `register`. Local."""
    if deepspeed.initialize is not initialize and deepspeed.initialize is not _original:
        raise UnsupportedError("deepspeed.initialize was replaced after register; undo that first")
    deepspeed.initialize = _original
    leave_trainers()


def _call(given: inspect.BoundArguments) -> tuple[Any, Any, Any, Any]:
    result: tuple[Any, Any, Any, Any] = _original(*given.args, **given.kwargs)
    return result


def _has_optimizer(given: dict[str, Any], ds_config: dict[str, Any]) -> bool:
    return given.get("optimizer") is not None or bool(ds_config.get("optimizer"))


def _refuse_strided(model: torch.nn.Module) -> None:
    """DeepSpeed broadcasts weights as bytes, and gloo sums a view's wrong elements."""
    strided = [name for name, p in model.named_parameters() if not p.is_contiguous()]
    if strided:
        listed = ", ".join(strided[:5]) + (", ..." if len(strided) > 5 else "")
        raise UnsupportedError(
            f"parameters must lie contiguously in memory, got {listed}. Make them so before the "
            "engine is made: parameter.data = parameter.data.contiguous()."
        )


def _ds_config(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration in whichever of its four places deepspeed.initialize would find it."""
    in_args = getattr(given.get("args"), "deepspeed_config", None)
    config = given.get("config") or given.get("config_params") or in_args
    if config is None:
        raise ConfigError("deepspeed.initialize must be given config (a path or a dict), got none.")
    return read_config(config, hjson.loads)
