"""1-bit Adam and 0/1 Adam as peers: against plain loops written from the papers, and their bytes.

Everything is in float64 but the scales, which the wire carries in fp32. A chunk of padding alone
has a scale halfway between two fp32 numbers, which two ways to compute may round apart: by 6e-8 of
it, and the next step takes that back. So values of order 1 agree to 1e-6; a wrong sign does more.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from labs.race.job import Recipe
from labs.race.methods import parse_method
from labs.race.onebit import OneBitMean
from tests.helpers.onebit import (
    FREEZE_STEP,
    SHAPES,
    STEPS,
    TOLERANCE,
    ThreadWire,
    averaged,
    begin,
    gradients,
    rate,
    reference_means,
    reference_onebit,
    reference_zeroone,
    train,
)
from tests.helpers.ranks import run_processes, run_ranks

# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_the_average_is_the_papers_and_loses_nothing(size) -> None:
    rounds, generator = 6, torch.Generator().manual_seed(1)
    inputs = [
        [
            [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
            for _ in range(size)
        ]
        for _ in range(rounds)
    ]

    def work(transport):
        mean, outputs = OneBitMean(begin(), ThreadWire(transport)), []
        for number in range(rounds):
            tensors = [tensor.clone() for tensor in inputs[number][transport.rank]]
            mean(tensors)
            outputs.append(tensors)
        return outputs

    results = run_ranks(size, work)
    references = reference_means(size)
    for number in range(rounds):
        for index, reference in enumerate(references):
            expected = reference([inputs[number][rank][index] for rank in range(size)])
            for rank in range(size):
                assert torch.equal(results[rank][number][index], results[0][number][index])
            torch.testing.assert_close(results[0][number][index], expected, rtol=0, atol=TOLERANCE)
    # What was put in comes out, but for what the errors still hold.
    for index, reference in enumerate(references):
        put_in = sum(averaged(inputs[number])[index] for number in range(rounds)).reshape(-1)
        came_out = sum(results[0][number][index] for number in range(rounds)).reshape(-1)
        held = sum(reference.worker_errors) / size + np.concatenate(reference.server_errors)
        numel = reference.numel
        assert came_out.numpy() + held[:numel] == pytest.approx(put_in.numpy(), abs=TOLERANCE)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "reference"), [("onebit_adam", reference_onebit), ("zeroone_adam", reference_zeroone)]
)
def test_the_update_is_the_papers(name, reference, size) -> None:
    results = run_ranks(size, lambda transport: train(name, transport.rank, ThreadWire(transport)))
    expected = reference(size)
    for step in range(STEPS):
        for rank in range(size):
            found = results[rank][0][step]
            torch.testing.assert_close(found, expected[step][rank], rtol=0, atol=TOLERANCE)


def test_one_bit_adam_is_adamw_until_it_freezes() -> None:
    (history, kinds, _), _ = run_ranks(
        2, lambda transport: train("onebit_adam", transport.rank, ThreadWire(transport))
    )
    assert kinds == ["dense"] * FREEZE_STEP + ["usual"] * (STEPS - FREEZE_STEP)
    parameters = [torch.nn.Parameter(tensor) for tensor in begin()]
    adamw = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(1, FREEZE_STEP + 1):
        detached = [parameter.detach() for parameter in parameters]
        both = [gradients(detached, rank, step) for rank in range(2)]
        for parameter, gradient in zip(parameters, averaged(both), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.param_groups[0]["lr"] = rate(step)
        adamw.step()
        torch.testing.assert_close(history[step - 1], [p.detach() for p in parameters])


def test_zero_one_adam_keeps_its_schedule_and_meets_again() -> None:
    (one, kinds, _), (two, _, _) = run_ranks(
        2, lambda transport: train("zeroone_adam", transport.rank, ThreadWire(transport))
    )
    # Updates of the second moment at 1, 2 (two of interval 1), 4, 6; frozen after 7. Then exchanges
    # at every step for three steps, at every second for three, at every fourth.
    dense, usual = {1, 2, 4, 6}, {3, 5, 7, 8, 9, 10, 12, 16, 20, 24}
    expected = [
        "dense" if t in dense else "usual" if t in usual else "silent" for t in range(1, 25)
    ]
    assert kinds == expected
    for step, kind in enumerate(kinds):
        pairs = zip(one[step], two[step], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (kind != "silent")


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_a_bit_per_element_and_a_scale_per_tensor(size) -> None:
    results = run_ranks(
        size, lambda transport: train("zeroone_adam", transport.rank, ThreadWire(transport))
    )
    unit = size * math.lcm(size, 8)
    padded = sum(math.ceil(math.prod(shape) / unit) * unit for shape in SHAPES)
    numel = sum(math.prod(shape) for shape in SHAPES)
    expected = {
        "dense": 2 * (size - 1) / size * 8 * numel,  # a ring of float64
        "usual": 2 * (size - 1) * (padded / size / 8 + 4 * len(SHAPES)),
        "silent": 0,
    }
    for _, kinds, sent in results:
        assert sent == pytest.approx([expected[kind] for kind in kinds])


def test_a_large_tensor_costs_a_thirty_second_of_fp32() -> None:
    def work(transport):
        tensor, wire = torch.ones(2**16), ThreadWire(transport)
        mean = OneBitMean([tensor], wire)
        mean([tensor])
        assert mean.payload_bytes == wire.sent_bytes
        dense = ThreadWire(transport)
        dense.all_reduce(torch.ones(2**16))
        return dense.sent_bytes / wire.sent_bytes

    assert run_ranks(2, work) == pytest.approx([32.0] * 2, rel=0.01)


@pytest.mark.distributed
@pytest.mark.slow
def test_gloo_carries_the_same_bits() -> None:
    on_gloo = run_processes(3, "tests.helpers.onebit", "train_on_gloo", {"name": "zeroone_adam"})
    on_threads = run_ranks(
        3, lambda transport: train("zeroone_adam", transport.rank, ThreadWire(transport))
    )
    for rank in range(3):
        # A sum of three may be taken in another order in a dense step.
        for found, expected in zip(on_gloo[rank], on_threads[rank][0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_schedules_are_shares_of_the_run() -> None:
    recipe = Recipe("micro", 4, 1e-3, 0.99, 0.1, 1.0, 20, 30, 300, 0, None, None)
    assert recipe.opening_steps(parse_method("onebit_adam")) == 45
    assert recipe.opening_steps(parse_method("zeroone_adam")) == 30
    assert recipe.opening_steps(parse_method("powersgd_4")) == 30
    assert recipe.opening_steps(parse_method("bf16_hook")) == 0
    # 32,678 of 152,000 steps
    policy = recipe.policy(16)
    assert (policy.local_step_scaler, policy.local_step_clipper) == (64, 16)
    # a stretch that gives times holds two of the rarest exchanges
    assert recipe.timing_steps(parse_method("zeroone_adam_16"), 8) == 32
    assert recipe.timing_steps(parse_method("zeroone_adam"), 8) == 8
    assert recipe.timing_steps(parse_method("onebit_adam"), 8) == 8
