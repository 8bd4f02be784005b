"""A session that prunes the optimizer's update between islands.

In the warm-up a step is that of `PruningSession`: gradients are summed densely. After it each
island steps alone, and every `sync_every` steps the islands exchange what their weights have
gained over the shared ones::

    begin_step()
    finish_step()                 no exchange is due after this step
    exchange(loss); end_step()    or: the optimizer has stepped and an exchange is due

Steps are counted in optimizer steps everywhere. An exchange's report, log line and decision carry
the step it followed; its times cover all steps since the exchange before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_gradprune import controller, step_rule
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import CheckpointError, NonFiniteError
from ds_gradprune.momentum import SlowMomentum
from ds_gradprune.records import RankSignals, StepSignals
from ds_gradprune.session import PruningSession, Timed
from ds_gradprune.shared import SharedWeights
from ds_gradprune.sparsify import layout_of
from ds_gradprune.stats import ring_all_reduce_bytes
from ds_gradprune.transport.base import Transport


class IslandSession(PruningSession):
    """Pruned updates between islands.

    Args:
        config: the validated block, with prune = "update".
        transport: this island's end of the group.
        weights: the shared weights; the own ones equal them on all islands.
        clock: seconds, monotonic.

    Attributes:
        weights: see there.
        scale: factor on the islands' mean update.
        slow: slow momentum of the shared weights; None: off.
    """

    def __init__(
        self,
        config: GradientPruningConfig,
        transport: Transport,
        weights: SharedWeights,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(config, transport, clock)
        self.weights = weights
        self.scale = step_rule.update_scale(transport.world_size, config.update_scale)
        strength = config.slow_momentum
        shared = [weights.shared(bucket) for bucket in range(len(weights.shapes))]
        decay = step_rule.slow_decay(config.sync_every)
        self.slow = SlowMomentum(shared, strength, decay) if strength else None
        self._alone = 0
        self._alone_s: float | None = 0.0
        self._bucket_layouts = [layout_of(s, config.min_numel) for s in weights.shapes]
        if config.step_time_budget_s is not None:
            # The law compares it with the time from one exchange to the next.
            budget_s = config.step_time_budget_s * config.sync_every
            self._law_config = config.model_copy(update={"step_time_budget_s": budget_s})

    @property
    def is_warmup(self) -> bool:
        """The step under way belongs to the dense warm-up."""
        return self.step < self.config.warmup_steps

    @property
    def is_due(self) -> bool:
        """The step under way ends with an exchange of updates."""
        done = self.step + 1 - self.config.warmup_steps
        return done > 0 and done % self.config.sync_every == 0

    @property
    def steps_since_exchange(self) -> int:
        """Optimizer steps finished since the last exchange."""
        return self._alone

    def finish_step(self) -> None:
        """The optimizer has stepped and no exchange is due. Local."""
        self._alone_s = self._add_alone()
        self._alone += 1
        self.step += 1
        self._exchange.advance(self.step)
        self._start_s = None

    def exchange(self, loss: float | None) -> None:
        """Prune and average the islands' progress; the shared weights move, bit-identical on all.

        Args:
            loss: training loss, mean over this island's steps since the last exchange.

        Raises:
            NonFiniteError: some island's weights hold inf or nan, on all islands alike; the shared
                weights are as they were.
            TransportError: the exchange failed; every island still holds all its progress.

        Collective: all islands.
        """
        dense = self.decision.density == 1.0
        # What is pruned is checked where it is selected.
        self.begin_reduction(loss, nonfinite=dense and not self.weights.is_finite())
        for bucket in range(len(self._bucket_layouts)):
            with self._reducer.busy():
                own = self.weights.own(bucket)
            self._dense_bytes += ring_all_reduce_bytes(4 * own.numel(), self._exchange.world_size)
            if dense:
                self._move_all(bucket, own)
            else:
                self._move(bucket, own)
        self.end_reduction()

    def _move(self, bucket: int, own: torch.Tensor) -> None:
        trade = self._reducer.trade(
            own,
            self._bucket_layouts[bucket],
            controller.kept_per_chunk(self.decision.density),
            minus=self.weights.shared(bucket),
            step=self.step + 1,
            bucket=bucket,
            signals=self._signals,
        )
        self._headers = self._headers or trade.headers
        if not trade.parts:
            self._refuse([h.signals.nonfinite for h in trade.headers])
        with self._reducer.busy():
            slow = self.slow
            drift = None if slow is None else slow.follow(bucket, trade.parts, self._factor)
            rank = self._exchange.rank
            self.weights.move(bucket, own, trade.parts, rank, self._factor, drift)

    def _move_all(self, bucket: int, own: torch.Tensor) -> None:
        flags = [header.signals.nonfinite for header in self._headers]
        if any(flags):
            self._refuse(flags)
        progress = own.sub_(self.weights.shared(bucket))
        self._reducer.reduce_dense(progress, bucket=bucket, nonfinite=False)
        with self._reducer.busy():
            move = progress.mul_(self._factor)
            drift = None if self.slow is None else self.slow.follow_all(bucket, move)
            self.weights.move_all(bucket, move, drift)

    @property
    def _factor(self) -> float:
        return self.scale / self._exchange.world_size

    def _refuse(self, flags: list[bool]) -> None:
        bad = ", ".join(str(rank) for rank, is_bad in enumerate(flags) if is_bad)
        raise NonFiniteError(
            f"the weights of island {bad} hold inf or nan after step {self.step + 1}; the shared "
            "weights are still those of the exchange before. Resume from the last checkpoint with "
            "a lower learning rate or with gradient_clipping."
        )

    # ---- measures ------------------------------------------------------------------------------

    def _add_alone(self) -> float | None:
        if self._alone_s is None or self._start_s is None:
            return None
        return self._alone_s + self._clock() - self._start_s

    def _own_signals(self, loss: float | None, nonfinite: bool) -> RankSignals:
        signals = super()._own_signals(loss, nonfinite)
        last_exchange = self.step - self._alone
        if self.config.sync_every > 1 and last_exchange <= self.config.warmup_steps:
            # Times of single dense steps: not those of an interval. The law shall not mix them.
            return dataclasses.replace(signals, compute_time_s=None)
        return signals

    def _measure(self, density: float) -> Timed:
        timed = super()._measure(density)
        alone_s, self._alone_s, self._alone = self._alone_s, 0.0, 0
        compute_s = timed.compute_time_s
        if compute_s is not None:
            compute_s = None if alone_s is None else compute_s + alone_s
        return dataclasses.replace(timed, compute_time_s=compute_s)

    def _before_next(self, signals: StepSignals) -> StepSignals:
        """The law decides for the step after its signals': the next exchange's.

        The exchange that passes the ramp's end is decided for that end, so that none is skipped.
        """
        position = signals.step - self.config.warmup_steps
        if position < 0:
            return signals
        ahead, ramp_end = position + self.config.sync_every, max(1, self.config.ramp_steps)
        if position < ramp_end:
            ahead = min(ahead, ramp_end)
        return dataclasses.replace(signals, step=self.config.warmup_steps + ahead - 1)

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As `PruningSession.state_dict`; the weights are saved by who owns them. Local."""
        return super().state_dict() | {
            "alone": self._alone,
            "alone_s": self._alone_s,
            "slow": None if self.slow is None else self.slow.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """As `PruningSession.check_state`; a slow momentum is there or not as in the state."""
        super().check_state(state)
        if (state.get("slow") is None) != (self.slow is None):
            was, now = ("off", "on") if self.slow is not None else ("on", "off")
            raise CheckpointError(
                f"the pruning state's slow momentum must be {now}, got {was}. Resume with the "
                "slow_momentum that saved it (0 is off)."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Local.

        Raises:
            CheckpointError: as `PruningSession.load_state_dict`.
        """
        super().load_state_dict(state)
        self._alone = int(state["alone"])
        self._alone_s = None if state["alone_s"] is None else float(state["alone_s"])
        if self.slow is not None:
            self.slow.load_state_dict(state["slow"])

    @property
    def residual_bytes(self) -> int:
        """Memory of the shared copy, which stands in for a residual, and of the slow momentum."""
        return self.weights.nbytes + (0 if self.slow is None else self.slow.nbytes)
