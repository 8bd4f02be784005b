"""A transport whose ranks may be lost: every call ends alike on all that are left.

All islands make the same calls in the same order. A call ends only when every island of the epoch
has brought its part, so a rank is at most one call ahead of another. When a call fails,
the islands regroup (`members`), and then::

    some have finished the call    they hand its result to those that have not
    nobody has                     all make it again, without those that are gone

So a result, and who has taken part in it, is the same on all islands that go on. This is virtual
synchrony (Birman, Joseph 1987). Whatever is decided from results alone is equal everywhere.

`world_size` is how many have taken part in the last finished call, not who is there now: that
may differ between islands for a moment.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.hand_on import bytes_of
from ds_gradprune.wire.members import Epoch, Members
from ds_gradprune.wire.transport import (
    Transport,
    Work,
    check_all_gather,
    check_all_reduce,
    no_answer,
)

_FIRST_NAP_S, _LONGEST_NAP_S = 100e-6, 1e-3
"""Between two looks at a call under way."""


class CrewTransport(Transport):
    """One island's end of a run whose islands may be lost. Has one rank per island.

    Args:
        members: who takes part; it has begun.

    Attributes:
        rank: number of this island; others that are lost do not change it.
        took_part: islands of the last finished call, rising; equal on all islands.
    """

    def __init__(self, members: Members) -> None:
        assert members.transport is not None
        self.rank = members.island
        self.took_part = members.epoch.islands
        self.members = members
        self._step: int | None = None
        self._done = 0
        self._last: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._calls: deque[_CrewCall] = deque()
        self._failure: TransportError | None = None
        self._lock = threading.RLock()

    @property
    def world_size(self) -> int:  # type: ignore[override] # it changes
        """Islands that took part in the last finished call."""
        return len(self.took_part)

    @property
    def place(self) -> int:
        """See `Transport.place`."""
        return self.took_part.index(self.rank)

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`; `Work.took_part` says whose rows there are. Collective.

        Args:
            payload: see there; read until the call has ended.
            out: the first rows are filled, in the order of `took_part`.
        """
        check_all_gather(payload, out, len(out))
        return self._start(_CrewCall(self, payload, out))

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """Not here: what was meant for a lost island is nobody's. Raises TransportError."""
        raise TransportError("islands that may be lost exchange with all_gather alone")

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`; `Work.took_part` says whose sum it is. Collective.

        Twice the tensor's memory is held: its sum may have to be handed on.
        """
        check_all_reduce(tensor)
        return self._start(_CrewCall(self, tensor, None))

    def advance(self, step: int) -> None:
        """See `Transport.advance`. Local."""
        self._step = step
        if self.members.transport is not None:
            self.members.transport.advance(step)

    def roll(self) -> tuple[int, ...]:
        """Who is there; a barrier. Collective."""
        rows = torch.empty(self.world_size, 1, dtype=torch.uint8)
        self.all_gather(torch.zeros(1, dtype=torch.uint8), rows)
        return self.took_part

    def leave(self) -> None:
        """All work is done: others must not find this island gone in a call that it has finished.

        Collective.
        """
        with contextlib.suppress(TransportError):  # there is nothing left that could be lost
            self.roll()

    def close(self) -> None:
        """See `Transport.close`. Local."""
        if self._failure is None:
            self._failure = TransportError("it is closed")
        self.members.close()

    # ---- calls, one after the other ------------------------------------------------------------

    def _start(self, call: _CrewCall) -> Work:
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

    def finish(self, call: _CrewCall) -> None:
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
        while True:
            try:
                result = call.result(self.members)
                took_part = self.members.epoch.islands
                break
            except TransportError:
                handed = self._recover()
            if handed is not None:
                took_part, data = handed
                result = call.shaped(data, len(took_part))
                break
        self._done += 1
        self._last, self.took_part = (took_part, result), took_part
        self._calls.popleft()
        call.end(result, took_part)
        if self._calls:
            self._calls[0].begin()

    def _recover(self) -> tuple[tuple[int, ...], torch.Tensor] | None:
        """Go on with those that are alive.

        Returns:
            Result of the call that is next, if others have finished it; None: make it again.
        """
        while True:
            epoch = self.members.regroup(self._done)
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


class _CrewCall(Work):
    """One call.

    Args:
        crew: whose.
        given: what this island brings; for a sum the tensor that becomes it.
        out: where rows go; None: a sum.
    """

    def __init__(self, crew: CrewTransport, given: torch.Tensor, out: torch.Tensor | None) -> None:
        self.is_over = False
        self._crew = crew
        self._given = given
        self._out = out
        self._result: torch.Tensor | None = None
        self._work: Work | None = None
        self._failure: TransportError | None = None

    def wait(self) -> None:
        """See `Work.wait`."""
        self._crew.finish(self)

    def done(self) -> bool:
        """See `Work.done`."""
        return self.is_over

    def begin(self) -> None:
        """Let it travel, if all is well. Local."""
        transport = self._crew.members.transport
        if transport is None:
            return
        # Memory of its own: after a failure a late peer may still write into it.
        try:
            if self._out is None:
                self._result = torch.empty_like(self._given, device="cpu").copy_(self._given)
                self._work = transport.start_all_reduce(self._result)
            else:
                self._result = torch.empty(
                    transport.world_size, self._given.numel(), dtype=torch.uint8
                )
                self._work = transport.start_all_gather(self._given, self._result)
        except TransportError as exc:  # told, or mended, by whoever waits
            self._failure = exc

    def result(self, members: Members) -> torch.Tensor:
        """What it comes to in this epoch. Collective.

        Raises:
            TransportError: it has failed in this epoch, and may be made again.
        """
        if self._work is None and self._failure is None:
            self.begin()
        work, failure, self._work, self._failure = self._work, self._failure, None, None
        if failure is not None:
            raise failure
        if work is None:
            raise TransportError("there is no transport in this epoch")
        self._await(work, members)
        work.wait()
        assert self._result is not None
        return self._result

    def _await(self, work: Work, members: Members) -> None:
        nap_s, deadline_s = _FIRST_NAP_S, time.monotonic() + members.timeout_s
        while not work.done():
            if time.monotonic() >= deadline_s:
                raise no_answer("a call", self._crew.rank, self._crew.world_size, members.timeout_s)
            if members.is_called:
                raise TransportError("another island has called for the next epoch")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)

    def shaped(self, data: torch.Tensor, count: int) -> torch.Tensor:
        """Another island's result as this one's."""
        if self._out is not None:
            return data.view(count, -1)
        return data.view(self._given.dtype).view(self._given.shape)

    def end(self, result: torch.Tensor, took_part: tuple[int, ...]) -> None:
        """The result is this call's. Local."""
        if self._out is None:
            self._given.copy_(result)
        else:
            self._out[: len(took_part)].copy_(result)
        self.took_part = took_part
        self._work, self._result, self.is_over = None, None, True
