"""What a training step takes on this host without its wire. Local.

An engine of DeepSpeed steps on random tokens: first alone, then as an island whose peers answer at
once (`exchange_cost.Echo`). So DeepSpeed's own work, the optimizer and what the plug-in does in
every step are in the times, and an exchange is as slow as after a step that has used the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.commands.busy import Others
from ds_gradprune.commands.exchange_cost import Echo, synchronize
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import DataError, MissingDependencyError
from ds_gradprune.wire.all_gather import AllGather

LEAST_STEPS, SECONDS, MOST_SECONDS = 4, 3.0, 15.0
"""Steps are repeated until both are reached, or two steps and the longest time. The first third
does not count."""

STATE_BYTES = 16
"""Per parameter: fp32 weight, gradient and two moments."""

ISLAND_BYTES = 4
"""Per parameter, more: the shared weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is trained.

    Attributes:
        batch: sequences of a micro-step.
        tokens: of a sequence.
        vocabulary: number of different tokens.
        stage: of ZeRO.
        is_bf16: forward and backward in bfloat16, the optimizer in fp32 beside them.
    """

    batch: int
    tokens: int
    vocabulary: int
    stage: int = 0
    is_bf16: bool = False

    def ds_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration: AdamW of torch, and clipping."""
        adam = {"lr": 1e-4, "torch_adam": True}
        return {
            "train_micro_batch_size_per_gpu": self.batch,
            "gradient_accumulation_steps": 1,
            "steps_per_print": None,
            "optimizer": {"type": "AdamW", "params": adam},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": self.stage},
            "bf16": {"enabled": self.is_bf16},
        }


@dataclasses.dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a training step.

    Attributes:
        micro_s: forward and backward of a micro-step.
        optimizer_s: clipping and AdamW.
        steps_s: both together, of the middle half of the steps, the shortest first.
        watch_s: what the plug-in does besides in every step.
        codec_s: of an exchange that follows a step.
        others: cores of this host that others kept busy meanwhile; None: the system does not tell.
    """

    micro_s: float
    optimizer_s: float
    steps_s: tuple[float, ...]
    watch_s: float
    codec_s: float
    others: float | None


def device_here() -> str:
    """Where training would run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes(device: str) -> int:
    """Memory that is left."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def check_fits(numel: int, device: str) -> None:
    """Refuse to train a model here that has no room.

    Raises:
        DataError: it needs more memory than is left.
    """
    needed, free = (STATE_BYTES + ISLAND_BYTES) * numel, free_bytes(device)
    if needed > 0.8 * free:
        raise DataError(
            f"a step of {numel / 1e6:.0f}M parameters needs {needed / 1e9:.1f} GB and more, but "
            f"{free / 1e9:.1f} GB are free on {device}. Give the seconds of a step with --step-s."
        )


def measure_step(
    model: torch.nn.Module, task: Task, *, k: int, islands: int, value_bits: int, min_numel: int
) -> StepTime:
    """Train on random tokens, with AdamW and clipping.

    Args:
        model: a causal language model of transformers, with its memory.
        task: see there.
        k: kept elements per chunk.
        islands: how many exchange.
        value_bits: of a value on the wire.
        min_numel: smaller parameters are sent whole.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """
    with _engine(model, task) as (engine, groups):
        others = Others()
        alone = _repeat(lambda: _step(engine, task))
        busy = others.cores()
        micro_s, optimizer_s = (fmean(middle([row[i] for row in alone])) for i in range(2))
        groups.num_islands = islands
        echo = Echo(islands)

        def step() -> tuple[float, float]:
            echo.spent_s = 0.0
            whole_s = sum(_step(engine, task)) - echo.spent_s
            return whole_s, engine.gradprune.report.codec_time_s - echo.spent_s

        pinned = {name: k / CHUNK_NUMEL for name in ("initial", "min", "max")}
        block = {"density": pinned, "value_bits": value_bits, "min_numel": min_numel}
        with _as_island(engine, groups, echo, block):
            rows = _repeat(step)
    whole_s, codec_s = (fmean(middle([row[i] for row in rows])) for i in range(2))
    watch_s = whole_s - codec_s - micro_s - optimizer_s
    steps_s = middle([micro + update for micro, update in alone])
    return StepTime(micro_s, optimizer_s, steps_s, max(0.0, watch_s), codec_s, busy)


def middle(values: Sequence[float]) -> tuple[float, ...]:
    """The middle half, in order: what another program does for a moment is not in its mean."""
    quarter = len(values) // 4
    return tuple(sorted(values)[quarter : len(values) - quarter])


def _repeat(step: Callable[[], tuple[float, float]]) -> list[tuple[float, float]]:
    """Steps until enough is known, without the first, which allocate and find their threads."""
    rows = list[tuple[float, float]]()
    began = time.perf_counter()
    while len(rows) < LEAST_STEPS or time.perf_counter() - began < SECONDS:
        if len(rows) > 1 and time.perf_counter() - began > MOST_SECONDS:
            break
        rows.append(step())
    return rows[-(-len(rows) // 3) :]


def _step(engine: Any, task: Task) -> tuple[float, float]:
    """Seconds of forward and backward, and of what follows."""
    device = engine.device
    data = torch.randint(0, task.vocabulary, (task.batch, task.tokens), device=device)
    synchronize(device)
    start = time.perf_counter()
    engine.backward(engine(input_ids=data, labels=data).loss)
    synchronize(device)
    middle = time.perf_counter()
    engine.step()
    synchronize(device)
    return middle - start, time.perf_counter() - middle


@contextlib.contextmanager
def _engine(model: torch.nn.Module, task: Task) -> Iterator[tuple[Any, Any]]:
    """An engine of one rank, and its process groups, those of an island."""
    if device_here() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ModuleNotFoundError as exc:
        if exc.name != "deepspeed":
            raise
        raise MissingDependencyError(
            "doctor measures a step of DeepSpeed, which is not installed. Run: pip install "
            '"ds_gradprune[deepspeed]", or give the seconds of a step with --step-s.'
        ) from exc
    from ds_gradprune.deepspeed.build_locks import SHM_OP
    from ds_gradprune.deepspeed.groups import Groups, kept

    deepspeed.ops.__compatible_ops__[SHM_OP] = False  # for inference alone, and built for a minute
    backend = get_accelerator().communication_backend_name()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/s", rank=0, world_size=1)
        try:
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
            groups = Groups()
            with kept():
                engine, *_ = deepspeed.initialize(
                    model=model,
                    model_parameters=list(model.parameters()),
                    config=task.ds_config(),
                    mpu=groups,
                )
            engine.train(True)
            yield engine, groups
            engine.destroy()
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _as_island(engine: Any, groups: Any, echo: Echo, block: Mapping[str, Any]) -> Iterator[None]:
    """The engine is island 0, and exchanges after every step with peers that answer at once."""
    from ds_gradprune.deepspeed.checkpoint import Seat
    from ds_gradprune.deepspeed.clock import Clock
    from ds_gradprune.deepspeed.island_handle import IslandHandle
    from ds_gradprune.deepspeed.shards import make_shards

    steady = {"warmup_steps": 0, "ramp_steps": 0, "verify_every_steps": None}
    config = GradientPruningConfig.model_validate(steady | dict(block))
    shards = make_shards(engine, groups, config.min_numel)
    seat = Seat(echo, 0, groups.num_islands)
    handle = IslandHandle(engine, config, AllGather(echo), Clock(), seat, groups, shards)
    engine.gradprune = handle
    try:
        yield
    finally:
        handle.detach()
