"""One island's rounds without DeepSpeed: the product's loop, law, exchanges and flights.

Times are scripted, so a run is decided alike however long its transport really takes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.deepspeed.consensus import InsideIsland
from ds_gradprune.deepspeed.losses import StepLosses
from ds_gradprune.deepspeed.rounds import Rounds
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.channel import Announcement
from ds_gradprune.wire.loopback import LoopbackTransport
from tests.helpers.shards import random_shards

COMPUTE_S = 0.1


class ScriptedClock:
    """A flight lasts as long as is said when it begins; other time passes by `advance` alone."""

    def __init__(self) -> None:
        self.flight_s = 0.0
        self._main_s = 0.0

    def advance(self, time_s: float) -> None:
        self._main_s += time_s

    @property
    def now_s(self) -> Callable[[], float]:
        """Reads the clock; on a flight's thread first 0.0, and then what it lasts."""
        times_s = [self.flight_s, 0.0]

        def read() -> float:
            is_flight = threading.current_thread().name == "ds_gradprune flight"
            return times_s.pop() if is_flight else self._main_s

        return read


class _Waited:
    """An announcement that takes its time."""

    def __init__(self, announcement: Announcement, clock: ScriptedClock) -> None:
        self._announcement, self._clock = announcement, clock

    def headers(self) -> Any:
        self._clock.advance(self._clock.flight_s)
        return self._announcement.headers()


class _Untouched:
    written = False
    notes = 0

    def note(self) -> None:
        self.notes += 1


class _Alone:
    num_shards = 1


class Bench:
    """What `Rounds` needs of a handle.

    Args:
        transport: to the other islands.
        config: the validated block.
        rate_of: step -> seconds of an exchange that sends everything.
        lr_of: step -> learning rate.
    """

    def __init__(
        self,
        transport: LoopbackTransport,
        config: GradientPruningConfig,
        rate_of: Callable[[int], float],
        lr_of: Callable[[int], float] = lambda _: 0.01,
    ) -> None:
        self.config, self.rank = config, transport.rank
        self.channel = AllGather(transport)
        self.clock = ScriptedClock()
        self.loop = Loop(config, self.clock.now_s)
        self.losses = StepLosses()
        self.shards = random_shards()
        is_reset = config.residual_form == "reset"
        self.islands = Islands(
            SharedWeights(self.shards, 8192),
            self.channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            scale=update_scale(transport.world_size, config.update_scale),
            rule=make_rule(config.slow_momentum, config.sync_every),
            kept=KeptResidual(config.residual_decay) if is_reset else None,
        )
        self.inside = InsideIsland(None, transport.world_size)
        self.weights, self.groups = _Untouched(), _Alone()
        self.rounds = Rounds(self)  # type: ignore[arg-type]
        self.intervals: list[int] = []
        self._rate_of, self._lr_of = rate_of, lr_of
        self.islands.weights.capture()

    @property
    def k(self) -> int:
        return kept_per_chunk(self.loop.decision.density)

    def asking(self, signals: RankSignals) -> RankSignals:
        return signals

    def announce(self, signals: RankSignals, sizes: Sequence[int] = ()) -> Any:
        header = codec.encode_signals(
            step=self.loop.exchange_step, rank=self.channel.rank, k=self.k, signals=signals
        )
        announcement = self.channel.announce(header, sizes)
        hides = self.loop.delay_steps > 0
        return announcement if hides else _Waited(announcement, self.clock)

    def finish(self, ranks: Sequence[RankSignals], *, wire_bytes: int, dense_bytes: int) -> None:
        report = self.loop.finish_exchange(ranks, wire_bytes=wire_bytes, dense_bytes=dense_bytes)
        self.loop.note_weights(self.islands.weights.crc())
        self.intervals.append(report.steps)

    def step(self) -> None:
        """One optimizer step on the island's own data, and what rounds do after it."""
        step = self.loop.exchange_step
        self.loop.begin_step()
        self.clock.advance(COMPUTE_S * (1.0 + 0.01 * ((7 * step + self.rank) % 5)))
        generator = torch.Generator().manual_seed(100 * step + self.rank)
        rate = self._lr_of(step)
        for tensor in self.shards.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=rate)
        self.losses.forward(torch.tensor(5.0 - 0.001 * step))
        self.losses.end_step()
        self.channel.advance(step)
        self.clock.flight_s = 0.002 + self.loop.decision.density * self._rate_of(step)
        self.shards.publish()  # as DeepSpeed's optimizers do
        self.rounds.end_step([rate])

    def save(self) -> dict[str, Any]:
        """Everything that a checkpoint holds; what is under way is applied first."""
        self.rounds.land()
        islands = self.islands
        state = {
            "loop": self.loop.state_dict(),
            "losses": self.losses.state_dict(),
            "rounds": self.rounds.state_dict(),
            "own": islands.weights.own_state(),
            "shared": islands.weights.stores,
            "rule": islands.rule.state_dict(),
            "kept": None if islands.kept is None else islands.kept.state_dict(),
        }
        return copy.deepcopy(state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `save` gave."""
        islands, loop = self.islands, self.loop.read(state["loop"])
        for shared, saved in zip(islands.weights.stores, state["shared"], strict=True):
            shared.copy_(saved)
        islands.weights.set_own(state["own"])
        islands.rule.take(islands.rule.read(state["rule"]))
        if islands.kept is not None:
            islands.kept.take(islands.kept.read(state["kept"]))
        self.losses.load_state_dict(state["losses"])
        self.rounds.load_state_dict(state["rounds"])
        self.loop.take(loop)
