"""One rank of a simulated run: it learns noise, exchanges it through the product, and counts.

What a rank learns in a step depends on the schedule's seed, its number and the step alone. So a run
that was resumed must end with the bits of one that was never broken.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.train.islands import Islands, Prepared, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import OuterRule, make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.channel import Announcement, Channel
from labs.convergence.ranks import RowShards

SHAPES = ((80, 60), (60,), (90, 70), (10,))
NUMEL = sum(math.prod(shape) for shape in SHAPES)
BUCKET_NUMEL = 8192  # two buckets
EPSILON = 2.0**-24
"""Half a unit in the last place of fp32, relative."""


class VirtualClock:
    """Every look at it costs a millisecond or so: what is measured is the same in every run."""

    def __init__(self) -> None:
        self._ticks = 0

    def now_s(self) -> float:
        """Seconds."""
        self._ticks += 1
        return self._ticks / 1024


class Rank(abc.ABC):
    """One rank.

    Args:
        config: the product's block.
        channel: to the others.
        seed: of what it learns.

    Attributes:
        loop: the product's.
        channel: see there.
        roundings: an upper bound of how often an element has been rounded.
    """

    def __init__(self, config: GradientPruningConfig, channel: Channel, seed: int) -> None:
        self.loop = Loop(config, VirtualClock().now_s)
        self.channel = channel
        self.roundings = 0
        self._config = config
        self._seed = seed

    @abc.abstractmethod
    def step(self, *, spoil: bool = False) -> None:
        """One optimizer step with whatever exchange is due. Collective."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Apply what is under way. Collective."""

    @abc.abstractmethod
    def agreed(self) -> list[torch.Tensor]:
        """What must be equal on all ranks; may be written."""

    @abc.abstractmethod
    def is_finite(self) -> bool:
        """What would be saved holds no inf and no nan."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""

    @abc.abstractmethod
    def load(self, state: dict[str, Any], first: dict[str, Any]) -> None:
        """Continue; `first` is what rank 0 has saved."""

    @abc.abstractmethod
    def balance(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(numel,) float64: what it has put in; what everybody got; bound of their rounding."""

    def noise(self, salt: int = 0) -> torch.Tensor:
        """(NUMEL,) what this rank learns in the step under way."""
        step, rank = self.loop.exchange_step, self.channel.rank
        seed = ((self._seed * 1009 + step) * 31 + rank) * 7 + salt
        return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed % 2**63))

    @property
    def k(self) -> int:
        """Kept elements per chunk."""
        return kept_per_chunk(self.loop.decision.density)

    def announce(self, signals: RankSignals, sizes: Any = ()) -> Announcement:
        """Tell the others."""
        header = codec.encode_signals(
            step=self.loop.exchange_step, rank=self.channel.rank, k=self.k, signals=signals
        )
        return self.channel.announce(header, sizes)

    def finish(self, signals: list[RankSignals], dense_bytes: int) -> None:
        """The exchange is over."""
        before = self.loop.totals.steps
        report = self.loop.finish_exchange(
            signals, wire_bytes=self.channel.take_wire_bytes(), dense_bytes=dense_bytes
        )
        every = self._config.verify_every_steps
        if every and report.step // every > before // every:
            self.loop.note_weights(crc(self.agreed()))


