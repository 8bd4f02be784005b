"""Whose gradients lie where in memory, asked for what DeepSpeed is about to reduce. Local."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.inside import Gradient


@dataclass(frozen=True, slots=True)
class Place:
    """Where the gradient of a parameter lies.

    Attributes:
        address: of its first element.
        itemsize: bytes of an element.
        gradient: whose it is.
    """

    address: int
    itemsize: int
    gradient: Gradient

    @property
    def stop(self) -> int:
        """One past its last byte."""
        return self.address + self.itemsize * self.gradient.numel


def place_of(tensor: torch.Tensor, gradient: Gradient) -> Place:
    """A gradient where it lies now."""
    return Place(tensor.data_ptr(), tensor.element_size(), gradient)


def gradient_of(name: str, parameter: torch.Tensor, min_numel: int) -> Gradient:
    """The whole gradient of a parameter; small ones and vectors are always sent whole."""
    pruned = parameter.dim() > 1 and parameter.numel() >= min_numel
    return Gradient(name, parameter.numel(), pruned)


class Places:
    """The gradients of a reduction.

    Args:
        places: in any order.
    """

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self._places = sorted(places, key=lambda place: place.address)
        self._starts = [place.address for place in self._places]

    def owners(self, tensors: Sequence[torch.Tensor]) -> tuple[Gradient, ...]:
        """Whose gradients these tensors hold, one after the other; parts have their own residual.

        Raises:
            UnsupportedError: somewhere lies what belongs to no parameter.
        """
        parts: list[tuple[Place, int, int]] = []
        for tensor in tensors:
            address, left = tensor.data_ptr(), tensor.numel()
            while left:
                place = self._at(address)
                start = (address - place.address) // place.itemsize
                stop = min(start + left, place.gradient.numel)
                address += (stop - start) * place.itemsize
                left -= stop - start
                if parts and parts[-1][0] is place and parts[-1][2] == start:
                    start = parts.pop()[1]
                parts.append((place, start, stop))
        return tuple(place.gradient.part(start, stop) for place, start, stop in parts)

    def _at(self, address: int) -> Place:
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._places[index].stop:
            raise UnsupportedError(
                "DeepSpeed reduces a gradient that belongs to none of the model's parameters; "
                "gradient pruning cannot tell whose residual it is"
            )
        return self._places[index]


def whole_gradients(engine: Any) -> list[torch.Tensor]:
    """What DeepSpeed is about to reduce, as `buffered_allreduce_fallback` finds it itself."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        grads, _ = engine.optimizer.get_grads_for_reduction()
    else:
        grads, _ = engine._get_gradients_for_reduction()
    return list(grads)


def places_of(engine: Any, min_numel: int) -> Iterator[Place]:
    """Where the whole gradients lie that DeepSpeed is about to reduce."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        for name, parameter in engine.module.named_parameters():
            if parameter.grad is not None and parameter.numel():
                yield place_of(parameter.grad, gradient_of(name, parameter, min_numel))
        return
    # One flat tensor for every parameter group, whose end may be padding.
    for number, parameters in enumerate(optimizer.bf16_groups):
        end = optimizer.fp32_groups_gradients_flat[number]
        for parameter, grad in zip(
            parameters, optimizer.fp32_groups_gradients[number], strict=True
        ):
            name = optimizer.param_names[parameter]
            yield place_of(grad, gradient_of(name, parameter, min_numel))
            end = end[grad.numel() :]
        if end.numel():
            yield place_of(end, Gradient(f"(padding of group {number})", end.numel(), False))
