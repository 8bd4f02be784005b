"""MPI moves the payloads, through mpi4py's buffer calls; nothing is ever pickled.

Dense all-reduces stay with the transport this one is built on, torch.distributed in training: a sum
of floats depends on the order of its additions, every library has its own, and a run over MPI is to
give the same parameters, bit for bit, as a run without. Payloads are copied, not added: for them
any library will do.

Importing mpi4py starts MPI, so it is imported when a transport is opened and not before. Its own
defaults are kept: it asks for MPI_THREAD_MULTIPLE, and ends MPI when the process exits. DeepSpeed's
`mpi_discovery` may have imported it already; both then share that one start.

Longer than 300 lines: one transport, whose calls share their errors and their memory.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ds_gradprune.errors import (
    MissingDependencyError,
    RankMismatchError,
    TransportError,
    TransportTimeout,
    UnsupportedError,
)
from ds_gradprune.wire.transport import (
    Call,
    Gate,
    Transport,
    Work,
    check_all_gather,
    check_all_to_all,
    no_answer,
)

CHUNK_BYTES = 2**30
"""An MPI 3 count is an int: at most 2^31 - 1 bytes of one rank travel in one call."""

_NAP_SHARE = 1 / 20
_NAP_MIN_S, _NAP_MAX_S = 20e-6, 1e-3
"""How long `wait_for` sleeps between two looks: a share of what it has waited already, so that the
sleeps cost at most that share of the call; not below what a sleep itself costs; and not so long
that a socket's buffer is full before somebody empties it (1 ms at 1 Gbit/s are 125 kB)."""

_abandoned: list[object] = []
"""Requests that never ended and their buffers, which MPI may still touch: kept until the end."""


