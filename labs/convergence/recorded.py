"""A function of one tensor on an accelerator, recorded once and replayed: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

is_on = True
"""Whether anything is recorded; else every call computes anew."""

_TRIES = 2
"""Passes before the recording: libraries choose their kernels and allocate in the first ones."""


class Recorded:
    """The function, with its inputs and its result at fixed places.

    Args:
        function: reads and writes memory on the accelerator only, and waits for nothing.
        example: (shape), an input; all later ones have its shape.
    """

    def __init__(
        self, function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
    ) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if not is_on:
            return
        self._input = example.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_TRIES):
                function(self._input)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()  # the recording has memory of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(self._input)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The function of `values`; its result is overwritten by the next call."""
        if self._graph is None:
            return self._function(values)
        self._input.copy_(values)
        self._graph.replay()
        return self._output
