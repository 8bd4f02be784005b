"""A transport that fails as it is told to."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import torch

from ds_gradprune.wire.loopback import LoopbackHub, LoopbackTransport
from ds_gradprune.wire.transport import Transport, Work

DELAY_S = 0.05
"""Of "delay": well below the hub's time-out."""


class Gone(BaseException):
    """This rank is dead: nothing of the product may catch it."""


class FaultyTransport(Transport):
    """One rank's end of a loopback.

    Args:
        hub: where the ranks meet.
        rank: whose end.
        chance: draws the bits that are flipped.
        over: set when the life has ended; a frozen rank is let go then.

    Attributes:
        deeds: call number inside the step -> what happens in that call, once.
    """

    def __init__(
        self, hub: LoopbackHub, rank: int, chance: random.Random, over: threading.Event
    ) -> None:
        self.rank = rank
        self.world_size = hub.world_size
        self.deeds: dict[int, str] = {}
        self._inner = LoopbackTransport(hub, rank)
        self._chance = chance
        self._over = over
        self._calls = 0

    def begin(self, deeds: dict[int, str]) -> None:
        """A step begins."""
        self.deeds, self._calls = dict(deeds), 0

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`. Collective."""
        return self._start(lambda sent: self._inner.start_all_gather(sent, out), payload, out)

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_to_all`. Collective."""
        return self._start(lambda sent: self._inner.start_all_to_all(sent, out), send, out)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`. Collective."""
        deed = self._deed()
        if deed in ("kill", "stop"):
            self._leave(deed)
        return self._inner.start_all_reduce(tensor)

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self._inner.close()

    def _start(
        self, start: Callable[[torch.Tensor], Work], sent: torch.Tensor, out: torch.Tensor
    ) -> Work:
        deed = self._deed()
        if deed in ("kill", "stop") and self._chance.random() < 0.5:
            self._leave(deed)
        if deed == "corrupt sent":
            sent = sent.clone()
            self._flip(sent)
        return _FaultyWork(self, start(sent), deed, out)

    def _deed(self) -> str:
        self._calls += 1
        return self.deeds.pop(self._calls - 1, "")

    def _leave(self, deed: str) -> None:
        if deed == "stop":
            self._over.wait()
        raise Gone(deed)

    def _flip(self, data: torch.Tensor) -> None:
        flat = data.view(-1)
        if flat.numel():
            flat[self._chance.randrange(flat.numel())] ^= 1 << self._chance.randrange(8)

    def received(self, deed: str, out: torch.Tensor) -> None:
        """A call has ended, in which this was to happen."""
        if deed in ("kill", "stop"):
            self._leave(deed)
        if deed == "corrupt received":
            self._flip(out)


class _FaultyWork(Work):
    def __init__(self, transport: FaultyTransport, work: Work, deed: str, out: torch.Tensor):
        self._transport = transport
        self._work = work
        self._deed = deed
        self._out = out

    def wait(self) -> None:
        """See `Work.wait`."""
        if self._deed == "delay":
            time.sleep(DELAY_S)
        self._work.wait()
        deed, self._deed = self._deed, ""
        self._transport.received(deed, self._out)

    def done(self) -> bool:
        """See `Work.done`."""
        return self._work.done()
