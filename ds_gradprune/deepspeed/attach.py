"""attach(engine): the checks before anything is hooked, and which handle an engine gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import google_crc32c
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_gradprune.config import GradientPruningConfig, load_block
from ds_gradprune.deepspeed import checkpoint, compat
from ds_gradprune.deepspeed.agree import check_ranks, raise_together
from ds_gradprune.deepspeed.carried import Carried
from ds_gradprune.deepspeed.clock import Clock
from ds_gradprune.deepspeed.facts import facts_of
from ds_gradprune.deepspeed.gradient_handle import GradientHandle
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.handle import Handle
from ds_gradprune.deepspeed.idle import IdleHandle
from ds_gradprune.deepspeed.island_handle import IslandHandle
from ds_gradprune.deepspeed.leftovers import unlink_buffer
from ds_gradprune.deepspeed.monitor import show
from ds_gradprune.deepspeed.opening import opening
from ds_gradprune.deepspeed.shards import make_shards
from ds_gradprune.deepspeed.survivors import make_survivors, refuse_unfit, with_rest
from ds_gradprune.deepspeed.waits import bounded, new_group
from ds_gradprune.deepspeed.zero_gradients import (
    ZeroGradientHandle,
    warn_of_late_gradients,
    warn_of_parameters,
)
from ds_gradprune.errors import GradPruneError, UnsupportedError
from ds_gradprune.train.piece import Shards
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.mpi import MpiTransport
from ds_gradprune.wire.owner_reduce import OwnerReduce
from ds_gradprune.wire.stand_in import FAKE
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.transport import Transport

__all__ = ["AnyHandle", "Clock", "Handle", "IdleHandle", "attach"]

logger = logging.getLogger(__name__)

CROWDED = (
    'gradient_pruning.overlap must be false with prune = "gradient" and {ranks} ranks per island, '
    'got "auto". Those sum their gradients in another order then. Leave it out, or set '
    "island.ranks to 1."
)

AnyHandle: TypeAlias = Handle | IdleHandle
T = TypeVar("T")


def attach(engine: Any, *, clock: Clock | None = None) -> AnyHandle:
    """Prune what a DeepSpeed engine exchanges, from its next step on.

    Reads the `gradient_pruning` block from the engine's own configuration. With `enabled: false`,
    with one rank or one island, and without an optimizer (a reference model) the engine is left
    alone.

    Args:
        engine: what `deepspeed.initialize` returned first.
        clock: where time comes from; for tests.

    Returns:
        The handle, also found as `engine.gradprune`.

    Raises:
        ConfigError: the block is missing or wrong.
        UnsupportedError: the engine uses what we cannot serve.
        RankMismatchError: hosts differ in versions, model or configuration.

    Collective: all ranks.
    """
    if not isinstance(engine.config, dict):
        raise UnsupportedError(f"engine.config must be a dict, got {type(engine.config).__name__}")
    config = load_block(engine.config)
    with bounded("attaching to the engine", config.timeout_s):
        handle = _handle(engine, config, clock or Clock())
    if isinstance(handle, Handle):
        handle.facts = facts_of(engine, config).values
        unlink_buffer(dist.get_rank())  # all ranks have answered, so all have opened it
    engine.gradprune = handle
    return handle


def _handle(engine: Any, config: GradientPruningConfig, clock: Clock) -> AnyHandle:
    if not config.enabled or not compat.has_optimizer(engine):
        return IdleHandle(engine, config)
    if dist.get_world_size() == 1:
        compat.check(engine, config.prune)
        return _idle(engine, config, "there is only one rank")
    if config.prune == "gradient":
        return _gradients(engine, config, clock)
    return _islands(engine, config, clock)


def _gradients(engine: Any, config: GradientPruningConfig, clock: Clock) -> AnyHandle:
    group = on_cpu(engine.seq_data_parallel_group, config.timeout_s)
    ranks = TorchDistTransport(group, config.timeout_s)
    _together(ranks, lambda: compat.check(engine, config.prune))
    if ranks.world_size < dist.get_world_size():
        raise UnsupportedError(
            'prune = "gradient" needs an engine whose data-parallel group is all '
            f"{dist.get_world_size()} ranks, got one of {ranks.world_size}. Make it without an mpu "
            "or mesh_param of your own."
        )
    check_ranks(ranks, facts_of(engine, config))
    groups = Groups(config.island.ranks, config.timeout_s)
    if groups.num_islands == 1:
        groups.close(is_mpu=False)
        return _idle(engine, config, "there is only one island")
    if config.overlap and groups.num_shards > 1:
        ranks_each = groups.num_shards
        groups.close(is_mpu=False)
        raise UnsupportedError(CROWDED.format(ranks=ranks_each))
    seat = _seat(ranks, groups)
    if seat.is_first:
        warn_of_parameters(engine, ranks.world_size)
        if config.overlap:
            warn_of_late_gradients(engine)
    reduces_itself = isinstance(engine.optimizer, DeepSpeedZeroOptimizer)
    make = ZeroGradientHandle if reduces_itself else GradientHandle
    return make(engine, config, _channel(config, groups.outer_cpu, clock), clock, seat, groups)


def _seat(ranks: Transport, groups: Groups) -> checkpoint.Seat:
    return checkpoint.Seat(
        ranks, groups.island, groups.num_islands, groups.shard, groups.num_shards
    )


def _islands(engine: Any, config: GradientPruningConfig, clock: Clock) -> AnyHandle:
    groups = engine.mpu
    if not isinstance(groups, Groups):
        raise UnsupportedError(
            'gradient_pruning.prune = "update", the default, needs an engine whose data-parallel '
            "group is its island, and this one was made without. Make it with "
            "ds_gradprune.initialize, or call ds_gradprune.register() before "
            'deepspeed.initialize, or set prune to "gradient".'
        )
    ranks = TorchDistTransport(on_cpu(groups.everyone, config.timeout_s), config.timeout_s)
    _together(ranks, lambda: compat.check(engine, config.prune))
    if groups.num_islands == 1:
        return _idle(engine, config, "there is only one island")
    check_ranks(ranks, facts_of(engine, config))
    shards = _together(ranks, lambda: make_shards(engine, groups, config.min_numel))
    if config.warmup_steps and shards.warmup_fault is not None:
        config = _without_dense(config, shards.warmup_fault)
    equalize(engine.module, groups, shards)
    if ranks.rank == 0:
        show(opening(config, groups.num_islands))
    if config.min_islands is not None:
        refuse_unfit(config, groups)
        facts = with_rest(facts_of(engine, config), engine.module, shards, groups)
        left = make_survivors(config, groups, lambda t: _throttled(t, config, clock), facts)
        seat, channel = _seat(left.everyone, groups), AllGather(left.crew)
        return IslandHandle(engine, config, channel, clock, seat, groups, shards, left)
    seat, outer = _seat(ranks, groups), _channel(config, groups.outer_cpu, clock)
    return IslandHandle(engine, config, outer, clock, seat, groups, shards)


def _without_dense(config: GradientPruningConfig, fault: str) -> GradientPruningConfig:
    """The block where a dense warm-up is impossible: "auto" is "unpruned" there."""
    if config.warmup_form == "dense":
        raise UnsupportedError(fault)
    return config.model_copy(update={"warmup": "unpruned"})


def _idle(engine: Any, config: GradientPruningConfig, why: str) -> IdleHandle:
    logger.warning("gradient pruning is idle: %s, nothing to exchange", why)
    group = on_cpu(engine.data_parallel_group, config.timeout_s)
    ranks = TorchDistTransport(group, config.timeout_s)
    return IdleHandle(engine, config, Carried(engine, config, ranks))


def _together(ranks: Transport, work: Callable[[], T]) -> T:
    """Do something local; an error on one rank is raised on all. Collective: all ranks."""
    result, error = None, None
    try:
        result = work()
    except GradPruneError as exc:
        error = exc
    raise_together(ranks, error)
    return cast(T, result)


def on_cpu(group: Any, timeout_s: float) -> Any:
    """A group of the same ranks that moves what lies in the host's memory.

    Collective: all ranks.
    """
    if dist.get_backend(group) in ("gloo", FAKE):
        return group
    return new_group(dist.get_process_group_ranks(group), timeout_s, backend="gloo")


@torch.no_grad()
def equalize(module: torch.nn.Module, groups: Groups, shards: Shards) -> None:
    """Weights and buffers of island 0 for all: DeepSpeed did so within the island only.

    Only what differs travels: hashes are compared first.

    Collective: all ranks.
    """
    rest = shards.rest()
    frozen = [p for p in module.parameters() if not p.requires_grad and not hasattr(p, "ds_tensor")]
    tensors = [piece.own for piece in shards.pieces()] + rest.sharded + rest.whole + frozen
    distinct = list({id(tensor): tensor for tensor in tensors if tensor.numel()}.values())
    source = dist.get_global_rank(groups.outer, 0)
    for tensor in _differing(distinct, groups):
        whole = tensor.detach().contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), src=source, group=groups.outer)
        tensor.copy_(whole)
    shards.publish()


def _differing(tensors: list[torch.Tensor], groups: Groups) -> list[torch.Tensor]:
    """Those that are not equal on the same-index ranks of all islands, in order. Collective."""
    crcs = torch.tensor([_crc(tensor) for tensor in tensors], dtype=torch.int64)
    rows = [torch.empty_like(crcs) for _ in range(groups.num_islands)]
    dist.all_gather(rows, crcs, group=groups.outer_cpu)
    equal = torch.stack(rows).eq(rows[0]).all(dim=0).tolist()
    return [tensor for tensor, same in zip(tensors, equal, strict=True) if not same]


def _crc(tensor: torch.Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return int(google_crc32c.value(flat))


def _throttled(inner: Transport, config: GradientPruningConfig, clock: Clock) -> Transport:
    """The emulated link, if there is one."""
    if config.throttle is None:
        return inner
    schedule = [
        RatePoint(point.step, point.rate_mbit * 1e6 / 8, point.latency_s, point.outage_s)
        for point in config.throttle.schedule
    ]
    return ThrottledTransport(
        inner, schedule, config.timeout_s, sleep=clock.sleep, clock=clock.now_s
    )


def _channel(config: GradientPruningConfig, group: Any, clock: Clock) -> Channel:
    transport: Transport = TorchDistTransport(group, config.timeout_s)
    if config.transport == "mpi":
        transport = MpiTransport(transport, config.timeout_s)
    transport = _throttled(transport, config, clock)
    if config.exchange_of(transport.world_size) == "owner_reduce":
        if config.clip_to_median is not None:
            raise UnsupportedError(
                f'gradient_pruning.clip_to_median needs exchange = "all_gather", and with '
                f'{transport.world_size} islands "auto" is owner_reduce. Set exchange.'
            )
        keeps = config.prune == "update" or config.error_feedback
        return OwnerReduce(transport, error_feedback=keeps)
    return AllGather(transport)
