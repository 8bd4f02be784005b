"""From runs to figures: medians over rounds, and wall-clock curves. Pure.

A curve of loss against wall-clock is measured where the run was made at that rate. Elsewhere it is
combined: the losses of the unshaped run, and for every step the median time of its kind of steps in
the short stretch at that rate; a dense step of a compressing method counts with the time that
dense_fp32 takes.

Where not every step exchanges (0/1 Adam), the time of "a step" is the mean over the kinds of steps,
each with its median, as often as it occurs in the whole run; so are the bytes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from labs.race.campaign import Run, rate_mbit
from labs.race.crew import Step
from labs.race.methods import DENSE, parse_method

Curve = list[tuple[float, float]]
"""(seconds of training, validation loss), in order."""

CONTRACT = (
    "method",
    "hosts",
    "rate_mbit",
    "step_time_s",
    "codec_s",
    "exposed_comm_s",
    "hidden_fraction",
    "wire_bytes",
    "val_loss",
    "time_to_dense_loss_s",
    "throughput_vs_unshaped",
)
"""The keys of a row in the last line of standard output."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one rate: medians over rounds of medians over steps.

    Dense warm-up steps count only in `time_to_dense_loss_s` and the curves.

    Attributes:
        method: name.
        hosts: how many.
        rate_mbit: of every link; None: unshaped.
        step_time_s: wall clock of a step.
        step_time_iqr_s: interquartile range over all steps of all rounds.
        compute_s, codec_s, exposed_comm_s: its parts.
        hidden_fraction: share of the time that the counted bytes need on this link, which no step
            waited for; None: unshaped, or not counted.
        wire_bytes: sent per host and step at the interface, TCP included; None: not counted.
        payload_bytes: what the method itself says it sent; None: it does not say.
        val_loss: after the plan's steps.
        val_loss_spread: largest minus smallest of the rounds.
        time_to_dense_loss_s: seconds of training until the loss that dense has at its end; None:
            not reached.
        tokens_per_s: of all ranks.
        throughput_vs_unshaped: tokens per second over those of the same method on an unshaped link.
        density: of the elements sent; None: nothing is pruned.
        is_combined: loss and times come from different runs, see the module.
        is_simulated: not the method's own code, but its update and its bytes.
    """

    method: str
    hosts: int
    rate_mbit: float | None
    step_time_s: float
    step_time_iqr_s: float
    compute_s: float
    codec_s: float
    exposed_comm_s: float
    hidden_fraction: float | None
    wire_bytes: float | None
    payload_bytes: float | None
    val_loss: float | None
    val_loss_spread: float | None
    time_to_dense_loss_s: float | None
    tokens_per_s: float
    throughput_vs_unshaped: float | None
    density: float | None
    is_combined: bool
    is_simulated: bool

    def contract(self) -> dict[str, Any]:
        """The keys of the last line of standard output."""
        row = dataclasses.asdict(self)
        return {key: row[key] for key in CONTRACT}


@dataclass(frozen=True, slots=True)
class Figures:
    """All runs of a campaign, indexed.

    Attributes:
        runs: as they were made.
        hosts: how many.
        steps: the loss is reported after so many.
        tokens_per_step: of all ranks.
    """

    runs: Sequence[Run]
    hosts: int
    steps: int
    tokens_per_step: int

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return self.runs[0].num_parameters

    def rows(self) -> list[Row]:
        """One per method and rate, in the order of the runs."""
        return [self._row(*key) for key in dict.fromkeys((r.method, r.rate) for r in self.runs)]

    def of(self, method: str, rate: str | None) -> list[Run]:
        """The runs of a method at a rate, in order of rounds."""
        return [run for run in self.runs if (run.method, run.rate) == (method, rate)]

    def curve(self, method: str, rate: str | None, number: int) -> Curve | None:
        """Loss against wall-clock of one round; None: the times or the losses are missing."""
        measured = self._one(method, rate, number)
        if measured is not None and not measured.is_short:
            return _measured_curve(measured)
        whole = self._one(method, None, number)
        if measured is None or whole is None:
            return None
        times_s = _medians(measured.rest.steps, "wall_s")
        dense_s = self._dense_step_s(rate, number)
        if dense_s is not None:
            times_s["dense"] = dense_s
        steps = _steps(whole)
        if not times_s.keys() >= {step.kind for step in steps}:
            return None
        return _with_losses(whole, ((step.step, times_s[step.kind]) for step in steps))

    def target_loss(self, number: int) -> float | None:
        """Dense's validation loss after the plan's steps, in one round."""
        run = self._one(DENSE, None, number)
        return None if run is None else _loss_at(run, self.steps)

    def time_to_dense_loss_s(self, method: str, rate: str | None) -> float | None:
        """Median over rounds; a round that does not get there counts as never."""
        times = []
        for run in self.of(method, rate):
            target, curve = self.target_loss(run.round), self.curve(method, rate, run.round)
            reached = None if target is None or curve is None else first_below(curve, target)
            times.append(math.inf if reached is None else reached)
        result = statistics.median(times)
        return result if math.isfinite(result) else None

    def _one(self, method: str, rate: str | None, number: int) -> Run | None:
        return next((run for run in self.of(method, rate) if run.round == number), None)

    def _dense_step_s(self, rate: str | None, number: int) -> float | None:
        run = self._one(DENSE, rate, number)
        return None if run is None else median(run.rest.steps, "wall_s")

    def _row(self, method: str, rate: str | None) -> Row:
        runs = self.of(method, rate)
        whole = [run for run in self.of(method, None) if not run.is_short]
        whole = [run for run in runs if not run.is_short] or whole
        losses = [loss for run in whole if (loss := _loss_at(run, self.steps)) is not None]
        step_s = self._part(runs, "wall_s")
        walls = [step.wall_s for run in runs for step in run.rest.steps]
        low, _, high = statistics.quantiles(walls, n=4)
        exposed_comm_s = self._part(runs, "comm_s")
        wire_bytes = _over_rounds(runs, lambda run: self._counted(run).rest.wire_bytes)
        unshaped = self.of(method, None)
        return Row(
            method=method,
            hosts=self.hosts,
            rate_mbit=rate_mbit(rate),
            step_time_s=step_s,
            step_time_iqr_s=high - low,
            compute_s=self._part(runs, "compute_s"),
            codec_s=self._part(runs, "codec_s"),
            exposed_comm_s=exposed_comm_s,
            hidden_fraction=hidden_fraction(rate_mbit(rate), wire_bytes, exposed_comm_s),
            wire_bytes=wire_bytes,
            payload_bytes=_over_rounds(runs, lambda run: _mean_payload(self._counted(run))),
            val_loss=statistics.median(losses) if losses else None,
            val_loss_spread=max(losses) - min(losses) if losses else None,
            time_to_dense_loss_s=self.time_to_dense_loss_s(method, rate),
            tokens_per_s=self.tokens_per_step / step_s,
            throughput_vs_unshaped=self._part(unshaped, "wall_s") / step_s if unshaped else None,
            density=_over_rounds(runs, _median_density),
            is_combined=all(run.is_short for run in runs),
            is_simulated=parse_method(method).side == "simulated",
        )

    def _part(self, runs: Sequence[Run], name: str) -> float:
        part = _over_rounds(runs, lambda run: self._typical(run, name))
        assert part is not None
        return part

    def _typical(self, run: Run, name: str) -> float:
        """One field of a step, see the module."""
        medians = _medians(run.rest.steps, name)
        shares = Counter(step.kind for step in self._counted(run).rest.steps)
        return sum(medians[kind] * count for kind, count in shares.items()) / shares.total()

    def _counted(self, run: Run) -> Run:
        """The run that tells how often which kind of step occurs: not a stretch of uneven ones."""
        whole = self._one(run.method, None, run.round) if run.is_short else run
        is_even = whole is None or all(step.kind == "usual" for step in whole.rest.steps)
        return run if whole is None or is_even else whole


def hidden_fraction(
    rate_mbit: float | None, wire_bytes: float | None, exposed_s: float
) -> float | None:
    """Share of the wire's time that no step waited for, 0 to 1; None where it is not known.

    Args:
        rate_mbit: of the link; None: unshaped.
        wire_bytes: sent per host and step; None: not counted.
        exposed_s: what a step waited for its exchange.
    """
    if rate_mbit is None or not wire_bytes:
        return None
    wire_s = 8.0 * wire_bytes / (rate_mbit * 1e6)
    return min(1.0, max(0.0, 1.0 - exposed_s / wire_s))


def median(steps: Iterable[Step], name: str) -> float:
    """Median of one field over steps."""
    return float(statistics.median(getattr(step, name) for step in steps))


def first_below(curve: Curve, loss: float) -> float | None:
    """When a curve first comes down to a loss, between its points by a straight line; or None."""
    before: tuple[float, float] | None = None
    for time_s, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return time_s
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (time_s - before[0])
        before = (time_s, value)
    return None


def _medians(steps: Sequence[Step], name: str) -> dict[str, float]:
    """Of one field, by kind of step."""
    kinds = dict.fromkeys(step.kind for step in steps)
    return {kind: median((s for s in steps if s.kind == kind), name) for kind in kinds}


def _measured_curve(run: Run) -> Curve:
    return _with_losses(run, ((step.step, step.wall_s) for step in _steps(run)))


def _with_losses(run: Run, times_s: Iterable[tuple[int, float]]) -> Curve:
    """The run's losses at the times that its steps, each with its seconds, end at."""
    ends_s, clock_s = {0: 0.0}, 0.0
    for step, time_s in times_s:
        clock_s += time_s
        ends_s[step] = clock_s
    return [(ends_s[step], loss) for step, loss in _validations(run)]


def _steps(run: Run) -> list[Step]:
    return [*run.opening.steps, *run.rest.steps]


def _validations(run: Run) -> list[tuple[int, float]]:
    return [*run.opening.validations, *run.rest.validations]


def _loss_at(run: Run, step: int) -> float | None:
    return next((loss for at, loss in _validations(run) if at == step), None)


def _over_rounds(runs: Sequence[Run], value: Callable[[Run], float | None]) -> float | None:
    values = [found for run in runs if (found := value(run)) is not None]
    return float(statistics.median(values)) if values else None


def _mean_payload(run: Run) -> float | None:
    sent = [step.payload_bytes for step in run.rest.steps if step.payload_bytes is not None]
    return statistics.fmean(sent) if sent else None


def _median_density(run: Run) -> float | None:
    used = [step.density for step in run.rest.steps if step.density is not None]
    return statistics.median(used) if used and parse_method(run.method).prunes else None
