"""The ranks of one island, of which one may wait longer for other islands than the rest do.

While a crew finds out who is gone, its rank is late where the ranks of its island meet. That is no
reason to give the island up. So a wait inside lasts as long as the other ranks may still come, and
ends at once where they cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.members import Members
from ds_gradprune.wire.transport import Transport, Work

_FIRST_NAP_S, _LONGEST_NAP_S = 50e-6, 1e-3
"""Between two looks at a call under way."""

_LOOK_S = 0.5
"""Between two questions to the store."""


class Patient(Transport):
    """Calls between the ranks of an island whose ranks are lost together.

    Args:
        inner: over them; its own time-out is longer than any wait, see `Members.patience_s`.
        members: says what has become of this island.
    """

    def __init__(self, inner: Transport, members: Members) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner = inner
        self._members = members

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`. Collective: the island."""
        return self._started(lambda: self._inner.start_all_gather(payload, out))

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_to_all`. Collective: the island."""
        return self._started(lambda: self._inner.start_all_to_all(send, out))

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`. Collective: the island."""
        return self._started(lambda: self._inner.start_all_reduce(tensor))

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self._inner.close()

    def _started(self, start: Callable[[], Work]) -> Work:
        try:
            return _PatientCall(start(), self._members)
        except TransportError:
            self._members.give_up()
            raise


class _PatientCall(Work):
    """One call of a `Patient`."""

    def __init__(self, work: Work, members: Members) -> None:
        self._work = work
        self._members = members

    def wait(self) -> None:
        """See `Work.wait`."""
        try:
            self._await()
            self._work.wait()
        except TransportError:
            self._members.give_up()
            raise

    def done(self) -> bool:
        """See `Work.done`."""
        return self._work.done()

    def _await(self) -> None:
        nap_s, look, next_s = _FIRST_NAP_S, self._members.vigil(), time.monotonic() + _LOOK_S
        while not self._work.done():
            if time.monotonic() >= next_s:
                look()
                next_s = time.monotonic() + _LOOK_S
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
