"""The step loop's state machine: measures, reduces, decides. Knows nothing of DeepSpeed.

One step, as the caller drives it::

    begin_step()                       first forward of the step
    begin_reduction(loss, nonfinite)   gradients are complete
        reduce_bucket(vector, layout)  once per bucket, same order on all ranks
    end_reduction()
    end_step() -> StepReport           after the optimizer; the decision for the next step is made

All ranks make the same calls. What decides travelled in the payload headers, so every rank decides
from the same numbers and no rank asks another.
"""

from __future__ import annotations

import dataclasses
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ds_gradprune import controller
from ds_gradprune.codec import Header
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import CheckpointError, UnsupportedError
from ds_gradprune.exchange import AllGather
from ds_gradprune.records import (
    BucketLayout,
    Cause,
    Decision,
    RankSignals,
    StepReport,
    StepSignals,
    Totals,
)
from ds_gradprune.reducer import Reducer
from ds_gradprune.signals import aggregate
from ds_gradprune.sparsify import layout_of
from ds_gradprune.stats import ring_all_reduce_bytes
from ds_gradprune.transport.base import Transport


@dataclasses.dataclass(frozen=True, slots=True)
class Timed:
    """What this rank measured in its last finished step; rides in the next step's headers."""

    density: float
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    wire_bytes: int
    dense_bytes: int


