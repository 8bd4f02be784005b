"""MPI moves the payloads, through mpi4py's buffer calls; nothing is ever pickled.

Dense all-reduces stay with the transport this one is built on, torch.distributed in training: a sum
of floats depends on the order of its additions, every library has its own, and a run over MPI is to
give the same parameters, bit for bit, as a run without. Payloads are copied, not added: for them
any library will do.

Importing mpi4py starts MPI, so it is imported when a transport is opened and not before. Its own
defaults are kept: it asks for MPI_THREAD_MULTIPLE, and ends MPI when the process exits. DeepSpeed's
`mpi_discovery` may have imported it already; both then share that one start.
"""

from __future__ import annotations

import atexit
import sys
import time
from typing import Any

import torch

from ds_gradprune.errors import (
    MissingDependencyError,
    RankMismatchError,
    TransportError,
    TransportTimeout,
    UnsupportedError,
)
from ds_gradprune.transport.base import Transport

CHUNK_BYTES = 2**30
"""An MPI 3 count is an int: at most 2^31 - 1 bytes of one rank travel in one call."""

_NAP_SHARE = 1 / 20
_NAP_MIN_S, _NAP_MAX_S = 20e-6, 1e-3
"""How long `_wait` sleeps between two looks: a share of what it has waited already, so the sleeps
cost at most that share of the exchange; not below what a sleep itself costs; and not so long that
a socket's buffer is full before somebody empties it (1 ms at 1 Gbit/s are 125 kB)."""

_abandoned: list[object] = []
"""Requests that never ended and their buffers, which MPI may still touch: kept until the end."""


