"""1-bit Adam and 0/1 Adam as peers: against plain loops written from the papers, and their bytes.

Everything is in float64 but the scales, which the wire carries in fp32. A chunk of padding alone
has a scale halfway between two fp32 numbers, which two ways to compute may round apart: by 6e-8 of
it, and the next step takes that back. So values of order 1 agree to 1e-6; a wrong sign does more.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from labs.race.job import Policy, Recipe
from labs.race.methods import parse_method
from labs.race.onebit import GlooWire, OneBitMean
from labs.race.onebit_adam import OneBitAdam, Rules, ZeroOneAdam
from tests.helpers.ranks import run_processes, run_ranks

SHAPES = ((5, 7), (3,), (48,), (1,))
"""With and without padding, on 2 ranks (multiples of 16) and on 3 (of 72)."""

TOLERANCE = 1e-6

RULES = Rules(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
POLICY = Policy(var_freeze_step=7, var_update_scaler=2, local_step_scaler=3, local_step_clipper=4)
FREEZE_STEP = 5
STEPS = 24


class ThreadWire:
    """`Wire` between threads, on the loopback transport of the tests."""

    def __init__(self, transport) -> None:
        self._transport = transport
        self.size = transport.world_size
        self.waited_s = self.sent_bytes = 0.0

    def all_reduce(self, values):
        self.sent_bytes += 2 * (self.size - 1) / self.size * values.nbytes
        self._transport.all_reduce(values)

    def all_to_all(self, rows):
        self.sent_bytes += rows.nbytes - rows[0].nbytes
        everything = self._gather(rows.reshape(-1)).view(self.size, self.size, -1)
        return everything[:, self._transport.rank].clone()

    def all_gather(self, row):
        self.sent_bytes += (self.size - 1) * row.nbytes
        return self._gather(row)

    def _gather(self, row):
        out = torch.empty(self.size, row.numel(), dtype=torch.uint8)
        self._transport.all_gather(row.contiguous(), out)
        return out


def begin() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradients(parameters, rank: int, step: int) -> list[torch.Tensor]:
    """Of a bowl whose middle is another for each rank, with noise."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [
        0.3 * (parameter - rank)
        + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for parameter in parameters
    ]


def rate(step: int) -> float:
    return 0.02 * min(1.0, step / 4)


def make(name: str, parameters, wire):
    if name == "onebit_adam":
        return OneBitAdam(parameters, wire, RULES, FREEZE_STEP)
    return ZeroOneAdam(parameters, wire, RULES, POLICY)


def train(name: str, rank: int, wire) -> tuple[list[list[torch.Tensor]], list[str], list[float]]:
    """Parameters after every step, its kind, and the bytes sent in it."""
    parameters = [torch.nn.Parameter(tensor) for tensor in begin()]
    optimizer = make(name, parameters, wire)
    history, kinds, sent = [], [], []
    for step in range(1, STEPS + 1):
        before = wire.sent_bytes
        for parameter, gradient in zip(
            parameters, gradients([p.detach() for p in parameters], rank, step), strict=True
        ):
            parameter.grad = gradient
        kinds.append(optimizer.step(rate(step)))
        sent.append(wire.sent_bytes - before)
        history.append([parameter.detach().clone() for parameter in parameters])
    return history, kinds, sent


# ---- the papers' algorithms, one process, one element after the other where it matters -----------


class ReferenceMean:
    """Algorithm 1 of arXiv 2102.02888, steps 5 to 9, for one tensor."""

    def __init__(self, numel: int, size: int) -> None:
        unit = size * math.lcm(size, 8)
        self.numel, self.size = numel, size
        self.length = math.ceil(numel / unit) * unit
        self.worker_errors = [np.zeros(self.length) for _ in range(size)]
        self.server_errors = [np.zeros(self.length // size) for _ in range(size)]

    def compress(self, vector):
        scale = float(np.float32(np.sqrt(np.mean(vector**2))))
        sent = np.array([scale if value >= 0 else -scale for value in vector])
        return sent, vector - sent

    def __call__(self, tensors):
        sent = []
        for rank, tensor in enumerate(tensors):
            padded = np.zeros(self.length)
            padded[: self.numel] = tensor.numpy().reshape(-1)
            compressed, self.worker_errors[rank] = self.compress(padded + self.worker_errors[rank])
            sent.append(compressed)
        chunks = []
        for server, chunk in enumerate(np.split(sum(sent) / self.size, self.size)):
            out, self.server_errors[server] = self.compress(chunk + self.server_errors[server])
            chunks.append(out)
        flat = torch.from_numpy(np.concatenate(chunks)[: self.numel])
        return flat.view(tensors[0].shape)


def reference_means(size: int) -> list[ReferenceMean]:
    return [ReferenceMean(math.prod(shape), size) for shape in SHAPES]


def clipped(tensors):
    norm = math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))
    return [tensor * min(1.0, RULES.clip_norm / (norm + 1e-6)) for tensor in tensors]


