"""The error-compensated 1-bit average of 1-bit Adam, with real packed signs on a real wire.

A rewrite for CPUs of what DeepSpeed 0.19.6 does on GPUs (`runtime/comm/nccl.py`,
`compressed_allreduce`), after Tang et al., "1-bit Adam", ICML 2021, arXiv 2102.02888, section 4.
Every tensor x is padded with zeros, so that its signs make one chunk of whole bytes for each rank.
Then, with two memories of errors, both zero at first:

1. Worker: y = x + worker error; its scale s = |y|_2 / sqrt(len y); worker error = y - s sign(y).
   Chunk j of the signs, one bit each, goes to rank j, with s in fp32 (all-to-all).
2. Server of a chunk: z = mean over ranks of s sign(y) + server error; compressed in the same way,
   with a scale of its own, and sent to all ranks (all-gather).

The sign of zero is +1, and padding is treated like any other element, as there.

Two differences, both in favour of the method: the tensors share two messages instead of four
messages for each tensor, at the same number of bytes; and every tensor has a scale of its own, as
there in fp32, but not in fp16, where one scale serves the whole model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

SCALE_BYTES = 4
"""fp32."""


class Wire(Protocol):
    """Between the ranks. Each is collective, and leaves its argument alone unless it says so.

    Attributes:
        size: number of ranks.
        waited_s: seconds spent in here so far.
        sent_bytes: sent by this rank so far, without what TCP adds.
    """

    size: int
    waited_s: float
    sent_bytes: float

    def all_reduce(self, values: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        ...

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """Row i of the result is what rank i had in this rank's row; uint8, shape (size, any)."""
        ...

    def all_gather(self, row: torch.Tensor) -> torch.Tensor:
        """Row i of the result is rank i's `row`; uint8, shape (size, any)."""
        ...


class GlooWire:
    """`Wire` over torch.distributed's default group."""

    def __init__(self) -> None:
        self.size = dist.get_world_size()
        self.waited_s = 0.0
        self.sent_bytes = 0.0

    def all_reduce(self, values: torch.Tensor) -> None:
        """See `Wire`. A ring: every element is sent 2 (size - 1) / size times."""
        start_s = time.perf_counter()
        dist.all_reduce(values)
        self.waited_s += time.perf_counter() - start_s
        self.sent_bytes += 2 * (self.size - 1) / self.size * values.nbytes

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Wire`."""
        received = torch.empty_like(rows)
        start_s = time.perf_counter()
        dist.all_to_all_single(received, rows)
        self.waited_s += time.perf_counter() - start_s
        self.sent_bytes += (self.size - 1) * rows.shape[1]
        return received

    def all_gather(self, row: torch.Tensor) -> torch.Tensor:
        """See `Wire`. A ring as well."""
        received = torch.empty(self.size, row.numel(), dtype=row.dtype)
        start_s = time.perf_counter()
        dist.all_gather_into_tensor(received.view(-1), row)
        self.waited_s += time.perf_counter() - start_s
        self.sent_bytes += (self.size - 1) * row.numel()
        return received


class OneBitMean:
    """The average of a list of tensors over the ranks, one bit per element.

    Args:
        tensors: of the shapes and the dtype that will be averaged.
        wire: between the ranks.

    Attributes:
        payload_bytes: what one call sends from this rank.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], wire: Wire) -> None:
        self._wire, size = wire, wire.size
        unit = size * math.lcm(size, 8)
        self._chunks = [-(-tensor.numel() // unit) * unit // size for tensor in tensors]
        self._row = sum(self._chunks)
        self._message_bytes = self._row // 8 + SCALE_BYTES * len(tensors)
        self.payload_bytes = 2 * (size - 1) * self._message_bytes
        dtype = tensors[0].dtype
        self._worker_error = torch.zeros(size, self._row, dtype=dtype)
        self._server_error = torch.zeros(1, self._row, dtype=dtype)

    def forget(self) -> None:
        """Both memories of errors are zero again. Local."""
        self._worker_error.zero_()
        self._server_error.zero_()

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by the average of the ranks' tensors. Collective."""
        values = self._join(tensors)
        received = self._wire.all_to_all(self._compress(values, self._worker_error))
        signs, scales = self._open(received)
        total = torch.zeros(1, self._row, dtype=values.dtype)
        self._multiply(signs, scales)
        for signed in signs:
            total += signed
        total /= self._wire.size
        row = self._compress(total, self._server_error)[0]
        signs, scales = self._open(self._wire.all_gather(row))
        self._multiply(signs, scales)
        self._split(signs, tensors)

    def _compress(self, values: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Bits and scales of `values` plus `error`, and what they miss into `error`.

        Args:
            values: shape (rows, row); spoiled.
            error: of the same shape.

        Returns:
            uint8, shape (rows, message bytes).
        """
        values += error
        scales = torch.stack(
            [block.norm() / math.sqrt(block.numel()) for block in self._blocks(values)]
        ).float()
        positive = values >= 0
        signed = positive.to(values.dtype).mul_(2).sub_(1)
        self._multiply(signed, scales.expand(len(values), -1))
        torch.sub(values, signed, out=error)
        bits = torch.from_numpy(np.packbits(positive.numpy(), axis=1))
        tail = scales.view(torch.uint8).expand(len(values), -1)
        return torch.cat([bits, tail], dim=1)

    def _open(self, messages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs (+1 or -1), shape (messages, row), and scales, shape (messages, tensors)."""
        bits, tail = messages.split([self._row // 8, messages.shape[1] - self._row // 8], dim=1)
        ones = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1))
        signs = ones.to(self._server_error.dtype).mul_(2).sub_(1)
        return signs, tail.contiguous().view(torch.float32)

    def _multiply(self, signs: torch.Tensor, scales: torch.Tensor) -> None:
        """In place, each tensor's columns by its scale; `scales` has the shape (rows, tensors)."""
        for block, scale in zip(self._blocks(signs), scales.unbind(1), strict=True):
            block.mul_(scale[:, None])

    def _blocks(self, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each tensor's columns."""
        return iter(values.split(self._chunks, dim=1))

    def _join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """All tensors, padded; row j holds what goes to rank j."""
        values = torch.empty_like(self._worker_error)
        for tensor, block in zip(tensors, self._blocks(values), strict=True):
            padded = tensor.new_zeros(block.numel())
            padded[: tensor.numel()] = tensor.flatten()
            block.copy_(padded.view_as(block))
        return values

    def _split(self, values: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Back from what `_join` makes."""
        for tensor, block in zip(tensors, self._blocks(values), strict=True):
            tensor.copy_(block.reshape(-1)[: tensor.numel()].view_as(tensor))
