"""The laboratory is the product: equal bits of the weights, equal bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.train.islands import Islands, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.loopback import LoopbackTransport
from ds_gradprune.wire.owner_reduce import OwnerReduce
from labs.convergence.adamw import AdamW, clip_, learning_rate
from labs.convergence.gpt import Gradients
from tests.helpers.ranks import VirtualClock, run_ranks
from tests.helpers.shards import PlainShards
from tests.labs.convergence.cases import SETTING, TRAIN, gradient, parted, tokens, train, update

SIGNALS = RankSignals(None, False, None, 0.0, 0.0, 0, 0)
CHANNELS: dict[str, Callable[[LoopbackTransport], Channel]] = {
    "all_gather": AllGather,
    "owner_reduce": OwnerReduce,
}


def islands_by_hand(
    transport: LoopbackTransport, start: torch.Tensor, adam: AdamW, fields: dict[str, Any], k: int
) -> tuple[int, int]:
    """Train one island on its own thread, with torch tensors of its own; crc and bytes sent."""
    gpt, rank = SETTING.gpt, transport.rank
    own = Gradients(gpt, 1)
    own.weights[0] = start
    tensors = {str(i): view[0] for i, view in enumerate(gpt.views(own.weights))}
    channel = CHANNELS[fields.get("exchange", "all_gather")](transport)
    every, decay = fields.get("sync_every", 1), fields.get("residual_decay", 0.95)
    is_reset = fields.get("residual", "used" if every == 1 else "reset") == "reset"
    islands = Islands(
        SharedWeights(PlainShards(tensors, min_numel=4096)),
        channel,
        Stopwatch(VirtualClock().now_s),
        value_bits=fields.get("value_bits", 4),
        scale=fields.get("update_scale", 3**0.5),
        rule=make_rule(fields.get("slow_momentum", 0.0), every),
        kept=KeptResidual(decay) if is_reset else None,
    )
    for step in range(TRAIN.warmup_steps + 1, 9):
        own(tokens(step - 1)[rank : rank + 1])
        clip_(own.gradient, TRAIN.clip)
        adam.step(own.weights, own.gradient, learning_rate(TRAIN, step - 1, 8))
        if (step - TRAIN.warmup_steps) % every == 0:
            prepared = islands.prepare(k, step=step, signals=SIGNALS)
            prepared.write()
            prepared.start()
            refuse(prepared.deliver(), step)
            prepared.commit()
    return islands.weights.crc(), channel.take_wire_bytes()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"value_bits": 16},
        {"slow_momentum": 1.0, "value_bits": 16},
        {"sync_every": 3, "value_bits": 2},
        {"sync_every": 2, "residual": "used", "update_scale": 3.0},
        {"residual": "reset", "residual_decay": 0.9},
        {"exchange": "owner_reduce", "sync_every": 2},
    ],
    ids=str,
)
def test_the_lab_gives_the_bits_and_the_bytes_of_the_product(fields: dict[str, Any]) -> None:
    # A gradient in a pass of three workers differs in its last bits from one alone, and Adam makes
    # much of it, so one worker's pass is taken for all.
    simulation = update(density=0.05, **fields)
    simulation.apart = _OneByOne(3)
    start = parted(simulation)
    adams = [simulation.adam.copied(1) for _ in range(3)]
    for step in range(2, 8):
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, 8))

    def work(transport: LoopbackTransport) -> tuple[int, int]:
        return islands_by_hand(transport, start, adams[transport.rank], fields, 205)

    ranks = run_ranks(3, work)
    crcs = [islands.weights.crc() for islands in simulation.islands]
    assert crcs == [crc for crc, _ in ranks]
    assert len(set(crcs)) == 1
    assert {8.0 * sent for _, sent in ranks} == {simulation.received_bits}
    simulation.close()


class _OneByOne(Gradients):
    """Every worker's gradient in a pass of its own."""

    def __init__(self, workers: int) -> None:
        super().__init__(SETTING.gpt, workers)
        self._alone = Gradients(SETTING.gpt, 1)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        losses = []
        for rank, row in enumerate(self.weights):
            self._alone.weights[0] = row
            losses.append(self._alone(batch[rank : rank + 1])[0])
            self.gradient[rank] = self._alone.gradient[0]
        return torch.stack(losses)


@pytest.mark.parametrize("exchange", ["all_gather", "owner_reduce"])
def test_pruned_gradients_are_the_products(exchange: Any) -> None:
    simulation = gradient(density=0.05, exchange=exchange)
    start, adam = parted(simulation), simulation.adam.copied(1)
    train_rest = [simulation.step(s, tokens(s), learning_rate(TRAIN, s, 8)) for s in (2, 3)]
    assert len(train_rest) == 2

    def work(transport: LoopbackTransport) -> tuple[torch.Tensor, int]:
        channel = CHANNELS[exchange](transport)
        reducer = GradientPruning(
            channel, Stopwatch(VirtualClock().now_s), value_bits=4, error_feedback=True
        )
        shapes = SETTING.gpt.shapes
        names = [
            Gradient(str(i), s.numel(), len(s) > 1 and s.numel() >= 4096)
            for i, s in enumerate(shapes)
        ]
        weights, slopes, own = start[None].clone(), Gradients(SETTING.gpt, 3), adam.copied(1)
        for step in (2, 3):
            slopes.weights.copy_(weights.expand(3, -1))
            slopes(tokens(step))
            vector = slopes.gradient[transport.rank]
            reducer.begin()
            reducer.reduce(vector, names, 205, step=step + 1, signals=SIGNALS)
            reducer.commit(applied=True)
            mean = vector[None] / 3
            clip_(mean, TRAIN.clip)
            own.step(weights, mean, learning_rate(TRAIN, step, 8))
        return weights[0], channel.take_wire_bytes()

    for weights, sent in run_ranks(3, work):
        assert torch.equal(weights, simulation.shared[0])
        assert simulation.received_bits == 8.0 * sent
    simulation.close()


@pytest.mark.parametrize("value_bits", [2, 4, 16])
def test_received_bits_are_those_of_the_payloads(value_bits: Any) -> None:
    simulation = update(density=0.05, value_bits=value_bits, sync_every=2)
    train(simulation)
    prepared = simulation.islands[0].prepare(205, step=9, signals=SIGNALS)
    # After steps 4, 6 and 8; the first two steps are warm-up. Two peers send as much.
    assert simulation.received_bits == 3 * 2 * 8 * sum(prepared.sizes)
    simulation.close()
