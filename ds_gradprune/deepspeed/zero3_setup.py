"""What ZeRO stage 3 does over all ranks, kept inside an island (deepspeed 0.19.8).

- `deepspeed.zero.Init` divides a model among all ranks before there is an engine. `repartition`
  divides it among the ranks of every island instead.
- Before a forward, while the order of modules is not settled, every rank compares it with rank 0 of
  all ranks (`partitioned_param_coordinator.reset_step`). An island that evaluates alone, or whose
  data takes another branch, would wait there for ever. `confine` compares inside the island.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator

from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.errors import RankMismatchError, UnsupportedError

_COMPARE = "assert_ints_same_as_other_ranks"


def repartition(module: torch.nn.Module, groups: Groups) -> None:
    """Divide the parameters of a model that was built under `deepspeed.zero.Init` inside islands.

    A parameter that is whole still, an adapter for example, is marked, so that DeepSpeed divides it
    inside the island, too. A model built without `zero.Init` is left alone.

    Raises:
        UnsupportedError: parameters are divided among neither all ranks nor this island, quantized
            or on NVMe; nothing has changed then.

    Collective: all ranks. Every parameter travels to all ranks once, one after the other.
    """
    parameters: dict[str, Any] = dict(module.named_parameters())
    divided = {name: p for name, p in parameters.items() if hasattr(p, "ds_id")}
    if not divided:
        return
    _refuse(divided, groups)
    group = groups.get_data_parallel_group()
    inside = dist.get_process_group_ranks(group)
    for parameter in parameters.values():
        parameter.ds_zero_partition_process_group = group
    for parameter in divided.values():
        if dist.get_process_group_ranks(parameter.ds_process_group) == inside:
            parameter.ds_process_group = group
        else:
            _move(parameter, group)


def confine(engine: Any, groups: Groups) -> Callable[[], None]:
    """Compare the order of modules inside the island only.

    Args:
        engine: a DeepSpeed engine at stage 3, with an optimizer or without.
        groups: the island.

    Returns:
        What undoes it.

    Local.
    """
    owner = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    coordinator = owner.get_param_coordinator()
    original = coordinator.reset_step

    def compare(ints: list[int]) -> None:
        _compare(ints, groups, engine.device)

    def reset_step() -> None:
        before = getattr(partitioned_param_coordinator, _COMPARE)
        setattr(partitioned_param_coordinator, _COMPARE, compare)
        try:
            original()
        finally:
            setattr(partitioned_param_coordinator, _COMPARE, before)

    def release() -> None:
        if coordinator.__dict__.get("reset_step") is reset_step:
            del coordinator.reset_step

    coordinator.reset_step = reset_step
    return release


def _compare(ints: list[int], groups: Groups, device: torch.device) -> None:
    """All ranks of the island must bring the same numbers."""
    if groups.inner is None:
        return
    packed = torch.tensor([len(ints), *ints], dtype=torch.int64).numpy().tobytes()
    mine = torch.tensor([google_crc32c.value(packed)], dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(groups.num_shards)]
    dist.all_gather(rows, mine, group=groups.inner)
    different = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if different:
        raise RankMismatchError(
            f"ranks of island {groups.island} run the model's modules in different orders: ranks "
            f"{different} of the island differ from its rank 0. ZeRO stage 3 needs the same order "
            "on all of them."
        )


def _refuse(divided: dict[str, Any], groups: Groups) -> None:
    everyone = dist.get_process_group_ranks(groups.everyone)
    inside = dist.get_process_group_ranks(groups.get_data_parallel_group())
    for name, parameter in divided.items():
        ranks = dist.get_process_group_ranks(parameter.ds_process_group)
        faults = {
            f"divided among ranks {ranks}": ranks not in (everyone, inside),
            "quantized": hasattr(parameter.ds_tensor, "ds_quant_scale"),
            "on NVMe": parameter.nvme_swapper is not None,
            "divided twice (zero_hpz_partition_size)": parameter.ds_secondary_tensor is not None,
        }
        found = [fault for fault, is_present in faults.items() if is_present]
        if found:
            raise UnsupportedError(
                f"deepspeed.zero.Init has left {name} {', '.join(found)}, which islands do not "
                f"support. Build the model under zero.Init() without groups of its own, so that it "
                f"is divided among all ranks, or among ranks {inside}."
            )


@torch.no_grad()
def _move(parameter: Any, group: Any) -> None:
    """Gather one parameter from all ranks, and divide it inside the island."""
    parameter.all_gather()
    parameter.ds_process_group = group
    parameter.ds_zero_partition_rank = dist.get_rank(group)
    parameter.ds_zero_partition_world_size = dist.get_world_size(group)
    parameter.ds_tensor = None
    parameter.partition()
