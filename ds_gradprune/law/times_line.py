"""A line on where the time goes, in every run: after 10 exchanges, then whenever twice as many."""

from __future__ import annotations

from typing import Protocol

from ds_gradprune.law.timed import Timed

FIRST = 10
"""Exchanges before the first line; the first ones allocate and compile, so it waits for some."""


class Measured(Timed, Protocol):
    """What is read of a `train.report.StepReport`."""

    @property
    def step(self) -> int:
        """The optimizer step that the exchange followed."""

    @property
    def hidden_time_s(self) -> float:
        """Of the exchange, while the computation went on."""


class TimesLine:
    """Adds up a run's times, and says from time to time what a step was made of."""

    def __init__(self) -> None:
        self._seen = 0
        self._next = FIRST
        self._first = self._steps = 0
        self._sums = [0.0] * 4

    def see(self, report: Measured) -> str | None:
        """Take in one exchange.

        Returns:
            The line, where one is due; None elsewhere.
        """
        if report.step_time_s is None:
            return None
        self._first = self._first or report.step - report.steps + 1
        self._steps += report.steps
        parts = (
            report.step_time_s,
            report.codec_time_s,
            report.comm_time_s,
            report.hidden_time_s,
        )
        self._sums = [total + part for total, part in zip(self._sums, parts, strict=True)]
        self._seen += 1
        if self._seen < self._next:
            return None
        self._next = 2 * self._seen
        wall, codec, exposed, hidden = (total / self._steps for total in self._sums)
        compute = max(0.0, wall - codec - exposed)
        line = (
            f"steps {self._first} to {report.step}: {wall:.3g} s a step: computation "
            f"{compute:.3g}, codec {codec:.3g}, wire {exposed:.3g} exposed, {hidden:.3g} hidden"
        )
        self._first = self._steps = 0
        self._sums = [0.0] * 4
        return line
