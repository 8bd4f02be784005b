"""The transport protocol: moves bytes between ranks, knows nothing of gradients or codecs.

All ranks of a transport make the same calls in the same order with the same sizes. A call returns
when this rank may reuse every buffer it passed. Implementations: `loopback` (N ranks as threads of
one process), `torchdist` (torch.distributed), `throttle` (a wrapper that emulates a slow link).
"""

from __future__ import annotations

import abc
from types import TracebackType

import torch


class Transport(abc.ABC):
    """One rank's end of a group of peers.

    Attributes:
        rank: this rank inside the group, 0 .. world_size - 1.
        world_size: number of peers, this one included.
    """

    rank: int
    world_size: int

    @abc.abstractmethod
    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """Hand `payload` to every rank and collect theirs.

        Args:
            payload: (payload_bytes,) uint8, CPU, contiguous; equal size on all ranks, may be empty.
                Owned by the caller again when the call returns.
            out: (world_size, payload_bytes) uint8, CPU, contiguous; row r receives rank r's bytes.

        Raises:
            TransportTimeout: some rank did not answer in time.
            TransportError: anything else that broke the exchange.

        Collective: all ranks call it in the same order.
        """

    @abc.abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over ranks, in place: the dense path.

        Args:
            tensor: any shape, dtype and device the group supports; equal on all ranks.

        Raises:
            TransportTimeout: some rank did not answer in time.
            TransportError: anything else that broke the exchange.

        Collective: all ranks call it in the same order.
        """

    def advance(self, step: int) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Tell the transport which optimizer step begins. Local; only emulated links care."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the transport owns. Local; calling it twice is fine."""

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
