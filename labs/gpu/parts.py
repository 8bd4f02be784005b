"""What is checked, in which order, by how many processes, for how long. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL, BITS, LARGE = "labs.gpu.small", "labs.gpu.bits", "labs.gpu.large"
PROFILE = "labs.gpu.profile"

NCCL_ON_ONE_DEVICE = {
    # nccl refuses a second rank on a device unless it takes it for another host's.
    "NCCL_HOSTID": "host{rank}",
    "NCCL_DEBUG": "WARN",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One function, called in every process of its part.

    Attributes:
        function: "module:name".
        arguments: for it.
        is_tiny: also made at the tiny size.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    is_tiny: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Cases that share their processes.

    Attributes:
        cases: by name, in order; empty: `command` is run instead.
        limit_s: longest time for all of them.
        ranks: processes.
        backend: of torch.distributed; None: the process is alone and opens none.
        alone: nothing else may run beside it, because it measures time.
        optional: a failure is told, but does not fail the check.
        env: for its processes; {rank} stands for the rank.
        command: arguments of Python.
    """

    cases: dict[str, Case] = field(default_factory=dict)
    limit_s: float = 90.0
    ranks: int = 2
    backend: str | None = "gloo"
    alone: bool = False
    optional: bool = False
    env: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def _shares(stage: int, dtype: str = "bf16", tiny: bool = False, **more: Any) -> Case:
    return Case(f"{SMALL}:shares", {"stage": stage, "dtype": dtype} | more, tiny)


def _gradients(stage: int, dtype: str = "bf16", tiny: bool = False, **more: Any) -> Case:
    return Case(f"{SMALL}:gradients", {"stage": stage, "dtype": dtype} | more, tiny)


def _resumes(stage: int, dtype: str = "bf16", tiny: bool = False, **more: Any) -> Case:
    arguments = {"stage": stage, "dtype": dtype, "folder": "{folder}"} | more
    return Case(f"{SMALL}:resumes", arguments, tiny)


def _run(model: str, stage: int, way: str, steps: int, tiny: bool = False, **more: Any) -> Case:
    arguments = {"model": model, "stage": stage, "way": way, "steps": steps, "tiny": "{tiny}"}
    return Case(f"{LARGE}:run", arguments | more, tiny)


def _profile(stage: int, way: str, tiny: bool = False) -> Case:
    arguments = {"model": "gpt2", "stage": stage, "way": way, "tiny": "{tiny}"}
    return Case(f"{PROFILE}:run", arguments | {"folder": "{folder}"}, tiny)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
STAGES = (0, 1, 2, 3)

