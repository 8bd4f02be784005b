"""Send and receive memory that is used again."""

from __future__ import annotations

import torch


class Memory:
    """Buffers that are lent, come back, and are lent again.

    A buffer that does not come back, because the call that it was handed to failed, is forgotten.
    """

    _WASTE = 4
    """A buffer so many times larger than what is asked for is given up."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that wait to be lent."""
        return sum(buffer.numel() for buffer in self._free)

    def take(self, nbytes: int) -> torch.Tensor:
        """A uint8 buffer on the CPU, contiguous, of at least `nbytes`; its content is undefined."""
        self._free.sort(key=torch.Tensor.numel)
        for index, buffer in enumerate(self._free):
            if nbytes <= buffer.numel() <= self._WASTE * nbytes:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return torch.empty(nbytes, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take back what `take` has lent; nobody looks at it any more."""
        self._free.append(buffer)
