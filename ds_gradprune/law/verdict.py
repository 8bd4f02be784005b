"""Does pruning pay in this run? Said once, from the first exchanges that were measured.

The dense steps of the warm-up are compared with the first pruned ones. A step costs computation and
codec, which no link changes, and its bytes. So the two are equally fast on a link of

    rate = 8 * (dense bytes - pruned bytes) / (local time pruned - local time dense)

which is the break-even rate: below it pruning is faster. Waiting for other hosts counts as time of
the exchange, in both. A run without dense steps is compared with an estimate: its computation, and
the dense bytes at the rate of the link that its exchanges show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ds_gradprune.law.stats import median
from ds_gradprune.law.timed import Timed

PAYS = 0.8
"""Pruning pays where a step takes at most this share of a dense one: a pruned step teaches less."""

SKIPPED = 2
"""So many dense steps are not counted: the first ones allocate and compile."""

DENSE_SHARE = 0.9
"""A step is dense that sends this share of the dense bytes and more."""

WANTED = 5
"""So many exchanges are behind each median."""

LEAST_S = 1e-6
"""Less than that is no measurable time."""

_RAMP = "ramp"


class Decided(Protocol):
    """What is read of a `law.decision.Decision`."""

    @property
    def rate_bytes_per_s(self) -> float | None:
        """The link's rate; None: unknown."""


class Measured(Timed, Protocol):
    """What is read of a `train.report.StepReport`."""

    @property
    def density(self) -> float:
        """Kept / all; 1.0: dense."""

    @property
    def cause(self) -> str:
        """Which rule had set the density."""

    @property
    def wire_bytes(self) -> int:
        """Sent by this rank."""

    @property
    def dense_bytes(self) -> int:
        """What it would have sent without pruning, once in the interval."""

    @property
    def nonfinite(self) -> bool:
        """Nothing was applied."""

    @property
    def decision(self) -> Decided:
        """What holds next."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """One interval, per optimizer step."""

    step_s: float
    local_s: float
    wire_bytes: float
    density: float = 1.0
    interval: int = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the first exchanges of a run have shown.

    Attributes:
        dense_step_s: a dense step.
        pruned_step_s: a pruned step, one exchange spread over its interval.
        density: of the last pruned exchange behind it.
        interval: optimizer steps per exchange.
        break_even_mbit: below this link rate pruning is faster, counted in payload; None: the codec
            took no measurable time, so there is none.
        is_estimated: no dense step was seen.
    """

    dense_step_s: float
    pruned_step_s: float
    density: float
    interval: int
    break_even_mbit: float | None
    is_estimated: bool = False

    @property
    def pays(self) -> bool:
        """A pruned step takes at most `PAYS` of a dense one."""
        return self.pruned_step_s <= PAYS * self.dense_step_s

    @property
    def text(self) -> str:
        """One line for a user."""
        every = "" if self.interval == 1 else f", one exchange in {self.interval} steps"
        edge = "faster at any link rate"
        if self.break_even_mbit is not None:
            edge = f"break-even {self.break_even_mbit:.0f} Mbit/s"
        about = " (estimated from the link's rate)" if self.is_estimated else ""
        return (
            f"dense {self.dense_step_s:.2g} s a step{about}, pruned {self.pruned_step_s:.2g} s "
            f"(density {100 * self.density:.3g} %{every}), {edge}: {self._advice}"
        )

    @property
    def _advice(self) -> str:
        if self.pays:
            return f"pruning pays here, {self.dense_step_s / self.pruned_step_s:.2g} times as fast"
        if self.pruned_step_s < self.dense_step_s:
            return (
                "pruning hardly pays here, because the same loss takes more pruned steps than "
                "dense ones"
            )
        return (
            "pruning does not pay here. Set gradient_pruning.enabled to false, or raise sync_every"
        )


class FirstVerdict:
    """Collects the first exchanges of a run, and says its verdict once.

    A lower density costs less. So during the ramp the verdict is said only if pruning pays already;
    else it waits for the first exchanges after the ramp.
    """

    def __init__(self) -> None:
        self._dense: list[_Sample] = []
        self._pruned: list[_Sample] = []
        self._skipped = 0
        self._is_said = False

    def see(self, report: Measured) -> Verdict | None:
        """Take in one exchange.

        Returns:
            The verdict, with the exchange that completes it; None before and afterwards.
        """
        if self._is_said or report.nonfinite or report.step_time_s is None:
            return None
        sample = _Sample(
            report.step_time_s / report.steps,
            max(0.0, report.step_time_s - report.comm_time_s) / report.steps,
            report.wire_bytes / report.steps,
            report.density,
            report.steps,
        )
        if report.density == 1.0:
            self._skipped += 1
            # What is sent in few bits, as in an unpruned warm-up, is no dense step.
            is_dense = report.wire_bytes >= DENSE_SHARE * report.dense_bytes
            if is_dense and self._skipped > SKIPPED and not self._pruned:
                self._dense = [*self._dense, sample][-WANTED:]
            return None
        self._pruned = [*self._pruned, sample][-WANTED:]
        if len(self._pruned) < WANTED:
            return None
        dense = self._dense or _estimated(report)
        if not dense:
            return None
        verdict = judge(dense, self._pruned, is_estimated=not self._dense)
        if report.cause == _RAMP and not verdict.pays:
            return None
        self._is_said = True
        return verdict


def _estimated(report: Measured) -> list[_Sample]:
    """A dense step, from the newest exchange; nothing where no rate is known."""
    rate = report.decision.rate_bytes_per_s
    if rate is None or report.step_time_s is None:
        return []
    local_s = (report.step_time_s - report.codec_time_s - report.comm_time_s) / report.steps
    return [_Sample(local_s + report.dense_bytes / rate, local_s, report.dense_bytes)]


def judge(
    dense: Sequence[_Sample], pruned: Sequence[_Sample], *, is_estimated: bool = False
) -> Verdict:
    """Compare medians of dense and pruned intervals; both hold at least one."""
    local_s = _median(pruned, "local_s") - _median(dense, "local_s")
    saved_bytes = _median(dense, "wire_bytes") - _median(pruned, "wire_bytes")
    return Verdict(
        dense_step_s=_median(dense, "step_s"),
        pruned_step_s=_median(pruned, "step_s"),
        density=pruned[-1].density,
        interval=pruned[-1].interval,
        break_even_mbit=break_even_mbit(local_s, saved_bytes),
        is_estimated=is_estimated,
    )


def break_even_mbit(extra_s: float, saved_bytes: float) -> float | None:
    """The link rate at which saved bytes and extra seconds weigh the same.

    Args:
        extra_s: what pruning costs besides the link, per step.
        saved_bytes: what it spares the link, per step.

    Returns:
        Mbit/s, 0.0 where nothing is spared; None: pruning costs nothing, so it wins at any rate.
    """
    if saved_bytes <= 0.0:
        return 0.0
    return None if extra_s <= LEAST_S else 8e-6 * saved_bytes / extra_s


def _median(samples: Sequence[_Sample], field: str) -> float:
    return median([float(getattr(sample, field)) for sample in samples])
