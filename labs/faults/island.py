"""An island of a simulated run, and its count of what it has learned and given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.islands import Islands, Prepared, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import OuterRule, make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.channel import Channel
from labs.convergence.ranks import RowShards
from labs.faults.rank import BUCKET_NUMEL, EPSILON, NUMEL, SHAPES, Rank


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
            scale_of=lambda islands: update_scale(islands, None),
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
        is_dense = loop.decision.density == 1.0 and not loop.decision.unpruned
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
