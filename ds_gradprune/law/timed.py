"""The times of an exchange, as the verdict and the line of times read them."""

from __future__ import annotations

from typing import Protocol


class Timed(Protocol):
    """What is read of a `train.report.StepReport`."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the interval."""

    @property
    def step_time_s(self) -> float | None:
        """Of the interval; None: not seen from its start."""

    @property
    def codec_time_s(self) -> float:
        """Select, encode, decode, apply."""

    @property
    def comm_time_s(self) -> float:
        """Waiting for the exchange."""
