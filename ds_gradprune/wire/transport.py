"""The transport protocol: moves bytes between ranks, knows nothing of gradients or codecs.

A call is started and waited for. Between the two the bytes travel and the computation goes on. All
ranks of a transport start the same calls in the same order with the same sizes.

Buffers belong to the transport from start to the end of `Work.wait`. After an error they belong to
it for ever, because a late peer may still write into them: whoever holds them drops them and never
hands them to another call. A transport whose call has failed refuses every further call.

Implementations: `loopback` (N ranks as threads of one process), `torchdist` (torch.distributed),
`mpi` (mpi4py), `throttle` (a wrapper that emulates a slow link).
"""

from __future__ import annotations

import abc
from types import TracebackType

import torch

from ds_gradprune.errors import TransportError, TransportTimeout

_LISTED = 8
"""An error lists so many ranks at most."""


class Work(abc.ABC):
    """A call under way.

    Attributes:
        took_part: ranks whose parts it holds, rising, once it has been waited for; None: all.
    """

    took_part: tuple[int, ...] | None = None

    @abc.abstractmethod
    def wait(self) -> None:
        """Return when this rank has everything and may use every buffer again.

        The time-out is counted from the begin of the wait, so that computation under which the call
        was hidden does not use it up. It holds for the whole call, however many pieces it has. A
        second wait returns, or raises, at once.

        Raises:
            TransportTimeout: some rank did not answer in time.
            TransportError: anything else that broke the call.
        """

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once. Local; ranks may see different answers.

        What all ranks must do alike must not depend on it.
        """


class Finished(Work):
    """A call that had nothing to do."""

    def wait(self) -> None:
        """See `Work.wait`; returns at once."""

    def done(self) -> bool:
        """See `Work.done`; true."""
        return True


class Transport(abc.ABC):
    """One rank's end of a group of peers.

    Every `start_*` raises ValueError where a buffer is not as its text says, and `TransportError`
    where the transport is closed or an earlier call has failed.

    Attributes:
        rank: this rank inside the group, 0 .. world_size - 1.
        world_size: number of peers, this one included.
    """

    rank: int
    world_size: int

    @property
    def place(self) -> int:
        """This rank's row in a result: its rank, or less where ranks have been lost."""
        return self.rank

    @abc.abstractmethod
    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """Hand `payload` to every rank and collect theirs.

        Args:
            payload: (payload_bytes,) uint8, CPU, contiguous; equal size on all ranks, may be empty.
            out: (world_size, payload_bytes) uint8, CPU, contiguous; row r receives rank r's bytes.

        Collective: all ranks start it in the same order.
        """

    def start_common_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """`start_all_gather` whose rows are alike on all ranks of an island. Collective: these."""
        return self.start_all_gather(payload, out)

    @abc.abstractmethod
    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """Hand row r of `send` to rank r and collect the rows that the ranks have for this one.

        Args:
            send: (world_size, row_bytes) uint8, CPU, contiguous; equal size on all ranks, may be
                empty.
            out: the same shape; row r receives what rank r had for this rank.

        Collective: all ranks start it in the same order.
        """

    @abc.abstractmethod
    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """Replace `tensor` by its sum over ranks, in place: the dense path.

        Args:
            tensor: any shape, contiguous, of a dtype and device the group supports; equal on all
                ranks.

        Collective: all ranks start it in the same order.
        """

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """`start_all_gather` and wait. Collective."""
        self.start_all_gather(payload, out).wait()

    def all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> None:
        """`start_all_to_all` and wait. Collective."""
        self.start_all_to_all(send, out).wait()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """`start_all_reduce` and wait. Collective."""
        self.start_all_reduce(tensor).wait()

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


# ---- what implementations share --------------------------------------------------------------