PARTS: dict[str, Part] = {
    "machine": Part(
        {"machine": Case(f"{BITS}:machine", {"size_bytes": "{size}"}, True)},
        limit_s=60,
        ranks=1,
        backend=None,
        alone=True,
    ),
    "bits": Part(
        {
            "select and codec": Case(f"{BITS}:selected", is_tiny=True),
            "move": Case(f"{BITS}:moved", is_tiny=True),
            "exchanges": Case(f"{BITS}:exchanged", is_tiny=True),
        },
        limit_s=60,
        ranks=1,
        backend=None,
    ),
    "exact": Part(
        {
            f"ZeRO-{stage} {dtype}": Case(
                f"{SMALL}:exact", {"stage": stage, "dtype": dtype}, (stage, dtype) == (2, "bf16")
            )
            for dtype in ("fp32", "bf16")
            for stage in STAGES
        }
    ),
    "islands": Part(
        {
            f"ZeRO-{stage} {dtype}": _shares(stage, dtype, (stage, dtype) == (3, "bf16"))
            for dtype in ("fp32", "bf16")
            for stage in STAGES
        }
        | {"ZeRO-2 fp16": _shares(2, "fp16")}
    ),
    "ways": Part(
        {
            "overlap ZeRO-0": _shares(0, overlap="auto"),
            "overlap ZeRO-2": _shares(2, tiny=True, overlap="auto"),
            "overlap ZeRO-3": _shares(3, overlap="auto"),
            "every 4 ZeRO-0 fp32": _shares(0, "fp32", steps=16, sync_every=4),
            "every 4 ZeRO-2": _shares(2, steps=16, sync_every=4),
            "every 4 overlap ZeRO-3": _shares(3, steps=16, sync_every=4, overlap="auto"),
            "shared on device ZeRO-2": _shares(2, shared_device="device"),
            "shared on CPU ZeRO-0": _shares(0, shared_device="cpu"),
            "shared on CPU ZeRO-3 fp32": _shares(3, "fp32", shared_device="cpu"),
            "shared on CPU, momentum": _shares(2, shared_device="cpu", slow_momentum=1.0),
            "momentum ZeRO-0": _shares(0, slow_momentum=1.0),
            "2 bit ZeRO-1": _shares(1, value_bits=2),
            "32 bit ZeRO-1": _shares(1, value_bits=32),
            "unpruned warm-up ZeRO-3": _shares(3, warmup="unpruned"),
            "owners ZeRO-2": _shares(2, exchange="owner_reduce"),
            "owners overlap ZeRO-0": _shares(0, exchange="owner_reduce", overlap="auto"),
            "optimizer on CPU ZeRO-2": _shares(2, extra=OFFLOAD),
            "optimizer on CPU ZeRO-3": _shares(3, extra=OFFLOAD),
        }
    ),
    "gradients": Part(
        {
            f"ZeRO-{stage} {dtype}": _gradients(stage, dtype, (stage, dtype) == (2, "bf16"))
            for dtype in ("fp32", "bf16")
            for stage in (0, 1, 2)
        }
        | {"owners ZeRO-2": _gradients(2, exchange="owner_reduce")}
    ),
    "checkpoints": Part(
        {
            "the same run twice": Case(f"{SMALL}:repeats", {"stage": 2, "dtype": "bf16"}),
            "ZeRO-0 fp32": _resumes(0, "fp32"),
            "ZeRO-0 bf16": _resumes(0),
            "ZeRO-1 bf16": _resumes(1),
            "ZeRO-2 bf16": _resumes(2, tiny=True),
            "ZeRO-3 bf16": _resumes(3),
            "momentum ZeRO-2": _resumes(2, slow_momentum=1.0),
            "momentum, shared on CPU": _resumes(2, slow_momentum=1.0, shared_device="cpu"),
            "reset ZeRO-3": _resumes(3, residual="reset"),
        }
    ),
    "pairs": Part(
        {
            f"2 islands of 2 ranks ZeRO-{stage}": _shares(stage, ranks=2, steps=8)
            for stage in (0, 2, 3)
        },
        ranks=4,
    ),
    "nccl_alone": Part({"one rank": Case(f"{SMALL}:alone")}, limit_s=60, ranks=1, backend="nccl"),
    "kernels": Part(
        command=("-m", "labs.kernels", "--device", "cuda"), limit_s=60, alone=True, optional=True
    ),
    "models": Part(
        {
            "gpt2 ZeRO-0 dense": _run("gpt2", 0, "dense", 60),
            "gpt2 ZeRO-0 pruned": _run("gpt2", 0, "pruned", 60),
            "gpt2 ZeRO-2 dense": _run("gpt2", 2, "dense", 60),
            "gpt2 ZeRO-2 pruned": _run("gpt2", 2, "pruned", 60, True),
            "gpt2 ZeRO-2 hidden": _run("gpt2", 2, "hidden", 20),
            "100 Mbit/s pruned": _run("gpt2", 0, "pruned", 8, rate_mbit=100.0, learns=False),
            "1000 Mbit/s whole": _run("gpt2", 0, "whole", 3, rate_mbit=1000.0, learns=False),
            "smollm2 ZeRO-2 dense": _run("smollm2", 2, "dense", 15),
            "smollm2 ZeRO-2 pruned": _run("smollm2", 2, "pruned", 15),
            "smollm2 ZeRO-3 pruned": _run("smollm2", 3, "pruned", 15, True),
            "gpt2 ZeRO-2 every 4": _run("gpt2", 2, "reset", 24),
            "gpt2 ZeRO-2 shared on CPU": _run("gpt2", 2, "cpu", 10),
            "100 Mbit/s hidden": _run("gpt2", 0, "hidden", 8, True, rate_mbit=100.0, learns=False),
            "gpt2 ZeRO-3 dense": _run("gpt2", 3, "dense", 10),
            "gpt2 ZeRO-3 pruned": _run("gpt2", 3, "pruned", 10),
            "100 Mbit/s whole": _run("gpt2", 0, "whole", 2, rate_mbit=100.0, learns=False),
        },
        limit_s=240,
        alone=True,
    ),
    "profile": Part(
        {
            "ZeRO-0 pruned": _profile(0, "pruned", True),
            "ZeRO-0 dense": _profile(0, "dense"),
            "ZeRO-2 hidden": _profile(2, "hidden"),
        },
        limit_s=80,
        alone=True,
        optional=True,
    ),
    "tests": Part(
        command=("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/bucket"),
        limit_s=60,
        optional=True,
    ),
    "nccl": Part(
        {
            "ZeRO-2 bf16": _shares(2),
            "ZeRO-3 bf16": _shares(3),
            "ZeRO-0 bf16": _shares(0),
            "gradients ZeRO-1 bf16": _gradients(1),
        },
        limit_s=50,
        backend="nccl",
        alone=True,
        optional=True,
        env=NCCL_ON_ONE_DEVICE,
    ),
}
