"""The laboratory's methods against their equations: islands, gradients and peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.errors import NonFiniteError
from labs.convergence.adamw import learning_rate
from labs.convergence.base import DenseSimulation, Simulation
from labs.convergence.gpt import Gradients
from labs.convergence.grid import Dense, PowerSgd, Update
from labs.convergence.islands import IslandSimulation, UpdateSimulation
from labs.convergence.nesterov import Nesterov
from labs.convergence.peers import OneBitAdamSimulation, PowerSgdSimulation
from labs.convergence.trial import can_stack, simulation_of
from tests.labs.convergence.cases import (
    SETTING,
    TRAIN,
    diloco,
    gradient,
    parted,
    tokens,
    train,
    update,
)

EVERYTHING: dict[str, Any] = {"density": 1.0, "value_bits": 32}


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
    torch.testing.assert_close(
        train(simulation), train(DenseSimulation(SETTING)), rtol=0, atol=2e-5
    )
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


@pytest.mark.parametrize("residual", ["used", "reset"])
def test_an_exchange_in_flight_lands_later_and_at_the_end(residual: Any) -> None:
    simulation = update(density=0.05, sync_every=2, residual=residual, overlap="auto")
    start = parted(simulation)
    moved = []
    for step in range(2, 8):
        before = simulation.shared.clone()
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, 8))
        moved.append(not torch.equal(before, simulation.shared))
    # Exchanges begin after steps 4, 6 and 8 and land a step later; the last is waited for.
    assert moved == [False, False, True, False, True, True]
    assert not torch.equal(start, simulation.shared[0])
    waiting = update(density=0.05, sync_every=2, residual=residual)
    train(waiting)
    assert simulation.received_bits == waiting.received_bits
    assert simulation.notes()["owed_part"] > 0.0  # all islands agree on the shared weights
    simulation.close()
    waiting.close()


def test_an_unpruned_warm_up_exchanges_everything_in_rounds_and_counts_no_bits() -> None:
    setting = dataclasses.replace(
        SETTING, train=TRAIN.model_copy(update={"warmup_steps": 5}), steps=8
    )
    method = Update(
        kind="update", name="u", warmup="unpruned", warmup_every=2, warmup_dense=1, value_bits=32
    )
    simulation, moved, bits = UpdateSimulation(setting, method), [], []
    for step in range(8):
        before = simulation.shared[0].clone()
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, 8))
        moved.append(float((simulation.shared[0] - before).abs().max()) > 0.0)
        bits.append(simulation.received_bits)
        if step in (2, 4):  # everybody has sent everything, and the mean is everybody's
            own = simulation.apart.weights
            assert float((own - simulation.shared).abs().max()) <= 1e-6
    assert moved == [True, False, True, False, True, True, True, True]
    assert bits[:5] == [0.0] * 5
    assert bits[5] > 0.0
    assert not can_stack(method)


@pytest.mark.parametrize(
    ("more", "moves"),
    [
        ({"warmup_doubles": True}, [1, 3, 7, 11, 12]),
        ({}, [4, 8, 12]),
        ({"overlap": "auto"}, [6, 10, 14]),  # half the interval later
        ({"overlap": "auto", "warmup_delay": 3, "warmup_doubles": True}, [3, 6, 10, 12]),
    ],
)
def test_first_exchanges_of_an_unpruned_warm_up(more: dict[str, Any], moves: list[int]) -> None:
    steps = 15
    setting = dataclasses.replace(
        SETTING, train=TRAIN.model_copy(update={"warmup_steps": 12}), steps=steps
    )
    fields = {"warmup": "unpruned", "warmup_every": 4, "sync_every": 8, "value_bits": 32}
    method = Update.model_validate({"kind": "update", "name": "u"} | fields | more)
    simulation, moved = UpdateSimulation(setting, method), []
    for step in range(steps - 1):
        before = simulation.shared[0].clone()
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, steps))
        if not torch.equal(before, simulation.shared[0]):
            moved.append(step + 1)
    assert moved == moves
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


def assert_bits(simulation: IslandSimulation, sent: float, exchange: str) -> None:
    """So many bits per element went to two peers, or two thirds of them there and back."""
    numel = SETTING.gpt.numel
    ideal = sent * numel * (2 if exchange == "all_gather" else 2 * 2 / 3)
    # Headers and scales; and with owners every row is as long as the largest, by up to a chunk.
    most = 1.05 if exchange == "all_gather" else 1.05 * (1 + 3 * 4096 / numel)
    assert ideal < simulation.received_bits < most * ideal


@pytest.mark.parametrize("exchange", ["all_gather", "owner_reduce"])
def test_diloco_without_momentum_averages_everything(exchange: Any) -> None:
    simulation = diloco(
        sync_every=1, value_bits=32, outer_lr=1.0, outer_momentum=0.0, exchange=exchange
    )
    torch.testing.assert_close(train(simulation), mean_of_islands(8, 1.0, 1.0), rtol=0, atol=2e-5)
    assert not (simulation.apart.weights - simulation.shared).any()
    # Six steps after warm-up.
    assert_bits(simulation, 6 * 32, exchange)
    simulation.close()


def test_diloco_keeps_what_four_bits_round_off() -> None:
    simulation = diloco(sync_every=3)
    train(simulation)
    assert 0.0 < simulation.notes()["owed_part"] < 0.1
    assert_bits(simulation, 2 * 4, "owner_reduce")  # two rounds
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