class MpiTransport(Transport):
    """One rank's end of MPI's world: payloads over MPI, dense sums over `dense`.

    MPI makes progress only while somebody calls it: a wait, by looks with short sleeps between
    them, so that threads that compute keep their cores; and every `Work.done`. A caller that hides
    an exchange behind computation asks `done` now and then. The communicator is a duplicate:
    messages of others on MPI_COMM_WORLD cannot be mistaken for ours.

    After `TransportTimeout`, or whatever else cut a call short, an unfinished collective is left
    behind. MPI can neither cancel it nor end while a peer is absent. So every further call is
    refused, the buffers of the unfinished one are kept from being freed (MPI may still write into
    `out`), and when this process exits it aborts the whole MPI job with code 2 instead of waiting
    for the peer.

    Args:
        dense: the same ranks; does `all_reduce` and says what this rank's number is. It is closed
            with this transport.
        timeout_s: longest wait for one call, seconds.
        chunk_bytes: longer payloads travel in so many bytes at a time, at most 2^31 - 1.

    Raises:
        MissingDependencyError: no mpi4py, or no MPI library that it can load.
        TransportError: MPI has not started these processes, or has ended already.
        UnsupportedError: `dense` is a part of MPI's world, or reaches beyond it.
        RankMismatchError: some process has one number in MPI and another one in `dense`.
        TransportTimeout: some rank did not open its transport in time.

    Attributes:
        under_way: calls that have not been waited for, with their buffers.

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
        self._gate = Gate("MPI")
        self.under_way: set[object] = set()
        self._comm: Any = None
        self._main_thread_only = self._mpi.Query_thread() < self._mpi.THREAD_SERIALIZED
        self._check_size()
        self._check_usable()
        self._comm = self._duplicate()
        self._check_ranks()

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`. Collective."""
        self._check_usable()
        check_all_gather(payload, out, self.world_size)
        call = _MpiCall(self._gate, self, "all_gather")
        for start, width in self._chunks(payload.numel()):
            part = [payload[start : start + width].numpy(), self._mpi.BYTE]
            call.begin(self._comm.Iallgather, part, self._columns(call, out, start, width))
        return call

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_to_all`. Collective."""
        self._check_usable()
        check_all_to_all(send, out, self.world_size)
        call = _MpiCall(self._gate, self, "all_to_all")
        for start, width in self._chunks(send.shape[1]):
            columns = [self._columns(call, rows, start, width) for rows in (send, out)]
            call.begin(self._comm.Ialltoall, *columns)
        return call

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`; `dense` does it, see above. Collective."""
        return self._dense.start_all_reduce(tensor)

    def advance(self, step: int) -> None:
        """See `Transport.advance`. Local."""
        self._dense.advance(step)

    def close(self) -> None:
        """See `Transport.close`. Local; MPI itself goes on until the process exits."""
        if self._gate.closed:
            return
        self._gate.close()
        self._dense.close()
        if self.under_way:
            self._abandon()
        elif not self._gate.failed:
            # Formally collective; Open MPI 5 and MPICH 5 free their side and wait for nobody.
            self._comm.Free()

    def wait_for(self, operation: str, requests: Sequence[Any], *left: object) -> None:
        """Drive MPI's progress until all requests are done. Collective.

        Raises:
            TransportTimeout: they were not done within `timeout_s`.
            TransportError: MPI failed. After any error requests and `left` are kept for ever.
        """
        start_s = time.monotonic()
        with self.told(operation, *requests, *left):
            for request in requests:
                while not request.Test():
                    waited_s = time.monotonic() - start_s
                    if waited_s >= self._timeout_s:
                        raise self._timed_out(operation)
                    nap_s = min(_NAP_MAX_S, _NAP_SHARE * waited_s)
                    if nap_s >= _NAP_MIN_S:
                        time.sleep(nap_s)

    @contextlib.contextmanager
    def told(self, operation: str, *left: object) -> Iterator[None]:
        """What MPI raises, in our own words; after any error `left` is kept for ever."""
        try:
            yield
        except BaseException as exc:  # an interrupt leaves a call behind just as a time-out does
            self._abandon(*left)
            if isinstance(exc, self._mpi.Exception):
                raise TransportError(
                    f"{operation} on rank {self.rank} of {self.world_size} failed in MPI: {exc}"
                ) from exc
            raise

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
        self.wait_for("opening the MPI transport", [request], comm)
        return comm

    def _check_ranks(self) -> None:
        """Everybody's number in `dense`, gathered by MPI's numbers. Collective."""
        mine = torch.tensor([self.rank])
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        rows = numbers.view(torch.uint8).view(self.world_size, -1)
        self.all_gather(mine.view(torch.uint8), rows)
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

    # ---- one call ------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        self._gate.check()
        if self._main_thread_only and not self._mpi.Is_thread_main():
            raise TransportError(
                "MPI was started for calls from the main thread only; leave mpi4py.rc.thread_level "
                'at "multiple", or set it to "serialized"'
            )

    def _abandon(self, *what: object) -> None:
        """A call has no end: keep its memory, and never wait for MPI to end either."""
        if not _abandoned:
            atexit.register(_abort, self._mpi)
        _abandoned.extend([*what, *self.under_way])

    def _timed_out(self, operation: str) -> TransportTimeout:
        told = no_answer(operation, self.rank, self.world_size, self._timeout_s)
        return TransportTimeout(
            f"{told}. MPI cannot take the call back: the job must be started anew, and is aborted "
            "when this process exits"
        )

    def _chunks(self, width: int) -> Iterator[tuple[int, int]]:
        """First byte and width of the parts in which a row travels."""
        for start in range(0, width, self._chunk_bytes):
            yield start, min(self._chunk_bytes, width - start)

    def _columns(self, call: _MpiCall, rows: torch.Tensor, start: int, width: int) -> list[Any]:
        """mpi4py's description of `width` bytes of every row, from byte `start` on."""
        row_bytes = rows.shape[1]
        if width == row_bytes:
            return [rows.numpy(), self._mpi.BYTE]
        # A row's part, then a gap as long as the rest of the row: one such type for every rank. The
        # last one's gap reaches past the rows, and is never touched.
        plain = self._mpi.BYTE.Create_contiguous(width)
        spaced = plain.Create_resized(0, row_bytes).Commit()
        plain.Free()
        call.types.append(spaced)
        return [rows.view(-1)[start:].numpy(), 1, spaced]


class _MpiCall(Call):
    """One call: its parts are MPI's requests.

    Args:
        gate: of the transport.
        transport: whose call it is.
        operation: for messages.

    Attributes:
        types: datatypes that the requests use; freed in the end.
    """

    def __init__(self, gate: Gate, transport: MpiTransport, operation: str) -> None:
        super().__init__(gate)
        self._transport = transport
        self._operation = operation
        self._requests: list[Any] = []
        self._buffers: list[object] = []
        self.types: list[Any] = []

    def begin(self, start: Callable[..., Any], send: list[Any], receive: list[Any]) -> None:
        """Start one part.

        Raises:
            TransportError: MPI refused it.
        """
        self._buffers += [send, receive]
        self._transport.under_way.add(self)
        try:
            with self._transport.told(self._operation):
                self._requests.append(start(send, receive))
        except BaseException as exc:
            self._gate.fail(exc)
            raise

    def _finish(self) -> None:
        self._transport.wait_for(self._operation, self._requests)
        for datatype in self.types:
            datatype.Free()
        self._transport.under_way.discard(self)

    def _has_ended(self) -> bool:
        with self._transport.told(self._operation):
            return all([request.Test() for request in self._requests])  # each makes progress


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


def _abort(mpi: Any) -> None:
    """End the whole job: to end MPI in order would wait for a peer that does not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi.COMM_WORLD.Abort(2)
