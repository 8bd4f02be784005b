"""Nested plain values and tensors as bytes: a JSON text, then every tensor's own bytes.

What is read makes no objects but numbers, texts, lists, tuples, mappings and tensors. All functions
are local.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.crc import crc_of

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading raises where something else was expected."""

_PLAIN = (bool, int, float, str, type(None))


class Parcel:
    """What is sent.

    Args:
        value: nested mappings, lists and tuples of numbers, texts and tensors. Mappings and lists
            of other kinds arrive as plain ones.

    Raises:
        CheckpointError: something else is in it.

    Attributes:
        text: the JSON.
        nbytes: of everything.
        crc: crc32c of everything.
    """

    def __init__(self, value: Any) -> None:
        self._tensors: list[torch.Tensor] = []
        tree = self._packed(value)
        shapes = [[str(tensor.dtype), list(tensor.shape)] for tensor in self._tensors]
        self.text = json.dumps([tree, shapes]).encode()
        self._flat = [torch.frombuffer(bytearray(self.text), dtype=torch.uint8)]
        self._flat += [_bytes(tensor) for tensor in self._tensors if tensor.numel()]
        self.nbytes = sum(part.numel() for part in self._flat)
        self.crc = crc_of(self._flat)

    def fill(self, out: torch.Tensor, start: int) -> None:
        """Write the bytes from `start` on into (n,) uint8 on the CPU; beyond the end, nothing."""
        begin = 0
        for part in self._flat:
            low, high = max(start, begin), min(start + out.numel(), begin + part.numel())
            if low < high:
                out[low - start : high - start] = part[low - begin : high - begin].cpu()
            begin += part.numel()

    def _packed(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self._tensors.append(value.detach())
            return {"tensor": len(self._tensors) - 1}
        if isinstance(value, Mapping):
            return {"items": [[self._packed(k), self._packed(v)] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._packed(item) for item in value]}
        if isinstance(value, _PLAIN):
            return value
        raise CheckpointError(
            f"the state of a run must be numbers, texts and tensors to be handed over, got a "
            f"{type(value).__name__}. Resume from a checkpoint instead."
        )


def opened(text: bytes, data: torch.Tensor) -> Any:
    """The value of a parcel.

    Args:
        text: its JSON.
        data: (n,) uint8, CPU; the tensors' bytes. They become views of it where they can.

    Raises:
        CheckpointError: it is none.
    """
    with readable():
        tree, shapes = json.loads(text)
        return _unpacked(tree, list(_tensors(shapes, data)))


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """What is read inside is a parcel's, and may be anything.

    Raises:
        CheckpointError: it is not what was expected.
    """
    try:
        yield
    except _UNREADABLE as exc:
        raise CheckpointError(
            f"what another island has handed over cannot be read: {type(exc).__name__} {exc}. "
            "Start the island again with the release of the others."
        ) from exc


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _tensors(shapes: Sequence[Any], data: torch.Tensor) -> Iterator[torch.Tensor]:
    start = 0
    for name, shape in shapes:
        dtype = _DTYPES[name]
        size = math.prod(shape) * dtype.itemsize
        # Memory of its own: bytes may lie anywhere, numbers may not.
        yield data[start : start + size].clone().view(dtype).view(shape)
        start += size


def _unpacked(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    [(kind, inner)] = tree.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "items":
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in inner}
    items = [_unpacked(item, tensors) for item in inner]
    return items if kind == "list" else tuple(items)
