"""1-bit Adam and 0/1 Adam as plain loops written from the papers, and both sides' small model."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
import torch.distributed as dist

from labs.race.job import Policy
from labs.race.onebit import GlooWire
from labs.race.onebit_adam import OneBitAdam, Rules, ZeroOneAdam

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


def train_on_gloo(name: str) -> list[list[torch.Tensor]]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['DS_TEST_STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    history, _, _ = train(name, rank, GlooWire())
    dist.destroy_process_group()
    return history