class MpiTransport(Transport):
    """One rank's end of MPI's world: payloads over MPI, dense sums over `dense`.

    MPI's progress is driven while a call waits, by looks with short sleeps between them, so that
    threads that compute keep their cores. The communicator is a duplicate: messages of others on
    MPI_COMM_WORLD cannot be mistaken for ours.

    After `TransportTimeout`, or whatever else cut an exchange short, an unfinished collective is
    left behind. MPI can neither cancel it nor end while a peer is absent. So every further payload
    is refused, the buffers of the unfinished call are kept from being freed (MPI may still write
    into `out`), and when this process exits it aborts the whole MPI job with code 2 instead of
    waiting for the peer.

    Args:
        dense: the same ranks; does `all_reduce` and says what this rank's number is. It is closed
            with this transport.
        timeout_s: longest wait for one exchange, seconds.
        chunk_bytes: longer payloads travel in so many bytes at a time, at most 2^31 - 1.

    Raises:
        MissingDependencyError: no mpi4py, or no MPI library that it can load.
        TransportError: MPI has not started these processes, or has ended already.
        UnsupportedError: `dense` is a part of MPI's world, or reaches beyond it.
        RankMismatchError: some process has one number in MPI and another one in `dense`.
        TransportTimeout: some rank did not open its transport in time.

    Collective: all ranks construct it.
    """

    def __init__(
        self, dense: Transport, timeout_s: float = 600.0, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        if not 1 <= chunk_bytes < 2**31:
            raise ValueError(f"chunk_bytes must be in [1, 2^31), got {chunk_bytes}")
        self._mpi: Any = _load_mpi()
        self._dense = dense
        self.rank = dense.rank
        self.world_size = dense.world_size
        self._timeout_s = timeout_s
        self._chunk_bytes = chunk_bytes
        self._closed = False
        self._broken = False
        self._comm: Any = None
        self._main_thread_only = self._mpi.Query_thread() < self._mpi.THREAD_SERIALIZED
        self._check_size()
        self._check_usable()
        self._comm = self._duplicate()
        self._check_ranks()

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """See `Transport.all_gather`. Collective."""
        self._check_usable()
        _check_buffers(payload, out, self.world_size)
        payload_bytes = payload.numel()
        if payload_bytes == 0:
            return
        if payload_bytes <= self._chunk_bytes:
            self._gather(payload, [out.numpy(), self._mpi.BYTE])
            return
        for start in range(0, payload_bytes, self._chunk_bytes):
            part = payload[start : start + self._chunk_bytes]
            # A row's part, then a gap as long as the rest of the row: parts land in their rows.
            plain = self._mpi.BYTE.Create_contiguous(part.numel())
            spaced = plain.Create_resized(0, payload_bytes).Commit()
            plain.Free()
            # One `spaced` per rank; the last one's gap reaches past `out`, and is never written.
            self._gather(part, [out.view(-1)[start:].numpy(), 1, spaced])
            spaced.Free()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Transport.all_reduce`; `dense` does it, see above. Collective."""
        self._dense.all_reduce(tensor)

    def advance(self, step: int) -> None:
        """See `Transport.advance`. Local."""
        self._dense.advance(step)

    def close(self) -> None:
        """See `Transport.close`. Local; MPI itself goes on until the process exits."""
        if self._closed:
            return
        self._closed = True
        self._dense.close()
        if not self._broken:
            # Formally collective; Open MPI 5 and MPICH 5 free their side and wait for nobody.
            self._comm.Free()

    # ---- opening -------------------------------------------------------------------------------

    def _check_size(self) -> None:
        """MPI's world and `dense` have as many ranks. Local: all ranks see the same two numbers."""
        mpi_size = self._mpi.COMM_WORLD.Get_size()
        if mpi_size == self.world_size:
            return
        if mpi_size == 1:
            library = self._mpi.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
            raise TransportError(
                f'transport "mpi" needs processes that MPI has started, but each of these '
                f"{self.world_size} is alone in its MPI world. Launch with mpirun -n "
                f"{self.world_size}, or with deepspeed --launcher openmpi --hostfile FILE (and "
                f"--force_multi where FILE has one host), and with the mpirun of the library that "
                f'mpi4py has loaded ({library}); or set transport to "torch".'
            )
        raise UnsupportedError(
            f'transport "mpi" serves the world group only: MPI has started {mpi_size} processes, '
            f"and the process group has {self.world_size}"
        )

    def _duplicate(self) -> Any:
        """A communicator of our own. Collective; non-blocking, so that nobody waits forever."""
        comm, request = self._mpi.COMM_WORLD.Idup()
        self._wait("opening the MPI transport", request, comm)
        return comm

    def _check_ranks(self) -> None:
        """Everybody's number in `dense`, gathered by MPI's numbers. Collective."""
        mine = torch.tensor([self.rank])
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        self._gather(mine.view(torch.uint8), [numbers.view(torch.uint8).numpy(), self._mpi.BYTE])
        wrong = [
            f"MPI rank {mpi_rank} is rank {number}"
            for mpi_rank, number in enumerate(numbers.tolist())
            if mpi_rank != number
        ]
        if wrong:
            self._comm.Free()
            raise RankMismatchError(
                "a process must have the same rank in MPI and in the process group, but "
                f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''} of the group. Set RANK "
                "from the MPI launcher's own numbers, or leave it unset for launch/train.py."
            )

    # ---- one exchange --------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._closed:
            raise TransportError("the MPI transport is closed")
        if self._broken:
            raise TransportError(
                "the MPI transport holds an exchange that never ended and cannot be used again: "
                "start the job anew"
            )
        if self._main_thread_only and not self._mpi.Is_thread_main():
            raise TransportError(
                "MPI was started for calls from the main thread only; leave mpi4py.rc.thread_level "
                'at "multiple", or set it to "serialized"'
            )

    def _gather(self, payload: torch.Tensor, receive: list[Any]) -> None:
        """One Iallgather from begin to end; `receive` is mpi4py's description of the target."""
        send = [payload.numpy(), self._mpi.BYTE]
        try:
            request = self._comm.Iallgather(send, receive)
        except self._mpi.Exception as exc:
            self._abandon(send, receive)
            raise self._failure("all_gather", exc) from exc
        self._wait("all_gather", request, send, receive)

    def _wait(self, operation: str, request: Any, *buffers: object) -> None:
        """Return when the request is done; drive MPI's progress until then."""
        start_s = time.monotonic()
        try:
            while not request.Test():
                waited_s = time.monotonic() - start_s
                if waited_s >= self._timeout_s:
                    raise TransportTimeout(
                        f"{operation} on rank {self.rank} of {self.world_size} had no answer "
                        f"within {self._timeout_s:g} s. MPI cannot take the exchange back: the "
                        "job must be started anew, and is aborted when this process exits"
                    )
                nap_s = min(_NAP_MAX_S, _NAP_SHARE * waited_s)
                if nap_s >= _NAP_MIN_S:
                    time.sleep(nap_s)
        except self._mpi.Exception as exc:
            self._abandon(request, *buffers)
            raise self._failure(operation, exc) from exc
        except BaseException:  # an interrupt leaves the request behind just as a timeout does
            self._abandon(request, *buffers)
            raise

    def _failure(self, operation: str, exc: Exception) -> TransportError:
        return TransportError(
            f"{operation} on rank {self.rank} of {self.world_size} failed in MPI: {exc}"
        )

    def _abandon(self, *what: object) -> None:
        """An exchange has no end: keep its memory, and never wait for MPI to end either."""
        self._broken = True
        if not _abandoned:
            atexit.register(_abort, self._mpi)
        _abandoned.extend(what)


def _load_mpi() -> Any:
    """mpi4py's MPI module, started. Local."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as exc:  # mpi4py 4: RuntimeError where no library is found
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise MissingDependencyError(
            f'transport "mpi" needs mpi4py and an MPI library ({reason}): pip install '
            '"ds_gradprune[mpi]", or, with an MPI of your own, pip install mpi4py'
        ) from exc
    if MPI.Is_finalized():
        raise TransportError("MPI has ended in this process already; it cannot be started again")
    if not MPI.Is_initialized():
        raise TransportError(
            "MPI must be started before the MPI transport is opened: leave mpi4py.rc.initialize "
            "at True, or call MPI.Init_thread yourself"
        )
    return MPI


def _check_buffers(payload: torch.Tensor, out: torch.Tensor, world_size: int) -> None:
    """MPI writes where it is told to, so what it is told is checked."""
    for name, tensor, shape in (
        ("payload", payload, (payload.numel(),)),
        ("out", out, (world_size, payload.numel())),
    ):
        plain = tensor.dtype == torch.uint8 and tensor.device.type == "cpu"
        if not (plain and tensor.is_contiguous() and tuple(tensor.shape) == shape):
            raise ValueError(
                f"{name} must be a contiguous uint8 tensor of shape {shape} on the CPU, got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides "
                f"{tensor.stride()}"
            )


def _abort(mpi: Any) -> None:
    """End the whole job: to end MPI in order would wait for a peer that does not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi.COMM_WORLD.Abort(2)
