"""The laboratory's methods: the product's bits and bytes, and the peers against their equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.gradients import Gradient as ProductGradient
from ds_gradprune.train.gradients import GradientPruning
from ds_gradprune.train.islands import Islands, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.loopback import LoopbackTransport
from ds_gradprune.wire.owner_reduce import OwnerReduce
from labs.convergence.adamw import AdamW, learning_rate
from labs.convergence.base import DenseSimulation, Simulation
from labs.convergence.gpt import Gradients
from labs.convergence.gradient import GradientSimulation
from labs.convergence.grid import Dense, DiLoCo, Gradient, PowerSgd, Update
from labs.convergence.islands import DiLoCoSimulation, IslandSimulation, UpdateSimulation
from labs.convergence.nesterov import Nesterov
from labs.convergence.peers import OneBitAdamSimulation, PowerSgdSimulation
from labs.convergence.trial import simulation_of
from tests.helpers.ranks import VirtualClock, run_ranks
from tests.helpers.shards import PlainShards
from tests.labs.convergence.cases import SETTING, TRAIN, tokens, train

SIGNALS = RankSignals(None, False, None, 0.0, 0.0, 0, 0)
CHANNELS: dict[str, Callable[[LoopbackTransport], Channel]] = {
    "all_gather": AllGather,
    "owner_reduce": OwnerReduce,
}
EVERYTHING: dict[str, Any] = {"density": 1.0, "value_bits": 32}


def update(**fields: Any) -> UpdateSimulation:
    return UpdateSimulation(SETTING, Update(kind="update", name="u", **fields))


def gradient(**fields: Any) -> GradientSimulation:
    return GradientSimulation(SETTING, Gradient(kind="gradient", name="g", **fields))


def diloco(**fields: Any) -> DiLoCoSimulation:
    return DiLoCoSimulation(SETTING, DiLoCo(kind="diloco", name="d", **fields))


def parted(simulation: Simulation) -> torch.Tensor:
    """The shared weights when the warm-up is over."""
    for step in range(TRAIN.warmup_steps):
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, 8))
    return simulation.shared[0].clone()


# --- the laboratory is the product ------------------------------------------------------------


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
        norm = float(own.gradient.norm())
        own.gradient.mul_(min(1.0, 1.0 / (norm + 1e-6)))
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
        {"slow_momentum": 1.0},
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
            ProductGradient(str(i), s.numel(), len(s) > 1 and s.numel() >= 4096)
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
            mean.mul_((1.0 / (mean.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
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


# --- what the methods do ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [update, gradient, diloco])
def test_the_warmup_is_denses_own_bit_for_bit(make: Callable[[], Simulation]) -> None:
    simulation, dense = make(), DenseSimulation(SETTING)
    assert torch.equal(parted(simulation), parted(dense))
    assert simulation.received_bits == 0.0
    simulation.close()


def test_everything_sent_is_dense_training() -> None:
    simulation = gradient(**EVERYTHING)
    # The means are summed in another order: fp32 rounding, through Adam, for eight steps.
    torch.testing.assert_close(train(simulation), train(DenseSimulation(SETTING)), rtol=0, atol=2e-5)
    simulation.close()


def mean_of_islands(steps: int, lr_factor: float, scale: float) -> torch.Tensor:
    """Islands that average everything after every step, with plain torch."""
    dense = DenseSimulation(SETTING)
    weights, moved = parted(dense), Gradients(SETTING.gpt, 3)
    adam = dense.adam.copied(3)
    for step in range(2, steps):
        moved.weights.copy_(weights.expand(3, -1))
        moved(tokens(step))
        slope = moved.gradient / moved.gradient.norm(dim=1, keepdim=True).clamp(min=1.0)
        adam.step(moved.weights, slope, lr_factor * learning_rate(TRAIN, step, steps))
        weights = weights + scale * (moved.weights - weights).mean(0)
    return weights


@pytest.mark.parametrize("residual", ["used", "reset"])
def test_islands_that_send_everything_move_by_the_mean(residual: Any) -> None:
    simulation = update(residual=residual, update_scale=2.0, local_lr=0.5, **EVERYTHING)
    shared = train(simulation)
    torch.testing.assert_close(shared, mean_of_islands(8, 0.5, 2.0), rtol=0, atol=2e-5)
    torch.testing.assert_close(simulation.flushed(), shared, rtol=0, atol=1e-6)
    simulation.close()


@pytest.mark.parametrize("fields", [{"residual": "used"}, {"residual": "reset"}], ids=str)
def test_own_weights_and_residual_between_exchanges(fields: dict[str, Any]) -> None:
    simulation = update(density=0.02, sync_every=3, **fields)
    train(simulation, steps=5)  # two of warm-up, then a round
    apart = simulation.apart.weights - simulation.shared
    if fields["residual"] == "used":
        assert all(bool(row.any()) for row in apart)
        assert not torch.equal(apart[0], apart[1])
    else:
        assert not apart.any()
    assert simulation.notes()["owed_part"] > 0.0
    assert not torch.equal(simulation.flushed(), simulation.shared[0])
    simulation.close()


def test_the_ramp_is_the_products() -> None:
    simulation = update(density=0.01, ramp_steps=3, ramp_from=0.25)
    # 1024, the geometric mean, 41, rounded up; then the pinned density.
    assert [simulation.k(step) for step in (3, 4, 5, 6, 99)] == [1024, 205, 41, 41, 41]
    simulation.close()


def test_weights_that_are_not_finite_end_a_run_by_name() -> None:
    simulation = update()
    parted(simulation)
    with pytest.raises(NonFiniteError, match=r"the weights of island 0, 1, 2 hold inf or nan"):
        simulation.step(2, tokens(2), float("nan"))
    simulation.close()


# --- peers ------------------------------------------------------------------------------------


def test_nesterov_is_torchs() -> None:
    start = torch.randn(50, generator=torch.Generator().manual_seed(0))
    weights, theirs = start.clone(), torch.nn.Parameter(start.clone())
    outer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    rule = Nesterov(0.9)
    for step in range(5):
        mean = torch.randn(50, generator=torch.Generator().manual_seed(step))
        theirs.grad = -mean
        outer.step()
        rule.begin(0, weights, 0, 50)
        rule.note_dense(0.7 * mean)
        drift = rule.drift()
        assert drift is not None
        weights += 0.7 * mean + drift
    torch.testing.assert_close(weights, theirs.detach())
    assert rule.nbytes == 200
    rule.reset()
    assert rule.nbytes == 0


@pytest.mark.parametrize("exchange", ["all_gather", "owner_reduce"])
def test_diloco_without_momentum_averages_everything(exchange: Any) -> None:
    simulation = diloco(
        sync_every=1, value_bits=32, outer_lr=1.0, outer_momentum=0.0, exchange=exchange
    )
    torch.testing.assert_close(train(simulation), mean_of_islands(8, 1.0, 1.0), rtol=0, atol=2e-5)
    assert not (simulation.apart.weights - simulation.shared).any()
    # Six steps after warm-up; what is not 32 bits of an element is a header.
    factor = 2 if exchange == "all_gather" else 2 * 2 / 3
    bits = 6 * factor * 32 * SETTING.gpt.numel
    assert simulation.received_bits == pytest.approx(bits, rel=0.01)
    simulation.close()


def test_diloco_keeps_what_four_bits_round_off() -> None:
    simulation = diloco(sync_every=3)
    train(simulation)
    assert 0.0 < simulation.notes()["owed_part"] < 0.1
    assert simulation.received_bits / SETTING.gpt.numel == pytest.approx(
        2 * 2 * 2 / 3 * 4, rel=0.05
    )  # two rounds, both ways of two thirds of 4 bits
    simulation.close()


def test_onebit_adam_forgets_nothing() -> None:
    """Momentum that was made equals momentum that was applied and what both sides still owe."""
    simulation = OneBitAdamSimulation(SETTING)
    train(simulation, steps=2)
    beta1, start = TRAIN.beta1, simulation.adam.m.clone()
    made = torch.zeros_like(start)
    applied = torch.zeros_like(start)
    before = start
    for step in range(2, 6):
        _, slope = simulation.gradients(tokens(step))
        slope = slope * min(1.0, 1.0 / (float(slope.mean(0).norm()) + 1e-6))
        made += beta1 * before + (1 - beta1) * slope.mean(0, keepdim=True)
        simulation.step(step, tokens(step), 1e-3)
        before = simulation.adam.m.clone()
        applied += before
        assert all(len(tensor.unique()) == 2 for tensor in SETTING.gpt.views(before))
    debt = simulation._errors.mean(0, keepdim=True) + simulation._server_error
    torch.testing.assert_close(applied + debt, made, rtol=0, atol=1e-5)


def test_powersgd_forgets_nothing_and_sends_two_thin_matrices() -> None:
    simulation = PowerSgdSimulation(SETTING, PowerSgd(kind="powersgd", name="p", rank=2))
    train(simulation, steps=2)
    _, slope = simulation.gradients(tokens(2))
    slope = slope.clone()
    simulation.step(2, tokens(2), 0.0)
    lost = SETTING.gpt.views(simulation._errors)
    true = SETTING.gpt.views(slope)
    for index, size in enumerate(SETTING.gpt.shapes):
        sent = true[index] - lost[index]  # the same low-rank matrix on all workers
        if len(size) == 2:
            torch.testing.assert_close(sent[0], sent[1], rtol=0, atol=1e-5)
            assert int((torch.linalg.svdvals(sent[0]) > 1e-4 * sent[0].norm()).sum()) <= 2
        else:
            assert not lost[index].any()
    numbers = sum(2 * sum(s) if len(s) == 2 else s.numel() for s in SETTING.gpt.shapes)
    assert simulation.received_bits == pytest.approx(2 * 2 / 3 * 32 * numbers)


def test_accumulated_steps_are_one_step_on_all_their_sequences() -> None:
    four = [tokens(step) for step in range(8)]
    method = Dense(kind="dense", name="d", accumulate=2)
    accumulated = simulation_of(SETTING, method)
    plain = DenseSimulation(dataclasses.replace(SETTING, steps=4))
    first = accumulated.shared.clone()
    for step, part in enumerate(four):
        accumulated.step(step, part, 1e-3)
        assert torch.equal(accumulated.shared, first) == (step == 0)
        if step % 2:
            plain.step(step // 2, torch.cat((four[step - 1], part), 1), 1e-3)
            assert torch.equal(accumulated.shared, plain.shared)
    # The warm-up of two steps is one of the method's; the other three count.
    assert accumulated.received_bits == pytest.approx(3 * 32 * SETTING.gpt.numel * 4 / 3)
    assert method.label == "dense, accumulated"  # no baseline
