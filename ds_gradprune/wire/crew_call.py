"""One call of a crew: made in one epoch, and made again in the next if it has failed."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.members import Members
from ds_gradprune.wire.transport import Work, no_answer

_FIRST_NAP_S, _LONGEST_NAP_S = 100e-6, 1e-3
"""Between two looks at a call under way."""


class Crew(Protocol):
    """Whose calls these are; see `crew.CrewTransport`."""

    rank: int
    members: Members

    @property
    def world_size(self) -> int:
        """Islands of the last finished call."""

    def finish(self, call: CrewCall) -> None:
        """Finish all calls up to this one. Collective."""


class CrewCall(Work):
    """One call.

    Args:
        crew: whose.
        given: what this island brings; for a sum the tensor that becomes it.
        out: where rows go; None: a sum.
    """

    def __init__(self, crew: Crew, given: torch.Tensor, out: torch.Tensor | None) -> None:
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
