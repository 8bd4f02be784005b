"""Where parameters lie in the flat fp32 tensors that an optimizer steps.

Every way of DeepSpeed to keep fp32 weights comes down to the same: some flat tensors, and in each
of them parts of parameters one after the other, perhaps with padding between and behind. All
functions are local.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.piece import Piece, Rest


@dataclass(frozen=True, slots=True)
class Span:
    """A parameter, or the part of it that lies in one of this rank's flat tensors.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter itself, whatever it holds at the moment.
        first: the part's first element, counted from the parameter's start.
        flat: index of the flat tensor.
        start: the part's first element, counted from the flat tensor's start.
        numel: elements of the part, > 0.
        pruned: the whole parameter has more than one dimension and enough elements.
    """

    name: str
    parameter: torch.nn.Parameter
    first: int
    flat: int
    start: int
    numel: int
    pruned: bool

    def view(self, flats: Sequence[torch.Tensor]) -> torch.Tensor:
        """(numel,), the part's elements in the flat tensors."""
        return flats[self.flat].narrow(0, self.start, self.numel)

    def within(self, start: int, stop: int, origin: int = 0) -> Span | None:
        """The part of it in elements start .. stop - 1 of the flat tensor; None: none is.

        Args:
            start: first element.
            stop: one past the last.
            origin: where the result counts its `start` from.
        """
        low, high = max(self.start, start), min(self.start + self.numel, stop)
        if low >= high:
            return None
        first = self.first + low - self.start
        return replace(self, first=first, start=low - origin, numel=high - low)


class Names:
    """Names and shapes of an engine's parameters.

    Args:
        engine: a DeepSpeed engine.
        min_numel: a parameter with fewer elements is never pruned.
    """

    def __init__(self, engine: Any, min_numel: int) -> None:
        self._names: dict[torch.nn.Parameter, str] = engine.param_names
        self._min_numel = min_numel

    def of(self, parameter: torch.nn.Parameter) -> str:
        """The name in the model.

        Raises:
            UnsupportedError: the model has no such parameter.
        """
        if parameter not in self._names:
            raise UnsupportedError(
                'prune = "update" must know the optimizer\'s parameters by name, but the model has '
                f"none like the one of shape {tuple(parameter.shape)}. Register it in the model."
            )
        return self._names[parameter]

    def is_pruned(self, parameter: torch.nn.Parameter) -> bool:
        """The whole parameter's shape decides."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return len(shape) > 1 and shape.numel() >= self._min_numel

    def span(
        self, parameter: torch.nn.Parameter, flat: int, start: int, numel: int, first: int = 0
    ) -> Span:
        """A part of `parameter`."""
        name, pruned = self.of(parameter), self.is_pruned(parameter)
        return Span(name, parameter, first, flat, start, numel, pruned)


def require_fp32(names: Iterable[str], flats: Iterable[torch.Tensor]) -> None:
    """Refuse weights of another type.

    Args:
        names: what to call each flat tensor.
        flats: what the optimizer steps.

    Raises:
        UnsupportedError: names the first that is not fp32.
    """
    for name, flat in zip(names, flats, strict=True):
        if flat.dtype is not torch.float32:
            raise UnsupportedError(
                f'prune = "update" needs float32 weights in the optimizer, got {flat.dtype} for '
                f"{name}. Set bf16.enabled to train a bf16 model, without "
                "bf16_master_weights_and_grads."
            )


def pieces_of(spans: Iterable[Span], flats: Sequence[torch.Tensor]) -> list[Piece]:
    """Views of what the optimizer steps.

    Args:
        spans: which parts.
        flats: the flat tensors, 1-D fp32; detached.
    """
    return [Piece((s.name, s.first), s.name, s.view(flats), s.pruned) for s in spans]


def rest_of(module: torch.nn.Module, owned: Iterable[torch.nn.Parameter]) -> Rest:
    """What a model holds beyond the parameters that its optimizer steps. Local."""
    known = {id(parameter) for parameter in owned}
    unknown = [p for p in module.parameters() if id(p) not in known]
    sharded = [p.ds_tensor for p in unknown if hasattr(p, "ds_tensor")]
    whole = [p.detach() for p in unknown if not hasattr(p, "ds_tensor")]
    return Rest(sharded, [tensor for tensor in [*whole, *module.buffers()] if tensor.numel()])


def balanced(numels: Sequence[int], num_shares: int) -> list[list[tuple[int, int, int]]]:
    """Cut tensors, one after the other, into shares of equal size.

    Args:
        numels: elements of each tensor.
        num_shares: number of shares.

    Returns:
        For every share its windows (tensor, start, stop), none of them empty. Shares differ by at
        most one element.
    """
    total = sum(numels)
    bounds = [total * share // num_shares for share in range(num_shares + 1)]
    return [list(_windows(numels, *pair)) for pair in itertools.pairwise(bounds)]


def _windows(numels: Sequence[int], low: int, high: int) -> Iterator[tuple[int, int, int]]:
    begin = 0
    for index, numel in enumerate(numels):
        start, stop = max(low - begin, 0), min(high - begin, numel)
        if start < stop:
            yield index, start, stop
        begin += numel