class Gate:
    """Whether a transport may still be used.

    Args:
        name: what the user calls the transport.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._closed = False
        self._failure: str | None = None

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    @property
    def failed(self) -> bool:
        """`fail` was called."""
        return self._failure is not None

    def check(self) -> None:
        """Let a call through.

        Raises:
            TransportError: the transport is closed, or a call of it has failed.
        """
        if self._closed:
            raise TransportError(f"the {self._name} transport is closed")
        if self._failure is not None:
            raise TransportError(
                f"the {self._name} transport cannot be used after a failed call: start the job "
                f"anew from the last checkpoint. The call that failed: {self._failure}"
            )

    def fail(self, failure: BaseException) -> None:
        """No further call passes; the first failure is the one that is told."""
        if self._failure is None:
            self._failure = str(failure) or type(failure).__name__

    def close(self) -> None:
        """No further call passes."""
        self._closed = True


class Call(Work):
    """A `Work` that ends once: remembers how, and shuts the gate when it fails.

    Args:
        gate: of the transport.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._over = False
        self._failure: BaseException | None = None

    def wait(self) -> None:
        """See `Work.wait`."""
        if self._failure is not None:
            raise self._failure
        if self._over:
            return
        try:
            self._finish()
        except BaseException as exc:  # an interrupt leaves the call behind just as a fault does
            self._failure = exc
            self._gate.fail(exc)
            raise
        self._over = True

    def done(self) -> bool:
        """See `Work.done`."""
        return self._over or self._failure is not None or self._has_ended()

    @abc.abstractmethod
    def _finish(self) -> None:
        """What `wait` does the first time."""

    @abc.abstractmethod
    def _has_ended(self) -> bool:
        """Whether `_finish` would return, or raise, at once."""


def check_all_gather(
    payload: torch.Tensor, out: torch.Tensor, world_size: int, device: str = "cpu"
) -> None:
    """Raise ValueError unless the buffers are what `Transport.start_all_gather` says."""
    _check_bytes("payload", payload, (payload.numel(),), device)
    _check_bytes("out", out, (world_size, payload.numel()), device)


def check_all_to_all(send: torch.Tensor, out: torch.Tensor, world_size: int) -> None:
    """Raise ValueError unless the buffers are what `Transport.start_all_to_all` says."""
    row_bytes = send.numel() // world_size
    _check_bytes("send", send, (world_size, row_bytes))
    _check_bytes("out", out, (world_size, row_bytes))


def check_all_reduce(tensor: torch.Tensor) -> None:
    """Raise ValueError unless the tensor is contiguous: gloo sums a view's wrong elements."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"tensor must be contiguous, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}: reduce tensor.contiguous() and copy the sum back"
        )


def _check_bytes(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: str = "cpu"
) -> None:
    plain = tensor.dtype == torch.uint8 and tensor.device.type == device
    if not (plain and tensor.is_contiguous() and tuple(tensor.shape) == shape):
        raise ValueError(
            f"{name} must be a contiguous uint8 tensor of shape {shape} on the {device}, got "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides "
            f"{tensor.stride()}"
        )


def peers_of(rank: int, world_size: int) -> str:
    """The other ranks, for a message: "rank 1", "ranks 0, 2, 3", "nobody"."""
    peers = [str(peer) for peer in range(world_size) if peer != rank]
    listed = ", ".join(peers[:_LISTED]) + (", ..." if len(peers) > _LISTED else "")
    if not peers:
        return "nobody"
    return f"rank {listed}" if len(peers) == 1 else f"ranks {listed}"


def no_answer(operation: str, rank: int, world_size: int, limit_s: float) -> TransportTimeout:
    """The error for a call that did not end in time, with the usual causes."""
    peers = peers_of(rank, world_size)
    whom = peers if world_size <= 2 else f"at least one of {peers}"
    return TransportTimeout(
        f"{operation} on rank {rank} of {world_size} had no answer from {whom} within "
        f"{limit_s:g} s. Usual causes: the link is dead or far slower than timeout_s allows; a "
        "host is gone (look for its last lines of output); a rank made fewer steps than the others "
        "(uneven data: give every rank the same number of batches)"
    )