def averaged(per_rank):
    return [sum(tensors) / len(per_rank) for tensors in zip(*per_rank, strict=True)]


def blend(old, new, beta):
    return [beta * o + (1 - beta) * n for o, n in zip(old, new, strict=True)]


def squares(tensors):
    return [tensor**2 for tensor in tensors]


def root(second, updates):
    return [(v / (1 - RULES.beta2**updates)).sqrt() + RULES.eps for v in second]


def moved(parameters, first, denominators, lr, step):
    corrected = [m / (1 - RULES.beta1**step) for m in first]
    return [
        (1 - lr * RULES.weight_decay) * x - lr * m / d
        for x, m, d in zip(parameters, corrected, denominators, strict=True)
    ]


def reference_onebit(size: int):
    x, m, v = begin(), [0.0] * len(SHAPES), [0.0] * len(SHAPES)
    means, history = reference_means(size), []
    for t in range(1, STEPS + 1):
        local = [gradients(x, rank, t) for rank in range(size)]
        if t <= FREEZE_STEP:
            g = clipped(averaged(local))
            m, v = blend(m, g, RULES.beta1), blend(v, squares(g), RULES.beta2)
        else:
            momenta = [blend(m, clipped(g), RULES.beta1) for g in local]
            m = [mean(ms) for mean, ms in zip(means, zip(*momenta, strict=True), strict=True)]
        x = moved(x, m, root(v, min(t, FREEZE_STEP)), rate(t), t)
        history.append([x] * size)
    return history


def reference_zeroone(size: int):
    """Algorithm 1 of arXiv 2202.06009 with the policies of DeepSpeed's class."""
    x, m = [begin()] * size, [[0.0] * len(SHAPES)] * size
    v, updates, interval, count = [0.0] * len(SHAPES), 0, 1, 0
    gap, waited, history = 1, 0, []
    means = reference_means(size)
    for t in range(1, STEPS + 1):
        lr, local = rate(t), [gradients(x[rank], rank, t) for rank in range(size)]
        if t <= POLICY.var_freeze_step:
            if t % interval == 0:
                g = clipped(averaged(local))
                v, updates, count = blend(v, squares(g), RULES.beta2), updates + 1, count + 1
                if count == POLICY.var_update_scaler:
                    interval, count = 2 * interval, 0
            else:
                pairs = zip(means, zip(*map(clipped, local), strict=True), strict=True)
                g = [mean(gs) for mean, gs in pairs]
            m = [blend(m[0], g, RULES.beta1)] * size
            x = [moved(x[0], m[0], root(v, updates), lr, t)] * size
            if t == POLICY.var_freeze_step:
                means, d = reference_means(size), root(v, updates)
                start, u, rates = x[0], [[0.0] * len(SHAPES) for _ in range(size)], 0.0
        else:
            alpha = lr / (1 - RULES.beta1**t)
            m = [blend(m[r], clipped(local[r]), RULES.beta1) for r in range(size)]
            x = [moved(x[r], m[r], d, lr, t) for r in range(size)]
            u = [[a + alpha * b for a, b in zip(u[r], m[r], strict=True)] for r in range(size)]
            start, rates = [(1 - lr * RULES.weight_decay) * s for s in start], rates + alpha
            if t % gap == 0:
                total = [mean(us) for mean, us in zip(means, zip(*u, strict=True), strict=True)]
                start = [s - a / b for s, a, b in zip(start, total, d, strict=True)]
                m, x = [[a / rates for a in total]] * size, [start] * size
                u, rates = [[0.0] * len(SHAPES) for _ in range(size)], 0.0
            waited += 1
            if waited == POLICY.local_step_scaler:
                gap, waited = min(POLICY.local_step_clipper, 2 * gap), 0
        history.append(x)
    return history


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


def train_on_gloo(name: str) -> list[list[torch.Tensor]]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['DS_TEST_STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    history, _, _ = train(name, rank, GlooWire())
    dist.destroy_process_group()
    return history


@pytest.mark.distributed
@pytest.mark.slow
def test_gloo_carries_the_same_bits() -> None:
    on_gloo = run_processes(
        3, "tests.test_benchmark_onebit", "train_on_gloo", {"name": "zeroone_adam"}
    )
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
