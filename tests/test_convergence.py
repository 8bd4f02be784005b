"""The laboratory: model, optimizer, exchange and simulated methods, against independent ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.convergence_lab.adamw import AdamW, CorrectedAdamW, learning_rate
from benchmarks.convergence_lab.base import DenseSimulation, Setting, Simulation
from benchmarks.convergence_lab.gpt import Gpt, Gradients, validation_loss
from benchmarks.convergence_lab.gradient import GradientSimulation
from benchmarks.convergence_lab.grid import Dense, Gradient, Model, PowerSgd, Sent, Train, Update
from benchmarks.convergence_lab.peers import OneBitAdamSimulation, PowerSgdSimulation
from benchmarks.convergence_lab.text import Text
from benchmarks.convergence_lab.trial import simulation_of
from benchmarks.convergence_lab.update import UpdateSimulation
from benchmarks.convergence_lab.values import GROUP_NUMEL, rounded, values_bytes
from benchmarks.convergence_lab.wire import Swap, Wire, lab_layout
from ds_gradprune.errors import DataError
from ds_gradprune.exchange import AllGather
from ds_gradprune.records import RankSignals
from ds_gradprune.reducer import Reducer
from tests.helpers.ranks import run_ranks

SHAPE = Model(n_layer=1, n_head=2, n_embd=64, context=16)
TRAIN = Train(batch=2, warmup_steps=2, lr_warmup_steps=1, lr=1e-3)
SETTING = Setting(Gpt(SHAPE, 70), TRAIN, workers=3, steps=8, seed=1)
SIGNALS = RankSignals(1.0, False, None, 0.0, 0.0, 0, 0)


def tokens(step: int, workers: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 70, (workers, 2, 17), generator=generator)


def owed(step: int, workers: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(workers, SETTING.gpt.numel, generator=generator)


def train(simulation: Simulation, steps: int = 8) -> torch.Tensor:
    for step in range(steps):
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, steps))
    return simulation.shared[0]


def update(**fields: Any) -> UpdateSimulation:
    return UpdateSimulation(SETTING, Update(kind="update", name="u", **fields))


def gradient(**fields: Any) -> GradientSimulation:
    return GradientSimulation(SETTING, Gradient(kind="gradient", name="g", **fields))


def test_workers_in_one_pass_equal_each_alone() -> None:
    gpt = SETTING.gpt
    together = Gradients(gpt, 3)
    for worker in range(3):
        together.weights[worker] = gpt.initial(worker)
    losses = together(tokens(0))
    for worker in range(3):
        alone = Gradients(gpt, 1)
        alone.weights[0] = gpt.initial(worker)
        loss = alone(tokens(0)[worker : worker + 1])
        torch.testing.assert_close(loss[0], losses[worker])
        torch.testing.assert_close(alone.gradient[0], together.gradient[worker])


def test_the_gradient_is_that_of_the_loss() -> None:
    gpt = SETTING.gpt
    one = Gradients(gpt, 1)
    one.weights[0] = gpt.initial(0)
    one(tokens(0)[:1])
    direction = torch.randn(gpt.numel, generator=torch.Generator().manual_seed(0))
    slope = float(one.gradient[0] @ direction)
    step = 1e-3
    ends = []
    for sign in (1, -1):
        views = gpt.views((gpt.initial(0) + sign * step * direction)[None])
        ends.append(float(gpt.losses(views, tokens(0)[:1])))
    # Central difference: the error is of second order in `step`, beside fp32's 1e-7 / step.
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_products_of_bf16_factors_are_near() -> None:
    near = Gpt(SHAPE.model_copy(update={"matmul": "bf16"}), 70)
    both = [Gradients(SETTING.gpt, 2), Gradients(near, 2)]
    for one in both:
        one.weights.copy_(near.initial(0).expand(2, -1))
        one(tokens(0, 2))
    exact, rough = both[0].gradient[0], both[1].gradient[0]
    # A factor is off by 2**-9 at most, at random; half a dozen layers there and back.
    assert 0.0 < float((exact - rough).norm() / exact.norm()) < 0.03


def test_products_of_bf16_factors_do_not_need_their_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near = Gpt(SHAPE.model_copy(update={"matmul": "bf16"}), 70)
    found = []
    for has in (True, False):
        monkeypatch.setattr("benchmarks.convergence_lab.gpt.HAS_BF16_PRODUCTS", has)
        one = Gradients(near, 2)
        one.weights.copy_(near.initial(0).expand(2, -1))
        found.append((one(tokens(0, 2)), one.gradient))
    # Sums in another order, which now and then round to the neighbour: far below 2**-9 together.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 5e-3


def test_the_model_cannot_see_what_it_predicts() -> None:
    views = SETTING.gpt.views(SETTING.gpt.initial(0)[None])
    first = tokens(0)[:1]
    other = first.clone()
    other[..., -2] = (other[..., -2] + 1) % 70  # the last input; earlier losses must not move
    cut = [SETTING.gpt.losses(views, t[..., :-2]) for t in (first, other)]
    assert torch.equal(*cut)
    assert not torch.equal(SETTING.gpt.losses(views, first), SETTING.gpt.losses(views, other))


def test_adamw_is_torchs() -> None:
    decayed = torch.tensor([1.0] * 5 + [0.0] * 3)
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    theirs = [torch.nn.Parameter(row.clone()) for row in (weights[1, :5], weights[1, 5:])]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    ours = AdamW(2, decayed, Train(beta2=0.95, weight_decay=0.1))
    for step in range(5):
        slope = torch.randn(2, 8, generator=torch.Generator().manual_seed(step))
        theirs[0].grad, theirs[1].grad = slope[1, :5].clone(), slope[1, 5:].clone()
        adamw.step()
        ours.step(weights, slope, 0.01)
    torch.testing.assert_close(weights[1], torch.cat([p.detach() for p in theirs]))


@pytest.mark.parametrize("value_bits", [16, 32])
def test_the_exchange_gives_the_bits_of_the_reducer_in_threads(value_bits: int) -> None:
    sent = Sent(name="s", density=0.05, value_bits=value_bits)
    layout = lab_layout(SETTING.gpt.shapes, prune_vectors=False)
    wire = Wire(layout, sent)
    residual = torch.zeros(3, layout.numel)
    ours = []
    for step in range(4):
        residual += owed(step)
        ours.append(wire.swap(residual, 0.05).total)

    def work(transport: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        reducer = Reducer(AllGather(transport), value_bits=value_bits)
        sums = []
        for step in range(4):
            vector = owed(step)[transport.rank].clone()
            reducer.reduce(vector, layout, 205, step=step, bucket=0, signals=SIGNALS)
            sums.append(vector)
        return sums, reducer.residuals.of(0, sums[0]).buffer

    for rank, (sums, kept) in enumerate(run_ranks(3, work)):
        assert all(torch.equal(a, b) for a, b in zip(ours, sums, strict=True))
        assert torch.equal(kept, residual[rank])


@pytest.mark.parametrize("value_bits", [1, 2, 4, 16, 32])
@pytest.mark.parametrize("pick", ["top_k", "rotate", "random"])
def test_sent_and_kept_are_all_there_was(pick: Any, value_bits: Any) -> None:
    sent = Sent(name="s", pick=pick, value_bits=value_bits)
    wire = Wire(lab_layout(SETTING.gpt.shapes, prune_vectors=pick == "random"), sent)
    rows = owed(0)
    before = rows.sum(0)
    swap = wire.swap(rows, 0.1)
    # Three fp32 additions each way.
    torch.testing.assert_close(swap.total + rows.sum(0), before, rtol=0, atol=1e-5)
    assert 0 < swap.received_bits < 2 * SETTING.gpt.numel * 32


@pytest.mark.parametrize("pick", ["top_k", "rotate"])
def test_owners_forget_nothing_and_save_traffic(pick: Any) -> None:
    bits = []
    for exchange in ("all_gather", "owner_reduce"):
        sent = Sent(name="s", pick=pick, value_bits=4, exchange=exchange)
        wire = Wire(lab_layout(SETTING.gpt.shapes, False), sent)
        rows = owed(0, 8)
        before = rows.sum(0)
        swaps = [wire.swap(rows, 0.1) for _ in range(3)]
        total = swaps[0].total + swaps[1].total + swaps[2].total
        everything = total + rows.sum(0) + wire._owners_owe
        torch.testing.assert_close(everything, before, rtol=0, atol=2e-5)
        bits.append(swaps[0].received_bits)
    assert bits[1] / bits[0] == pytest.approx(2 / 8)  # 2 (N - 1) / N for N - 1


def test_a_rotation_sends_every_element_once() -> None:
    for pick in ("rotate", "random"):
        sent = Sent(name="s", pick=pick, value_bits=32, prune_vectors=True)
        wire = Wire(lab_layout(SETTING.gpt.shapes, prune_vectors=True), sent)
        rows = torch.ones(2, SETTING.gpt.numel)
        total = sum(wire.swap(rows, 0.25).total for _ in range(4))
        assert torch.equal(total, torch.full((SETTING.gpt.numel,), 2.0))
        assert not rows.any()


def test_a_score_decides_what_is_sent() -> None:
    wire = Wire(lab_layout(SETTING.gpt.shapes, True), Sent(name="s", value_bits=32))
    score = torch.full((SETTING.gpt.numel,), 1e-6)
    score[::100] = 1.0  # 41 of 4096: just what is kept
    total = wire.swap(owed(0), 0.01, score).total
    full = 4096 * (SETTING.gpt.shapes[0].numel() // 4096)
    assert set(total[:full].nonzero().view(-1).tolist()) <= set(range(0, full, 100))


def test_the_spread_tells_noise_from_agreement() -> None:
    sent = Sent(name="s", pick="rotate", value_bits=32)
    layout = lab_layout(SETTING.gpt.shapes, True)
    assert Wire(layout, sent).swap(owed(0)[:1].repeat(4, 1), 0.5).spread == pytest.approx(1.0)
    # 25,000 independent normal elements: the norms' relative error is below 1 %.
    assert Wire(layout, sent).swap(owed(0, 4), 0.5).spread == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize(("bits", "worst"), [(4, 0.08), (2, 0.75), (1, 1.0)])
def test_rounding_is_near_and_has_few_levels(bits: int, worst: float) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    out = rounded(values, bits)
    for begin in range(0, 1000, GROUP_NUMEL):
        group, read = values[begin : begin + GROUP_NUMEL], out[begin : begin + GROUP_NUMEL]
        assert len(read.unique()) <= 2**bits
        # 4: half of a seventh, and bf16's 2**-8; 2 and 1: one level carries the largest too.
        assert float((group - read).abs().max()) <= worst * float(group.abs().max())
    assert bool((out * values >= 0).all())


def test_sizes_of_values() -> None:
    assert [values_bytes(256, bits) for bits in (1, 2, 4, 16, 32)] == [36, 72, 132, 512, 1024]
    with pytest.raises(ValueError, match="bits must be 1, 2 or 4, got 3"):
        rounded(torch.ones(3), 3)


def test_everything_sent_is_dense_training() -> None:
    dense = train(DenseSimulation(SETTING))
    pruned = train(gradient(density=1.0, value_bits=32))
    # The means are summed in another order: fp32 rounding, through Adam, for eight steps.
    torch.testing.assert_close(pruned, dense, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale_at", ["local", "shared"])
def test_islands_that_send_everything_move_by_the_mean(scale_at: Any) -> None:
    simulation = update(density=1.0, value_bits=32, scale=2.0, scale_at=scale_at)
    shared = train(simulation)
    weights, moved = SETTING.gpt.initial(1), Gradients(SETTING.gpt, 3)
    adam = AdamW(3, SETTING.decayed(), TRAIN)
    for step in range(8):
        moved.weights.copy_(weights.expand(3, -1))
        moved(tokens(step))
        slope = moved.gradient / (moved.gradient.norm(dim=1, keepdim=True)).clamp(min=1.0)
        adam.step(moved.weights, slope, learning_rate(TRAIN, step, 8))
        weights = weights + 2.0 * (moved.weights - weights).mean(0)
    torch.testing.assert_close(shared, weights, rtol=0, atol=2e-5)
    torch.testing.assert_close(simulation.flushed(), shared, rtol=0, atol=1e-6)


def test_islands_that_step_less_add_up_to_the_same() -> None:
    fields = {"density": 1.0, "value_bits": 32, "scale_at": "shared", "warmup": "gradient"}
    mean = update(scale="sqrt", **fields)
    total = update(scale="sum", local_lr="root", local_lr_from="pruning", **fields)
    torch.testing.assert_close(train(total), train(mean), rtol=0, atol=2e-5)


def test_an_island_sees_what_it_has_not_sent() -> None:
    simulation = update(density=0.02, sync_every=3)
    train(simulation, steps=7)
    expected = simulation.shared + simulation._owed
    torch.testing.assert_close(simulation._local, expected, rtol=0, atol=1e-6)
    flushed = simulation.shared[0] + simulation._owed.mean(0)
    torch.testing.assert_close(simulation.flushed(), flushed)
    assert simulation.notes()["owed_part"] > 0


def test_an_island_forgets_a_share_of_what_it_has_not_sent() -> None:
    forgetful, other = update(keep=0.5, sync_every=100), update(sync_every=100)
    for simulation in (forgetful, other):
        train(simulation, steps=3)  # two of warm-up, one alone
    torch.testing.assert_close(forgetful._owed, 0.5 * other._owed)
    seen = forgetful.shared + forgetful._owed
    torch.testing.assert_close(forgetful._local, seen, rtol=0, atol=1e-6)


def test_islands_can_keep_their_second_moments() -> None:
    simulation = update(frozen=True)
    train(simulation, steps=2)
    kept = simulation._adam.v.clone()
    simulation.step(2, tokens(2), 1e-3)
    assert torch.equal(simulation._adam.v, kept)
    assert kept.any()


def test_islands_with_denses_second_moment_are_dense_training() -> None:
    setting = dataclasses.replace(SETTING, train=TRAIN.model_copy(update={"clip": 1e9}))
    method = Update(
        kind="update", name="u", density=1.0, value_bits=32, scale=1.0, scale_at="shared",
        second_moment="mean", warmup="gradient",
    )  # fmt: skip
    islands, dense = train(UpdateSimulation(setting, method)), train(DenseSimulation(setting))
    torch.testing.assert_close(islands, dense, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("signal", "part"), [(0.0, 1 / 4), (1.0, 1 - 3 / 4 / 2), (100.0, 1.0)])
def test_the_guess_divides_noise_by_the_workers(signal: float, part: float) -> None:
    adam = CorrectedAdamW(4, torch.zeros(20_000), Train(beta2=0.999))
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        adam.note(signal + torch.randn(4, 20_000, generator=generator))
    guess = float(adam.second_moment(1.0).mean()) / (signal**2 + 1)
    # Clamping a noisy guess at zero makes it larger: the worst case is noise alone.
    assert part - 0.01 < guess < part + 0.08
    adam.guessing = False
    assert not adam.second_moment(1.0).any()  # AdamW's own, which has not stepped


def test_a_first_moment_after_the_exchange_smooths_what_arrives() -> None:
    simulation = update(momentum_at="shared", own=0.0)
    begin = simulation.shared.clone()
    spike = Swap(torch.full((SETTING.gpt.numel,), 3.0), 0.0, 1.0)  # the mean of three is 1
    simulation._move(spike)
    torch.testing.assert_close(simulation.shared - begin, torch.full_like(begin, 0.1))
    for _ in range(80):
        simulation._move(Swap(torch.zeros(SETTING.gpt.numel), 0.0, 1.0))
    torch.testing.assert_close(simulation.shared - begin, torch.ones_like(begin), rtol=0, atol=1e-3)


def test_with_the_first_moment_after_the_exchange_islands_send_no_momentum() -> None:
    simulation = update(momentum_at="shared", own=0.0, warmup="gradient")
    train(simulation, steps=3)  # two of warm-up
    gradient_only = simulation._gradients.gradient
    torch.testing.assert_close(simulation._adam.m, gradient_only)
    torch.testing.assert_close(simulation._local, simulation.shared.expand(3, -1))


def test_outer_momentum_makes_a_steady_move_longer() -> None:
    for nesterov in (True, False):
        simulation = update(momentum=0.5, nesterov=nesterov, outer_lr=0.5)
        begin = simulation.shared.clone()
        steady = Swap(torch.full((SETTING.gpt.numel,), 3.0), 0.0, 1.0)
        for _ in range(60):
            simulation._move(steady)
        moved = float((simulation.shared - begin).mean())
        # A mean of 1 per exchange, 0.5 / (1 - 0.5) = 1 times as long, less what lags behind.
        assert 58.0 < moved <= 60.0 + 1e-3


def test_what_moves_one_way_for_long_moves_further() -> None:
    simulation = update(slow=2.0, slow_decay=0.5, scale=1.0)
    before = simulation.shared.clone()
    for step in range(30):
        last = simulation.shared.clone()
        simulation._move(Swap(torch.full_like(before[0], 0.3), 0.0, 1.0))
        if step == 0:
            torch.testing.assert_close(simulation.shared - last, torch.full_like(last, 0.2))
    torch.testing.assert_close(simulation.shared - last, torch.full_like(last, 0.3))


def test_warmup_of_islands_can_be_denses_own() -> None:
    simulation = update(warmup="gradient", local_lr="root", local_lr_from="pruning")
    dense = DenseSimulation(SETTING)
    for step in range(2):
        simulation.step(step, tokens(step), 1e-3)
        dense.step(step, tokens(step), 1e-3)
    torch.testing.assert_close(simulation.shared, dense.shared, rtol=0, atol=1e-5)
    assert simulation.received_bits == 0.0


def test_received_bits_are_those_of_the_payloads() -> None:
    simulation = update(density=0.05, value_bits=16, sync_every=2)
    train(simulation)
    layout = lab_layout(SETTING.gpt.shapes, prune_vectors=False)

    def work(transport: Any) -> int:
        exchange = AllGather(transport)
        reducer = Reducer(exchange)
        vector = owed(0)[transport.rank].clone()
        reducer.reduce(vector, layout, 205, step=1, bucket=0, signals=SIGNALS)
        return exchange.take_traffic().wire_bytes

    exchanges = 3  # after steps 4, 6 and 8; the first two steps are warm-up
    assert simulation.received_bits == exchanges * 8 * run_ranks(3, work)[0]


@pytest.mark.parametrize("rule", ["plain", "tau", "frozen", "floor"])
@pytest.mark.parametrize("extra", [{}, {"score": "over_sqrt_v"}, {"local_momentum": True}])
def test_gradient_candidates_learn(rule: Any, extra: Any) -> None:
    simulation = gradient(density=0.1, second_moment=rule, ramp_steps=2, **extra)
    repeated = tokens(0)
    before = validation_loss(SETTING.gpt, simulation.shared[0], repeated[0])
    for step in range(12):
        simulation.step(step, repeated, 3e-3)
    assert validation_loss(SETTING.gpt, simulation.shared[0], repeated[0]) < before - 0.3


def test_a_frozen_second_moment_stays() -> None:
    simulation = gradient(second_moment="frozen", density=0.1)
    train(simulation, steps=2)
    kept = simulation.adam.v.clone()
    train(simulation, steps=4)  # its first two steps are warm-up again
    simulation.step(5, tokens(5), 1e-3)
    moved = simulation.adam.v.clone()
    simulation.step(6, tokens(6), 1e-3)
    assert torch.equal(simulation.adam.v, moved)
    assert not torch.equal(kept, moved)


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


def test_density_schedules() -> None:
    def at(step: int, **fields: Any) -> float:
        return setting.density(Sent(name="s", density=0.1, **fields), step)

    setting = dataclasses.replace(SETTING, steps=102)
    assert at(50) == 0.1
    assert at(2, density_end=0.001) == pytest.approx(0.1)
    assert at(52, density_end=0.001) == pytest.approx(0.01)
    assert at(2, ramp_steps=20, ramp_from=0.4) == pytest.approx(0.4)
    assert at(12, ramp_steps=20, ramp_from=0.4) == pytest.approx(0.2)
    assert at(22, ramp_steps=20, ramp_from=0.4) == 0.1
    assert at(91, density_late=0.5, late_part=0.1) == 0.1
    assert at(92, density_late=0.5, late_part=0.1) == 0.5


def test_text_is_cut_and_dealt_out(tmp_path: Any) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(50)) * 40)
    text = Text(path, 16)
    assert text.vocab_size == 50
    batch = text.batch(0, 3, 2, 4)
    assert batch.shape == (2, 4, 17)
    assert torch.equal(batch, text.batch(0, 3, 2, 4))
    assert not torch.equal(batch, text.batch(1, 3, 2, 4))
    assert torch.equal((batch[..., 1:] - batch[..., :-1]) % 50, torch.ones_like(batch[..., 1:]))
    whole = text.validation()
    assert whole.shape == (12, 17)  # 199 predicted bytes of the last 200
    assert int(whole[0, 0]) == 1800 % 50
    assert text.validation(3).shape == (3, 17)
    path.write_bytes(b"a" * 100)
    with pytest.raises(DataError, match="at least 340 bytes for sequences of 16, got 100"):
        Text(path, 16)
    with pytest.raises(DataError, match=r"must be a readable file, got .*absent"):
        Text(tmp_path / "absent", 16)


def test_everything_can_be_delivered_while_own_progress_stays_pruned() -> None:
    fields: dict[str, Any] = {"scale_at": "shared", "warmup": "gradient", "density": 0.01}
    simulation = update(deliver="whole", **fields)
    pruned = update(**fields)
    for each in (simulation, pruned):
        train(each, steps=3)  # two of warm-up, one alone
    # The workers owe what they owe in the same run, and yet nothing is missing of the mean.
    owed_still = simulation.seen() - simulation.shared
    torch.testing.assert_close(owed_still, pruned._owed, rtol=0, atol=1e-6)
    torch.testing.assert_close(simulation.shared[0], pruned.flushed(), rtol=0, atol=1e-6)
    assert torch.equal(simulation.flushed(), simulation.shared[0])
    assert not torch.equal(pruned.shared, simulation.shared)


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
    assert method.label() == "dense, accumulated"  # no baseline


def test_accumulated_islands_show_their_own_weights() -> None:
    method = Update(kind="update", name="u", accumulate=2, scale_at="shared", warmup="gradient")
    simulation = simulation_of(SETTING, method)
    train(simulation)
    assert simulation.seen().shape == (3, SETTING.gpt.numel)
    assert not torch.equal(simulation.flushed(), simulation.shared[0])
    assert simulation.notes()["owed_part"] > 0.0
