"""A transport whose ranks may be lost: every call ends alike on all that are left.

All islands make the same calls in the same order. A call ends only when every island of the epoch
has brought its part, so a rank is at most one call ahead of another. When a call fails,
the islands regroup (`members`), and then::

    some have finished the call    they hand its result to those that have not
    nobody has                     all make it again, without those that are gone

So a result, and who has taken part in it, is the same on all islands that go on. This is virtual
synchrony (Birman, Joseph 1987). Whatever is decided from results alone is equal everywhere.

A lost island that comes back is let in between two calls that all make (`let_in`, `join`). It
counts as one that is a call behind, so it learns from the others where they are.

`world_size` is how many have taken part in the last finished call, not who is there now: that
may differ between islands for a moment.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import deque

import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.alike import Alike, AlikeCall
from ds_gradprune.wire.crew_call import CrewCall
from ds_gradprune.wire.door import TICKET_CHARS, Candidate
from ds_gradprune.wire.hand_on import bytes_of
from ds_gradprune.wire.members import Epoch, Members
from ds_gradprune.wire.transport import Transport, Work, check_all_gather, check_all_reduce

_NEVER_IN = -1
_ASK = struct.Struct(f"<BI{TICKET_CHARS}s")
"""Whether somebody asks to be let in, its number, its ticket."""


class CrewTransport(Transport):
    """One island's end of a run whose islands may be lost, for one rank of it.

    Args:
        members: who takes part; it has begun. Else `join` must be the first call.
        alike: how the ranks of this island, each in a crew, go on with the same islands.

    Attributes:
        rank: number of this island; others that are lost do not change it.
        took_part: islands of the last finished call, rising; equal on all islands.
    """

    def __init__(self, members: Members, alike: Alike | None = None) -> None:
        self.rank = members.island
        self._alike = alike
        self._islands: tuple[int, ...] | None = None
        self.took_part = members.epoch.islands
        self.members = members
        self._step: int | None = None
        self._done = 0
        self._last: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._handed: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._calls: deque[CrewCall] = deque()
        self._failure: TransportError | None = None
        self._lock = threading.RLock()

    @property
    def world_size(self) -> int:  # type: ignore[override] # it changes
        """Islands that took part in the last finished call."""
        return len(self.took_part)

    @property
    def place(self) -> int:
        """See `Transport.place`; -1 before this island has been let in."""
        return self.took_part.index(self.rank) if self.rank in self.took_part else _NEVER_IN

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`; `Work.took_part` says whose rows there are. Collective.

        Args:
            payload: see there; read until the call has ended.
            out: the first rows are filled, in the order of `took_part`.
        """
        check_all_gather(payload, out, len(out))
        return self._start(CrewCall(self, payload, out))

    @property
    def islands(self) -> tuple[int, ...]:
        """Islands that have taken part, as all ranks of this one know it."""
        return self.took_part if self._islands is None else self._islands

    def start_common_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_common_gather`. Collective: all islands, and the ranks of this."""
        call = self.start_all_gather(payload, out)
        return call if self._alike is None else AlikeCall(call, out, self._alike, self._agreed)

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """Not here: what was meant for a lost island is nobody's. Raises TransportError."""
        raise TransportError("islands that may be lost exchange with all_gather alone")

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`; `Work.took_part` says whose sum it is. Collective.

        Twice the tensor's memory is held: its sum may have to be handed on.
        """
        check_all_reduce(tensor)
        return self._start(CrewCall(self, tensor, None))

    def advance(self, step: int) -> None:
        """See `Transport.advance`. Local."""
        self._step = step
        if self.members.transport is not None:
            self.members.transport.advance(step)

    def roll(self) -> tuple[int, ...]:
        """Who is there; a barrier. Collective."""
        rows = torch.empty(self.world_size, 1, dtype=torch.uint8)
        self.start_common_gather(torch.zeros(1, dtype=torch.uint8), rows).wait()
        return self.islands

    def leave(self) -> None:
        """All work is done: others must not find this island gone in a call that it has finished.

        Collective.
        """
        with contextlib.suppress(TransportError):  # there is nothing left that could be lost
            self.roll()
            if self.place == 0:
                self.members.end()

    def let_in(self) -> int | None:
        """Let in the island that asks, if all that are there find it alive.

        Returns:
            Its number: all make the next calls with it. None: nobody has come.

        Collective: all islands; no other call may be under way.
        """
        candidate = self.who_asks()
        return candidate.island if candidate is not None and self.admit(candidate) else None

    def who_asks(self) -> Candidate | None:
        """Which island asks to be let in. Collective: all islands; nothing may be under way."""
        candidate = self._who_asks(self.members.door.candidate, self.world_size)
        self.members.door.candidate = None
        return candidate

    def admit(self, candidate: Candidate) -> bool:
        """Let it in, if all that are there find it alive. Collective: all islands."""
        with self._lock:
            self._check()
            self.members.waits = True
            try:
                # Another one may have called for an epoch because a call has failed there.
                while self.members.answered[0] != candidate.ticket:
                    self._recover(candidate)
            except TransportError as exc:
                self._failure = exc
                raise
            finally:
                self.members.waits = False
        return self.members.answered[1]

    def join(self) -> None:
        """Take part in a run that goes on, from its next call on.

        Raises:
            TransportError, TransportTimeout: see `Members.join`.

        Collective: all islands of the run, which call `let_in`.
        """
        candidate = self.members.candidate()
        epoch = self.members.join(candidate)
        self._done = epoch.done[self.rank]
        assert self.members.transport is not None
        try:
            self._handed = self._hand_on(epoch, self.members.transport)
        except TransportError:
            self._handed = self._recover()
        self._who_asks(candidate, len(epoch.islands))

    def _who_asks(self, mine: Candidate | None, rows: int) -> Candidate | None:
        """The first of those that islands have seen. Collective: all islands."""
        told = (0, 0, b"") if mine is None else (1, mine.island, mine.ticket.encode())
        payload = torch.frombuffer(bytearray(_ASK.pack(*told)), dtype=torch.uint8)
        out = torch.empty(rows, _ASK.size, dtype=torch.uint8)
        call = CrewCall(self, payload, out)
        self._calls.append(call)
        if self._handed is None:
            call.begin()
        call.wait()
        assert call.took_part is not None
        for row in out[: len(call.took_part)]:
            asks, island, ticket = _ASK.unpack(row.numpy().tobytes())
            if asks:
                return Candidate(island, ticket.decode(errors="replace"))
        return None

    def close(self) -> None:
        """See `Transport.close`. Local."""
        if self._failure is None:
            self._failure = TransportError("it is closed")
        self.members.close()

    # ---- calls, one after the other ------------------------------------------------------------

    def _agreed(self, islands: tuple[int, ...]) -> None:
        self._islands = islands

    def _start(self, call: CrewCall) -> Work:
        with self._lock:
            self._check()
            self._calls.append(call)
            if self._calls[0] is call:
                call.begin()
        return call

    def _check(self) -> None:
        if self._failure is not None:
            raise TransportError(
                f"the islands' transport cannot be used after a failure: {self._failure}"
            ) from self._failure

    def finish(self, call: CrewCall) -> None:
        """Finish all calls up to this one. Collective."""
        with self._lock:
            while not call.is_over:
                self._check()
                self.members.waits = True
                try:
                    self._finish_first()
                except TransportError as exc:
                    self._failure = exc
                    raise
                finally:
                    self.members.waits = False

    def _finish_first(self) -> None:
        call = self._calls[0]
        handed, self._handed = self._handed, None
        while handed is None:
            try:
                result = call.result(self.members)
                took_part = self.members.epoch.islands
                break
            except TransportError:
                handed = self._recover()
        else:
            took_part, data = handed
            result = call.shaped(data, len(took_part))
        self._done += 1
        self._last, self.took_part = (took_part, result), took_part
        self._calls.popleft()
        call.end(result, took_part)
        if self._calls:
            self._calls[0].begin()

    def _recover(
        self, candidate: Candidate | None = None
    ) -> tuple[tuple[int, ...], torch.Tensor] | None:
        """Go on with those that are alive, and with who asks to be let in.

        Returns:
            Result of the call that is next, if others have finished it; None: make it again.
        """
        while True:
            epoch, candidate = self.members.regroup(self._done, candidate), None
            transport = self.members.transport
            assert transport is not None
            if self._step is not None:
                transport.advance(self._step)
            try:
                return self._hand_on(epoch, transport)
            except TransportError:  # one more was lost; nothing has changed
                continue

    def _hand_on(
        self, epoch: Epoch, transport: Transport
    ) -> tuple[tuple[int, ...], torch.Tensor] | None:
        """Those that are a call ahead give its result to the others. Collective: the epoch."""
        most = max(epoch.done.values())
        if min(epoch.done.values()) == most:
            return None
        # Nobody can finish a call before all have begun it.
        assert most - self._done <= 1
        source = min(island for island, calls in epoch.done.items() if calls == most)
        is_source = source == self.rank
        islands = data = torch.empty(0, dtype=torch.uint8)
        if is_source:
            assert self._last is not None
            islands = torch.tensor(self._last[0], dtype=torch.int64).view(torch.uint8)
            data = self._last[1].contiguous().view(-1).view(torch.uint8)
        islands = bytes_of(transport, islands, is_source)
        data = bytes_of(transport, data, is_source)
        if self._done == most:
            return None
        return tuple(islands.view(torch.int64).tolist()), data