class PruningSession:
    """Pruned training of one model over one group of peers.

    Args:
        config: the validated block.
        transport: this rank's end of the group.
        clock: seconds, monotonic; a virtual one in tests.

    Attributes:
        decision: what holds for the step that is next or under way.
        step: finished optimizer steps.
        totals: sums over the run.
        report: the last finished step; None before the first.
    """

    def __init__(
        self,
        config: GradientPruningConfig,
        transport: Transport,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.step = 0
        self.totals = Totals()
        self.report: StepReport | None = None
        self._clock = clock
        self._exchange = AllGather(transport, clock)
        self._reducer = Reducer(
            self._exchange,
            value_bits=config.value_bits,
            # A pruned update leaves what is not sent in the weights.
            error_feedback=config.error_feedback and config.prune == "gradient",
            clock=clock,
        )
        self._law_config = config
        self._state, self.decision = controller.start(config)
        self._agreement = 0
        self._timed: Timed | None = None
        self._layouts: list[tuple[tuple[torch.Size, ...], BucketLayout]] = []
        self._start_s: float | None = None
        self._headers: list[Header] = []
        self._forget_step()

    # ---- the step ------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """The step's first forward begins; further calls in the same step change nothing. Local."""
        if self._start_s is None:
            self._start_s = self._clock()

    def begin_reduction(self, loss: float | None, nonfinite: bool, scale: float = 1.0) -> None:
        """All gradients of the step are complete on this rank.

        Args:
            loss: training loss, mean over this rank's micro-steps; None: unknown.
            nonfinite: this rank's gradient holds inf or nan.
            scale: loss scale of the gradients.

        Collective: all ranks (a dense step exchanges its headers here).
        """
        now_s = self._clock()
        self._reduction = (now_s, now_s)
        self._scale = scale
        self._bucket = 0
        self._headers = []
        self._dense_bytes = 0
        self._exchange.advance(self.step + 1)
        self._signals = self._own_signals(loss, nonfinite)
        if self.decision.density == 1.0:
            self._headers = self._reducer.share_signals(self.step + 1, self._signals)

    def reduce_bucket(self, vector: torch.Tensor, shapes: Sequence[torch.Size]) -> None:
        """Replace one bucket by its sum over the peers, in place.

        Args:
            vector: (numel,) the bucket's tensors, flattened one after the other.
            shapes: their shapes, equal in every step.

        Raises:
            UnsupportedError: the bucket is another one than in the steps before.

        Collective: all ranks, same order.
        """
        layout = self._layout(tuple(shapes))
        tensor_bytes = vector.numel() * vector.element_size()
        self._dense_bytes += ring_all_reduce_bytes(tensor_bytes, self._exchange.world_size)
        if self.decision.density == 1.0:
            nonfinite = any(header.signals.nonfinite for header in self._headers)
            self._reducer.reduce_dense(
                vector, bucket=self._bucket, nonfinite=nonfinite, scale=self._scale
            )
        else:
            headers = self._reducer.reduce(
                vector,
                layout,
                controller.kept_per_chunk(self.decision.density),
                step=self.step + 1,
                bucket=self._bucket,
                signals=self._signals,
                scale=self._scale,
            )
            self._headers = self._headers or headers
        self._bucket += 1

    def end_reduction(self) -> None:
        """The last bucket of the step is done. Local."""
        self._reduction = (self._reduction[0], self._clock())

    def end_step(self) -> StepReport:
        """The optimizer has stepped: decide for the next step. Local.

        Returns:
            What the step was, and what holds next.

        Raises:
            UnsupportedError: no gradients were reduced in this step.
        """
        if not self._headers:
            raise UnsupportedError(
                f"step {self.step + 1} ended without reducing any gradient; was "
                "engine.backward called, and outside engine.no_sync?"
            )
        used = self.decision
        timed = self._measure(used.density)
        signals = aggregate(
            self._headers[0].step,
            [header.signals for header in self._headers],
            None if self._timed is None else self._timed.density,
            0 if self._timed is None else self._timed.dense_bytes,
        )
        self._state, self.decision = controller.update(
            self._law_config, self._state, self._before_next(signals)
        )
        self.step += 1
        self._timed = timed
        self._agree(struct.pack("<Id", self.decision.step, self.decision.density))
        self.report = _report(used, timed, signals, self.decision)
        self.totals = _add(self.totals, self.report)
        self._forget_step()
        return self.report

    def note_parameters(self, fingerprint: int) -> None:
        """Fold a hash of the parameters into what the next headers compare. Local.

        A rank whose parameters differ is found by all ranks in the next step.
        """
        self._agree(struct.pack("<I", fingerprint))

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: everything that affects the next step. Local."""
        return {
            "format": 1,
            "prune": self.config.prune,
            "world_size": self._exchange.world_size,
            "rank": self._exchange.rank,
            "step": self.step,
            "agreement": self._agreement,
            "controller": self._state.to_json(),
            "decision": dataclasses.asdict(self.decision) | {"cause": self.decision.cause.value},
            "timed": None if self._timed is None else dataclasses.asdict(self._timed),
            "totals": dataclasses.asdict(self.totals),
            "layouts": [[tuple(shape) for shape in shapes] for shapes, _ in self._layouts],
            "residuals": self._reducer.residuals.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Can a run continue from `state`? Changes nothing. Local.

        Raises:
            CheckpointError: the state is of another format, mode, rank or world size.
        """
        for key, own in (
            ("format", 1),
            ("prune", self.config.prune),
            ("world_size", self._exchange.world_size),
            ("rank", self._exchange.rank),
        ):
            if state.get(key) != own:
                raise CheckpointError(
                    f"the pruning state's {key} must be {own!r}, got {state.get(key)!r}. Resume "
                    "with the configuration and the world size that saved it."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Local.

        Raises:
            CheckpointError: see `check_state`.
        """
        self.check_state(state)
        self.step = int(state["step"])
        self._agreement = int(state["agreement"])
        self._state = controller.restore(self.config, state["controller"])
        decision = dict(state["decision"])
        self.decision = Decision(**(decision | {"cause": Cause(decision["cause"])}))
        self._timed = None if state["timed"] is None else Timed(**state["timed"])
        self.totals = Totals(**state["totals"])
        self._layouts = []
        for shapes in state["layouts"]:
            self._add_layout(tuple(torch.Size(shape) for shape in shapes))
        self._reducer.residuals.load_state_dict(state["residuals"])
        self.report = None
        self._forget_step()

    @property
    def residual_bytes(self) -> int:
        """Memory that error feedback holds."""
        return self._reducer.residuals.nbytes()

    def close(self) -> None:
        """Release the transport. Local."""
        self._exchange.close()

    # ---- details -------------------------------------------------------------------------------

    def _forget_step(self) -> None:
        self._start_s = None
        self._reduction = (0.0, 0.0)
        self._headers = []
        self._bucket = 0
        self._dense_bytes = 0
        self._scale = 1.0

    def _before_next(self, signals: StepSignals) -> StepSignals:
        """The signals as of the step before the next exchange, which is the one just finished."""
        return signals

    def _agree(self, data: bytes) -> None:
        self._agreement = zlib.crc32(data, self._agreement)

    def _own_signals(self, loss: float | None, nonfinite: bool) -> RankSignals:
        timed = self._timed
        return RankSignals(
            loss=loss,
            nonfinite=nonfinite,
            compute_time_s=None if timed is None else timed.compute_time_s,
            codec_time_s=0.0 if timed is None else timed.codec_time_s,
            comm_time_s=0.0 if timed is None else timed.comm_time_s,
            wire_bytes=0 if timed is None else timed.wire_bytes,
            agreement=self._agreement,
        )

    def _measure(self, density: float) -> Timed:
        costs = self._reducer.take_costs()
        compute_s = None
        if self._start_s is not None:
            begin_s, end_s = self._reduction
            compute_s = begin_s - self._start_s + self._clock() - end_s
        return Timed(
            density,
            compute_s,
            costs.codec_time_s,
            costs.traffic.comm_time_s,
            costs.traffic.wire_bytes,
            self._dense_bytes,
        )

    def _layout(self, shapes: tuple[torch.Size, ...]) -> BucketLayout:
        if self._bucket == len(self._layouts):
            self._add_layout(shapes)
        known, layout = self._layouts[self._bucket]
        if known != shapes:
            raise UnsupportedError(
                f"bucket {self._bucket} held {len(known)} tensors and now holds {len(shapes)}, or "
                "their shapes changed. The set of trained parameters must stay the same during a "
                "run; attach again after changing it."
            )
        return layout

    def _add_layout(self, shapes: tuple[torch.Size, ...]) -> None:
        self._layouts.append((shapes, layout_of(shapes, self.config.min_numel)))


def _report(used: Decision, timed: Timed, signals: StepSignals, decision: Decision) -> StepReport:
    compute_s = timed.compute_time_s
    step_s = None if compute_s is None else compute_s + timed.codec_time_s + timed.comm_time_s
    return StepReport(
        step=signals.step,
        loss=signals.loss,
        performance=decision.performance,
        density=used.density,
        cause=used.cause,
        step_time_s=step_s,
        compute_time_s=compute_s,
        codec_time_s=timed.codec_time_s,
        comm_time_s=timed.comm_time_s,
        wire_bytes=timed.wire_bytes,
        dense_bytes=timed.dense_bytes,
        nonfinite=signals.nonfinite,
        signals=signals,
        decision=decision,
    )


def _add(totals: Totals, report: StepReport) -> Totals:
    low, high = totals.density_min, totals.density_max
    if report.density < 1.0:
        low = report.density if low is None else min(low, report.density)
        high = report.density if high is None else max(high, report.density)
    return Totals(
        steps=report.step,
        wire_bytes=totals.wire_bytes + report.wire_bytes,
        dense_bytes=totals.dense_bytes + report.dense_bytes,
        density_min=low,
        density_max=high,
    )
