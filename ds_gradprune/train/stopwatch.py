"""Where the time of a step goes. The parts always sum to the wall clock.

Time is counted from `start` to `pause`, over any number of such spans, until `lap`. Every moment in
it belongs to exactly one phase: "compute" unless a `phase` block says otherwise. Work of another
thread is not counted here but noted with `add_hidden`: it does not lengthen the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Phase = Literal["compute", "codec", "wire"]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of an interval.

    Attributes:
        compute_s: forward, backward, optimizer, and all that the framework does between them.
        codec_s: select, encode, decode, apply.
        wire_s: waiting for an exchange, so for the link and for peers.
        hidden_s: of exchanges, while the computation went on; not part of the sum.
    """

    compute_s: float = 0.0
    codec_s: float = 0.0
    wire_s: float = 0.0
    hidden_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """The whole interval."""
        return self.compute_s + self.codec_s + self.wire_s


class Stopwatch:
    """Measures one interval after the other.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times = Times()
        self._phase: Phase = "compute"
        self._since_s: float | None = None
        self._is_seen = False

    def start(self) -> None:
        """The clock runs; nothing changes if it does already."""
        self._is_seen = True
        if self._since_s is None:
            self._since_s = self._clock()

    def pause(self) -> None:
        """The clock stands."""
        if self._since_s is not None:
            self._count()
            self._since_s = None

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """What happens inside belongs to `phase`; blocks may be nested."""
        outer = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    @property
    def compute_s(self) -> float | None:
        """Computation since the last lap, up to the last change of phase; None: it was not seen."""
        return self._times.compute_s if self._is_seen else None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside belongs to no step."""
        runs = self._since_s is not None
        self.pause()
        try:
            yield
        finally:
            if runs:
                self.start()

    def add_hidden(self, seconds: float) -> None:
        """An exchange took so long beside the computation."""
        self._times = replace(self._times, hidden_s=self._times.hidden_s + seconds)

    def lap(self) -> tuple[Times, bool]:
        """End the interval and begin the next one; the clock goes on, or stands, as before.

        Returns:
            The times, and whether the computation was seen: `start` was called in the interval.
        """
        if self._since_s is not None:
            self._count()
        times, is_seen = self._times, self._is_seen
        self._times, self._is_seen = Times(), self._since_s is not None
        return times, is_seen

    def state_dict(self) -> dict[str, Any]:
        """What has been measured of the interval under way."""
        return asdict(self._times) | {"is_seen": self._is_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the clock stands."""
        self._since_s, self._phase = None, "compute"
        self._is_seen = bool(state["is_seen"])
        self._times = Times(**{k: float(v) for k, v in state.items() if k != "is_seen"})

    def _enter(self, phase: Phase) -> None:
        if self._since_s is not None:
            self._count()
        elif phase != "compute":
            # Work outside a step that was seen still has its own time.
            self._since_s = self._clock()
        self._phase = phase

    def _count(self) -> None:
        assert self._since_s is not None
        now_s = self._clock()
        spent_s, self._since_s = now_s - self._since_s, now_s
        field = f"{self._phase}_s"
        self._times = replace(self._times, **{field: getattr(self._times, field) + spent_s})
