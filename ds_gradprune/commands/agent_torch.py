"""Orders of the agent that need torch: collectives between hosts, and what a step costs here."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.commands import exchange_cost, shapes, step_cost
from ds_gradprune.law.stats import median
from ds_gradprune.native.library import kernels
from ds_gradprune.wire.throttle import RatePoint
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.traffic import all_gather_bytes, ring_all_reduce_bytes

CALLS = 15
"""Small collectives behind a median."""

CODEC_DENSITY = 0.01
"""An exchange after a real step is measured at it."""

TIMEOUT_S = 60.0


def collective(
    *, rank: int, world_size: int, host: str, port: int, num_bytes: int
) -> dict[str, Any]:
    """Time the product's own collectives between all hosts, over gloo.

    Args:
        rank: this host.
        world_size: hosts.
        host: of rank 0.
        port: free there.
        num_bytes: of a large message.

    Returns:
        Seconds of every small all-gather and all-reduce, megabit per second of large ones.

    Collective: all hosts.
    """
    limit = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    try:
        return _collectives(TorchDistTransport(timeout_s=TIMEOUT_S), num_bytes)
    finally:
        dist.destroy_process_group()


def _collectives(transport: TorchDistTransport, num_bytes: int) -> dict[str, Any]:
    world_size = transport.world_size
    small = torch.zeros(80, dtype=torch.uint8)
    large = torch.zeros(num_bytes, dtype=torch.uint8)
    vector = torch.zeros(num_bytes // 4)

    def gather(payload: torch.Tensor) -> float:
        out = torch.empty((world_size, payload.numel()), dtype=torch.uint8)
        return _timed(lambda: transport.all_gather(payload, out))

    def reduce(tensor: torch.Tensor) -> float:
        return _timed(lambda: transport.all_reduce(tensor))

    def after_work(call: Callable[[], float]) -> float:
        cold.add_(1)  # a step of training leaves caches and threads cold, too
        return call()

    cold = torch.zeros(exchange_cost.COLD_BYTES, dtype=torch.uint8)
    gather(small)
    reduce(vector[:16])
    gathers_s = [after_work(lambda: gather(small)) for _ in range(CALLS)]
    reduces_s = [after_work(lambda: reduce(vector[:16])) for _ in range(CALLS)]
    gather_s = median([gather(large) for _ in range(3)]) - min(gathers_s)
    reduce_s = median([reduce(vector) for _ in range(3)]) - min(reduces_s)
    sent = all_gather_bytes(num_bytes, world_size)
    summed = ring_all_reduce_bytes(4 * vector.numel(), world_size)
    return {
        "gathers_s": gathers_s,
        "reduces_s": reduces_s,
        "gather_mbit": 8e-6 * sent / max(gather_s, 1e-6),
        "reduce_mbit": 8e-6 * summed / max(reduce_s, 1e-6),
    }


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _exchange(
    numels: list[int],
    pruned: list[bool],
    shards: int,
    density: float,
    decay: float | None,
    islands: int,
    value_bits: int,
    points: list[RatePoint],
    device: str,
) -> dict[str, Any]:
    """What an exchange costs, measured on a sample of the weights that one rank exchanges."""
    sample, are_pruned = shapes.share_of(
        numels, pruned, min(exchange_cost.SAMPLE_NUMEL, -(-sum(numels) // shards))
    )
    k = kept_per_chunk(density)
    found = exchange_cost.measure_exchange(
        sample,
        are_pruned,
        k=k,
        islands=islands,
        value_bits=value_bits,
        decay=decay,
        points=points,
        device=device,
    )
    return {
        "density": density,
        "decay": decay,
        "codec_s": sum(numels) / shards / sum(sample) * found.codec_s,
        "payload_bytes": exchange_cost.payload_bytes(numels, pruned, k, value_bits),
        "sample_bytes": exchange_cost.payload_bytes(sample, are_pruned, k, value_bits),
        "emulated_s": list(found.emulated_s),
    }


def local(
    *,
    model: str,
    batch: int,
    tokens: int | None,
    is_bf16: bool,
    stage: int,
    min_numel: int,
    densities: Sequence[float],
    decays: Sequence[float | None],
    islands: int,
    shards: int,
    value_bits: int,
    step_s: float | None,
    links: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """What a step of this model costs on this host.

    Args:
        model: see `shapes.config_of`.
        batch: sequences of a micro-step.
        tokens: of a sequence; None: what the model can see.
        is_bf16: precision of forward and backward.
        stage: of ZeRO.
        min_numel: smaller parameters are sent whole.
        densities: to measure the codec at.
        decays: of the residuals to measure it with; None: no buffer.
        islands: hosts.
        shards: ranks of a host, which divide the weights among them.
        value_bits: of a value on the wire.
        step_s: seconds of a step, where the user knows them; then no step is made.
        links: payload rate in Mbit/s and latency in seconds of links to emulate.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // shards))
    device = step_cost.device_here()
    config = shapes.config_of(model)
    numels, pruned = shapes.sizes(shapes.build(config, "meta"), min_numel)
    tokens = tokens or shapes.context_of(config)
    times = None
    if step_s is None:
        step_cost.check_fits(sum(numels), device)
        times = step_cost.measure_step(
            shapes.build(config, device),
            step_cost.Task(batch, tokens, config.vocab_size, stage, is_bf16),
            k=kept_per_chunk(CODEC_DENSITY),
            islands=islands,
            value_bits=value_bits,
            min_numel=min_numel,
        )
    points = [RatePoint(i + 1, rate * 125e3, late_s) for i, (rate, late_s) in enumerate(links)]
    exchanges = [
        _exchange(numels, pruned, shards, density, decay, islands, value_bits, points, device)
        for density in densities
        for decay in decays
    ]
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "has_kernels": kernels() is not None,
        "numel": sum(numels),
        "tokens": tokens,
        "step": None if times is None else dataclasses.asdict(times),
        "around_s": 0.0 if times is None else _around_s(times, exchanges),
        "exchanges": exchanges,
    }


def _around_s(times: step_cost.StepTime, exchanges: Sequence[dict[str, Any]]) -> float:
    """How much longer an exchange takes after a real step than on its own."""
    alone = [e["codec_s"] for e in exchanges if e["density"] == CODEC_DENSITY]
    return max(0.0, times.codec_s - min(alone)) if alone else 0.0