class UpdateRank(Rank):
    """An island.

    Args:
        config, channel, seed: see `Rank`.
        hides: an exchange is applied one step after it was begun.
    """

    def __init__(
        self, config: GradientPruningConfig, channel: Channel, seed: int, *, hides: bool
    ) -> None:
        super().__init__(config, channel, seed)
        self.own = torch.randn(1, NUMEL, generator=torch.Generator().manual_seed(seed))
        views, start = [], 0
        for shape in SHAPES:
            views.append(self.own[:, start : start + math.prod(shape)].view(1, *shape))
            start += math.prod(shape)
        self.rule = _Counted(make_rule(config.slow_momentum, config.sync_every))
        self.islands = Islands(
            SharedWeights(RowShards(views), BUCKET_NUMEL),
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            scale=update_scale(channel.world_size, None),
            rule=self.rule,
            kept=KeptResidual(config.residual_decay) if config.residual_form == "reset" else None,
        )
        self.islands.have_parted = True
        self.begin = self.shared.double()
        self.learned = torch.zeros(NUMEL, dtype=torch.float64)
        self._hides = hides
        self._begun: tuple[Prepared, list[RankSignals]] | None = None

    @property
    def shared(self) -> torch.Tensor:
        """(NUMEL,) the shared weights."""
        return self.islands.weights.stores[0]

    def step(self, *, spoil: bool = False) -> None:
        """See `Rank.step`."""
        self.loop.begin_step()
        before = self.own[0].double()
        self.own[0].add_(self.noise(), alpha=0.01)
        self.learned += self.own[0].double() - before
        if spoil:
            self.own[0, 7] = float("nan")
        self.channel.advance(self.loop.exchange_step)
        if self._begun is not None:
            self.settle()
        if self.loop.is_due and not self._begin():
            self.settle()
        self.loop.end_step()

    def _begin(self) -> bool:
        """Begin an exchange, as `deepspeed.rounds` does; whether it may travel on."""
        loop = self.loop
        loop.begin_exchange()
        is_dense = loop.decision.density == 1.0 and loop.decision.cause is not Cause.WARMUP
        bad = is_dense and not self.islands.weights.is_finite()
        signals = loop.signals(2.0 / loop.exchange_step, nonfinite=bad)
        if is_dense:
            ranks = [header.signals for header in self.announce(signals).headers()]
            prepared = self.islands.prepare_dense([i for i, r in enumerate(ranks) if r.nonfinite])
            prepared.start()
            self._begun = prepared, ranks
            return False
        prepared = self.islands.prepare(
            self.k, step=loop.last_exchange, signals=signals, hides=self._hides
        )
        announcement = self.announce(signals, prepared.sizes)
        prepared.write()
        headers = [header.signals for header in announcement.headers()]
        prepared.start()
        self._begun = prepared, headers
        return self._hides

    def settle(self) -> None:
        """See `Rank.settle`."""
        if self._begun is None:
            return
        (prepared, ranks), self._begun = self._begun, None
        refuse(prepared.deliver(), self.loop.last_exchange)
        prepared.commit()
        # Own and shared weights, residual and drift are each rounded once per delivery.
        self.roundings += 4 * (self.channel.world_size + 2)
        self.finish(ranks, self.islands.dense_bytes())

    def agreed(self) -> list[torch.Tensor]:
        """See `Rank.agreed`."""
        return [self.shared]

    def is_finite(self) -> bool:
        """See `Rank.is_finite`."""
        return self.islands.weights.is_finite()

    def state(self) -> dict[str, Any]:
        """See `Rank.state`."""
        kept = self.islands.kept
        return {
            "loop": self.loop.state_dict(),
            "own": self.islands.weights.own_state(),
            "shared": self.shared,
            "rule": self.rule.state_dict(),
            "drift": self.rule.total,
            "kept": None if kept is None else kept.state_dict(),
            "channel": self.channel.state_dict(),
            "learned": self.learned,
            "roundings": self.roundings,
        }

    def load(self, state: dict[str, Any], first: dict[str, Any]) -> None:
        """See `Rank.load`."""
        self.loop.take(self.loop.read(state["loop"]))
        self.shared.copy_(first["shared"])
        self.islands.weights.set_own(state["own"])
        self.rule.take(self.rule.read(state["rule"]))
        self.rule.total = state["drift"]
        if self.islands.kept is not None:
            self.islands.kept.take(self.islands.kept.read(state["kept"]))
        self.channel.load_state_dict(state["channel"])
        self.learned, self.roundings = state["learned"], state["roundings"]

    def balance(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """See `Rank.balance`: progress less the residual; what the shared weights have moved by."""
        residual = self.own[0].double() - self.shared.double()
        if self.islands.kept is not None:
            for store in self.islands.kept.state_dict():
                residual += store.double()
        owed = torch.zeros(NUMEL)
        for number, bound in enumerate(self.islands.weights.bound()):
            self.channel.pay(number, bound.layout, owed[bound.start : bound.stop])
        self.channel.settle(applied=False)
        moved = (self.shared.double() - self.begin - self.rule.total) / self.islands.factor
        largest = float(torch.maximum(self.own[0].abs(), self.shared.abs()).max()) + 1.0
        bound_of = self.roundings * EPSILON * largest * (1.0 + 1.0 / self.islands.factor)
        return self.learned - residual - owed.double(), moved, bound_of


class GradientRank(Rank):
    """A rank that prunes gradients; its replica steps by plain descent."""

    def __init__(self, config: GradientPruningConfig, channel: Channel, seed: int) -> None:
        super().__init__(config, channel, seed)
        self.weights = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
        self.pruning = GradientPruning(
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            error_feedback=True,
            bucket_numel=BUCKET_NUMEL,
        )
        self.learned = torch.zeros(NUMEL, dtype=torch.float64)
        self.delivered = torch.zeros(NUMEL, dtype=torch.float64)
        numels = [math.prod(shape) for shape in SHAPES]
        gradients = [
            Gradient(f"tensor {i}", numel, len(SHAPES[i]) > 1) for i, numel in enumerate(numels)
        ]
        cut = numels[0] + numels[1]
        self._parts = ((slice(0, cut), gradients[:2]), (slice(cut, NUMEL), gradients[2:]))
        """Two reductions in a step, as a model of two buckets makes them."""

    def step(self, *, spoil: bool = False) -> None:
        """See `Rank.step`."""
        loop = self.loop
        loop.begin_step()
        gradient = self.noise()
        total = gradient.clone()
        if spoil:
            total[7] = float("nan")
        self.channel.advance(loop.exchange_step)
        self.pruning.begin()
        signals = loop.signals(2.0 / loop.exchange_step, nonfinite=spoil)
        announcement = self.announce(signals)
        bad = loop.decision.density == 1.0 and any(
            header.signals.nonfinite for header in announcement.headers()
        )
        for here, gradients in self._parts:
            if loop.decision.density == 1.0:
                self.pruning.reduce_dense(total[here], gradients, nonfinite=bad)
                continue
            self.pruning.reduce(
                total[here],
                gradients,
                self.k,
                step=loop.exchange_step,
                signals=signals,
                agreed=announcement.headers,
            )
        applied = bool(torch.isfinite(total).all())
        self.pruning.commit(applied=applied)
        if applied:
            self.learned += gradient.double()
            self.delivered += total.double()
            self.weights.add_(total, alpha=-0.01)
            self.roundings += 4 * (self.channel.world_size + 2)
        loop.begin_exchange()
        self.finish(
            [header.signals for header in announcement.headers()],
            self.pruning.take_dense_bytes(),
        )
        loop.end_step()

    def settle(self) -> None:
        """See `Rank.settle`: nothing is ever under way."""

    def agreed(self) -> list[torch.Tensor]:
        """See `Rank.agreed`."""
        return [self.weights]

    def is_finite(self) -> bool:
        """See `Rank.is_finite`."""
        return bool(torch.isfinite(self.weights).all())

    def state(self) -> dict[str, Any]:
        """See `Rank.state`."""
        return {
            "loop": self.loop.state_dict(),
            "shared": self.weights,
            "residuals": self.pruning.residuals.state_dict(),
            "channel": self.channel.state_dict(),
            "learned": self.learned,
            "delivered": self.delivered,
            "roundings": self.roundings,
        }

    def load(self, state: dict[str, Any], first: dict[str, Any]) -> None:
        """See `Rank.load`."""
        self.loop.take(self.loop.read(state["loop"]))
        self.weights.copy_(first["shared"])
        self.pruning.residuals.take(self.pruning.residuals.read(state["residuals"]))
        self.channel.load_state_dict(state["channel"])
        self.learned, self.delivered = state["learned"], state["delivered"]
        self.roundings = state["roundings"]

    def balance(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """See `Rank.balance`: gradients less the residual; the sums that were applied."""
        residual = torch.zeros(NUMEL, dtype=torch.float64)
        owed = torch.zeros(NUMEL)
        state, number = self.pruning.residuals.state_dict(), 0
        for here, gradients in self._parts:
            start = here.start
            for gradient in gradients:
                if gradient.key in state:
                    residual[start : start + gradient.numel] = state[gradient.key].double()
                start += gradient.numel
            for bucket in self.pruning._buckets(gradients):
                place = slice(here.start + bucket.start, here.start + bucket.stop)
                self.channel.pay(number, bucket.layout, owed[place])
                number += 1
        self.channel.settle(applied=False)
        largest = float(residual.abs().max()) + float(self.delivered.abs().max()) + 1.0
        bound = self.roundings * EPSILON * largest * self.channel.world_size
        return self.learned - residual - owed.double(), self.delivered, bound


class _Counted:
    """An outer rule whose drift is added up.

    Args:
        rule: the product's.

    Attributes:
        total: (NUMEL,) float64, all of its drift.
    """

    def __init__(self, rule: OuterRule) -> None:
        self.total = torch.zeros(NUMEL, dtype=torch.float64)
        self._rule = rule
        self._place = slice(0, 0)

    def begin(self, index: int, store: torch.Tensor, start: int, stop: int) -> None:
        """See `OuterRule`."""
        self._place = slice(start, stop)
        self._rule.begin(index, store, start, stop)

    def drift(self) -> torch.Tensor | None:
        """See `OuterRule`."""
        drift = self._rule.drift()
        if drift is not None:
            self.total[self._place] += drift.double()
        return drift

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Everything else is the rule's own."""
        found: Callable[..., Any] = getattr(self._rule, name)
        return found


def check_finite(rank: Rank, step: int) -> None:
    """As launch/train.py does before it saves.

    Raises:
        NonFiniteError: something is not finite.
    """
    if not rank.is_finite():
        raise NonFiniteError(f"weights hold inf or nan after step {step}, so nothing is saved.")


def crc(tensors: list[torch.Tensor]) -> int:
    """Over the bits of tensors."""
    import google_crc32c

    value = 0
    for tensor in tensors:
        value = google_crc32c.extend(value, tensor.detach().contiguous().view(torch.uint8).numpy())
    return int(value)
