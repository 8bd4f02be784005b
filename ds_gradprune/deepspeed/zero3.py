"""ZeRO stage 3: every rank of an island holds one part of every parameter.

Between steps a parameter is a placeholder without elements. Its part lies in `ds_tensor`, a view of
a flat 16-bit tensor, and in a flat fp32 tensor per sub-group (deepspeed 0.19.8,
runtime/zero/stage3.py). In fp32 runs both are the same memory. Parts of one parameter are equally
long, so the last ones end in padding, which is never exchanged. Small parameters are *persistent*:
they are gathered after every step and stay so.

Where the gradients are when the optimizer is about to step:

- `averaged_gradients[i]`: one tensor per parameter of the sub-group;
- offloaded: `fp32_partitioned_groups_flat[i].grad`. Their norms were taken during backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.moments import load_scaler, load_state, scaler_of, state_of
from ds_gradprune.deepspeed.spans import Names, Span, pieces_of, require_fp32, rest_of
from ds_gradprune.deepspeed.zero3_setup import confine
from ds_gradprune.train.piece import Piece, Rest

_LOT_NUMEL = 2**22
"""Elements of an island's parameters that are gathered together."""


class Zero3:
    """The fp32 weights of an engine at stage 3; see `train.piece.Shards`.

    Args:
        engine: a DeepSpeed engine.
        groups: the island.
        names: the engine's parameters.

    Raises:
        UnsupportedError: the weights are not fp32.
    """

    warmup_fault: str | None = None

    def __init__(self, engine: Any, groups: Groups, names: Names) -> None:
        self._engine = engine
        self._groups = groups
        self._optimizer = engine.optimizer
        self._spans = list(self._lay_out(names))
        numbers = range(len(self._tensors()))
        require_fp32([f"sub-group {number}" for number in numbers], self._tensors())
        copies = zip(self._tensors(), self._optimizer.fp16_partitioned_groups_flat, strict=True)
        self.has_masters = any(own.data_ptr() != copy.data_ptr() for own, copy in copies)
        self._release = confine(engine, groups)

    def pieces(self) -> list[Piece]:
        """See `Shards.pieces`.

        A parameter that is frozen later is stepped on, with weight decay and momentum, so it stays.
        """
        return pieces_of(self._spans, [tensor.detach() for tensor in self._tensors()])

    every_piece = pieces

    def rest(self) -> Rest:
        """See `Shards.rest`."""
        owned = [p for group in self._optimizer.fp16_groups for p in group]
        return rest_of(self._engine.module, owned)

    @torch.no_grad()
    def publish(self) -> None:
        """See `Shards.publish`. Parameters that are gathered now get the new weights, too."""
        for number in range(len(self._tensors())):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
        lot: list[Any] = []
        for parameter in self._gathered():
            if lot and (
                sum(p.ds_numel for p in lot) + parameter.ds_numel > _LOT_NUMEL
                or lot[0].dtype != parameter.dtype
            ):
                self._refresh(lot)
                lot = []
            lot.append(parameter)
        if lot:
            self._refresh(lot)
        if not get_accelerator().resolves_data_dependency():
            # DeepSpeed gathers on a stream of its own, which does not wait for these writes.
            get_accelerator().synchronize()

    @torch.no_grad()
    def gradients(self) -> list[torch.Tensor]:
        """See `Shards.gradients`."""
        self._wait()
        if self._optimizer.offload_optimizer:
            grads: list[Any] = [tensor.grad for tensor in self._tensors()]
            return [span.view(grads) for span in self._spans]
        of_parameter = {
            id(parameter): gradient
            for number, parameters in enumerate(self._optimizer.fp16_groups)
            for parameter, gradient in zip(
                parameters, self._optimizer.averaged_gradients[number], strict=True
            )
        }
        return [of_parameter[id(s.parameter)].view(-1)[: s.numel] for s in self._spans]

    @torch.no_grad()
    def gradients_changed(self) -> None:
        """See `Shards.gradients_changed`. Offloaded: norms were taken in backward."""
        if not self._optimizer.offload_optimizer:
            return
        for span, gradient in zip(self._spans, self.gradients(), strict=True):
            number = self._optimizer.get_param_id(span.parameter)
            norm = self._optimizer._constant_buffered_norm2(gradient)
            self._optimizer.norm_for_param_grads[number] = norm

    def state_dict(self) -> dict[str, Any]:
        """See `Shards.state_dict`."""
        base = self._optimizer.optimizer
        return state_of(base, self._tensors()) | {"scaler": scaler_of(self._optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shards.load_state_dict`."""
        load_state(self._optimizer.optimizer, self._tensors(), state)
        load_scaler(self._optimizer, state["scaler"])

    def close(self) -> None:
        """See `Shards.close`."""
        self._release()

    def _tensors(self) -> list[torch.Tensor]:
        """This rank's part of every sub-group."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _lay_out(self, names: Names) -> Iterator[Span]:
        for number, parameters in enumerate(self._optimizer.fp16_groups):
            start = 0
            for parameter in parameters:
                part = parameter.partition_numel()
                first = self._groups.shard * part
                numel = min(part, parameter.ds_numel - first)
                if numel > 0:
                    yield names.span(parameter, number, start, numel, first)
                start += part

    def _gathered(self) -> list[Any]:
        """Parameters that hold all their elements now; those on their way are waited for."""
        registry = self._engine.module.ds_inflight_param_registry
        for parameter in list(registry):
            registry.pop(parameter).wait()
        return [
            parameter
            for parameter in self._engine.module.parameters()
            if parameter.ds_status is ZeroParamStatus.AVAILABLE
        ]

    def _refresh(self, lot: list[Any]) -> None:
        """Bring the new weights into gathered parameters, in the memory that they have."""
        device, num_shards = self._engine.device, self._groups.num_shards
        parts = torch.cat([parameter.ds_tensor.to(device) for parameter in lot])
        whole = parts
        if self._groups.inner is not None:
            whole = torch.empty(num_shards * len(parts), dtype=parts.dtype, device=device)
            comm.all_gather_into_tensor(whole, parts, group=self._groups.inner)
        start = 0
        for parameter in lot:
            stop = start + parameter.ds_tensor.numel()
            elements = whole.view(num_shards, -1)[:, start:stop].reshape(-1)
            parameter.data.copy_(elements[: parameter.ds_numel].view(parameter.ds_shape))
            start = stop

    def _wait(self) -> None:
        """Gradients are reduced on a stream of their own."""
        if not get_accelerator().resolves_data_dependency():
            self._optimizer.reduce_and_partition_stream.synchronize()
