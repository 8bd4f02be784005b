"""Single cases of one DeepSpeed rank that is an island, for tests/deepspeed/test_island_handle.py.

Longer than 300 lines: all cases that one start of ranks runs in a row.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_gradprune.errors import GradPruneError
from tests.helpers.ds_main import (
    BATCH,
    LENGTH,
    TinyLM,
    batch,
    crc,
    ds_config,
    make_engine,
    run_steps,
    start_deepspeed,
)

BLOCK = {
    "prune": "update",
    "warmup": "dense",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}
DENSE = {"warmup_steps": 0, "density": {"initial": 1.0, "min": 1.0, "max": 1.0}}
SCHEDULE = {
    "type": "WarmupLR",
    "params": {"warmup_max_lr": 2e-3, "warmup_num_steps": 40, "warmup_type": "linear"},
}


def islands(
    steps: int, block: dict[str, Any], first: int = 1, engine: Any = None, **options: Any
) -> dict[str, Any]:
    """Train islands; after every step the crc of what is shared, and of the own weights."""
    engine = engine or make_engine(BLOCK | block, "islands", **options)
    shared: list[int] = []
    draws: list[float] = []

    def on_step(_: int) -> None:
        shared.append(engine.gradprune.parameters_crc())
        draws.append(float(torch.rand(1)))

    trace: dict[str, Any] = run_steps(engine, first, steps, on_step)
    return trace | {
        "shared": shared,
        "draws": draws,
        "lr": engine.get_lr(),
        "samples": engine.global_samples,
        "bytes": engine.gradprune.held_bytes,
    }


def save_islands_at(folder: str, at: list[int], steps: int, **options: Any) -> dict[str, Any]:
    """An unbroken run that leaves checkpoints."""
    block = options.pop("block")
    engine = make_engine(BLOCK | block, "islands", scheduler=SCHEDULE, **options)
    whole: dict[str, Any] = {}
    for step in range(1, steps + 1):
        part = islands(step, block, first=step, engine=engine)
        for key, value in part.items():
            whole[key] = whole.get(key, []) + value if isinstance(value, list) else value
        if step in at:
            engine.save_checkpoint(folder, tag=f"step{step}")
    return whole


def resume_islands_at(folder: str, at: int, steps: int, **options: Any) -> dict[str, Any]:
    """A fresh process, with other weights, continues from the checkpoint."""
    block = options.pop("block")
    torch.manual_seed(99)
    engine = make_engine(BLOCK | block, "islands", scheduler=SCHEDULE, **options)
    engine.load_checkpoint(folder, tag=f"step{at}")
    return islands(steps, block, first=at + 1, engine=engine)


def checkpoint_files(folder: str) -> dict[str, Any]:
    """What lies in a checkpoint, and whose weights the model's file holds."""
    engine = make_engine(BLOCK, "islands")
    run_steps(engine, 1, 6)
    engine.save_checkpoint(folder, tag="six")
    files = sorted(path.name for path in (Path(folder) / "six").iterdir())
    saved = torch.load(
        Path(folder) / "six" / "mp_rank_00_model_states.pt", weights_only=False, map_location="cpu"
    )["module"]
    with engine.gradprune.shared_weights():
        shared = {name: value.clone() for name, value in engine.module.state_dict().items()}
    own = dict(engine.module.named_parameters())
    with engine.gradprune.shared_weights():
        engine.save_checkpoint(folder, tag="inside")
    name = f"gradient_pruning_island_{dist.get_rank():05d}_shard_00000.pt"
    states = [
        torch.load(Path(folder) / tag / name, weights_only=True)["pruning"]["island"]["own"]
        for tag in ("six", "inside")
    ]
    return {
        "inside": all(
            torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True)
        ),
        "files": files,
        "is_shared": all(torch.equal(saved[name], shared[name]) for name in shared),
        "is_own": all(torch.equal(saved[name], own[name]) for name in own),
    }


def foreign_checkpoints(folder: str) -> dict[str, Any]:
    """Checkpoints of a plain run and of a run with pruned gradients, loaded by islands."""
    plain = make_engine(None, "plain")
    run_steps(plain, 1, 3)
    plain.save_checkpoint(folder, tag="plain")
    gradient = make_engine({"prune": "gradient", "warmup_steps": 1}, "attach")
    run_steps(gradient, 1, 3)
    gradient.save_checkpoint(folder, tag="gradient")
    engine = make_engine(BLOCK, "islands")
    run_steps(engine, 1, 5)
    before = crc(engine)
    message = _message(lambda: engine.load_checkpoint(folder, tag="gradient"))
    untouched = crc(engine) == before and engine.global_steps == 5
    logging.getLogger("ds_gradprune").setLevel(logging.ERROR)
    engine = make_engine(BLOCK, "islands")
    engine.load_checkpoint(folder, tag="plain")
    return {
        "message": message,
        "untouched": untouched,
        "plain_loaded": crc(engine) == crc(plain),
        "steps": engine.gradprune.session.step,
    }


def weights_in_view() -> dict[str, Any]:
    """Which weights the model holds when it trains, evaluates and is saved."""
    engine = make_engine(BLOCK, "islands")
    run_steps(engine, 1, 6)
    handle, tokens = engine.gradprune, batch(7, 0, 0)
    own = crc(engine)
    answers: dict[str, Any] = {}
    with handle.shared_weights():
        shared = crc(engine)
        answers["backward"] = _message(lambda: engine.backward(engine(tokens)))
        answers["step"] = _message(engine.step)
        answers["load"] = _message(lambda: engine.load_checkpoint("nowhere", tag="x"))
    answers["own_after"] = crc(engine) == own
    with torch.no_grad():
        engine(tokens)
    answers["own_in_training_without_gradients"] = crc(engine) == own
    engine.eval()
    engine(tokens)
    answers["own_in_evaluation_with_gradients"] = crc(engine) == own
    with torch.no_grad():
        loss = float(engine(tokens))
    answers["shared_in_evaluation"] = crc(engine) == shared
    with torch.inference_mode():
        answers["inference_alike"] = float(engine.module(tokens)) == loss
    engine.train()
    engine(tokens)
    answers["own_in_training"] = crc(engine) == own
    state = engine.module.state_dict()
    copy = TinyLM()
    copy.load_state_dict(state)
    answers["state_dict_is_shared"] = float(copy.eval()(tokens)) == loss
    answers["loss"] = loss
    return answers


def alone() -> dict[str, Any]:
    """One rank: no islands, but the same calls."""
    import ds_gradprune

    start_deepspeed()
    model = TinyLM()
    engine = ds_gradprune.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config(BLOCK)
    )[0]
    run_steps(engine, 1, 3)
    before = crc(engine)
    with engine.gradprune.shared_weights():
        same = crc(engine) == before == engine.gradprune.parameters_crc()
    answers = {"idle": engine.gradprune.idle, "same": same, "report": engine.gradprune.report}
    ds_gradprune.detach(engine)
    return answers


def evaluations_change_nothing(evaluate: bool) -> list[int]:
    """Train with evaluations, savings of the model and open contexts in between, or without."""
    engine = make_engine(BLOCK | {"sync_every": 2}, "islands", gas=2)
    crcs = []
    for step in range(1, 9):
        for micro_step in range(2):
            if evaluate:
                engine.eval()
                with torch.no_grad():
                    engine(batch(step, 0, 0))
                engine.train()
            engine.backward(engine(batch(step, micro_step, dist.get_rank())))
            if evaluate:
                engine.module.state_dict()
                with engine.gradprune.shared_weights(), engine.gradprune.shared_weights():
                    pass
            engine.step()
        engine.train()
        engine.module(batch(1, 0, 0))  # own weights in view
        crcs.append(crc(engine))
    return crcs


class Odd(nn.Module):
    """Buffers, a frozen layer, a layer used in even steps only, a tied weight, a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = TinyLM()
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)
        self.rare = nn.Linear(64, 100)
        self.tied = self.lm.embed
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.rand(3) > 0.5)
        self.register_buffer("noise", torch.rand(5), persistent=False)

    def forward(self, tokens: torch.Tensor, rare: bool) -> torch.Tensor:
        self.seen.add_(1 + dist.get_rank())
        loss: torch.Tensor = (self.lm(tokens) * self.gain).squeeze()
        hidden = self.frozen(self.lm.embed(tokens))
        return loss + 1e-2 * self.rare(hidden).square().mean() if rare else loss


def odd_model(folder: str) -> dict[str, Any]:
    """Every rank draws other weights; then islands train a model with everything uncommon."""
    start_deepspeed()
    import deepspeed

    import ds_gradprune

    def build() -> Any:
        torch.manual_seed(10 + dist.get_rank())
        model = Odd()
        return ds_gradprune.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(BLOCK)
        )[0]

    def step(engine: Any, number: int) -> None:
        loss = engine(batch(number, 0, dist.get_rank()), rare=number % 2 == 0)
        engine.backward(loss)
        engine.step()

    engine = build()
    answers: dict[str, Any] = {
        "equal": _crc_of([*engine.module.parameters(), *engine.module.buffers()]),
        "groups": deepspeed.utils.groups.mpu is None,
    }
    frozen = engine.module.frozen.weight.clone()
    for number in range(1, 10):
        step(engine, number)
    engine.save_checkpoint(folder, tag="odd")
    answers["seen"] = int(engine.module.seen)
    answers["frozen"] = torch.equal(engine.module.frozen.weight, frozen)
    answers["shared"] = engine.gradprune.parameters_crc()
    numel = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    answers["bytes"] = engine.gradprune.held_bytes == 4 * numel
    step(engine, 10)
    crcs = [crc(engine)]
    again = build()
    again.load_checkpoint(folder, tag="odd")
    answers["seen_again"] = int(again.module.seen)
    step(again, 10)
    crcs.append(crc(again))
    answers["resumed"] = crcs[0] == crcs[1]
    return answers


def like_one_rank(**options: Any) -> float:
    """Islands with equal data, a dense exchange and factor 1 against DeepSpeed on one rank's data.

    Returns:
        The largest difference of the weights, in units of the learning rate.
    """
    block = BLOCK | DENSE | {"update_scale": 1.0}
    options = {"scheduler": SCHEDULE, "gradient_clipping": 0.1, "gas": 2} | options
    engines = [make_engine(block, "islands", **options), make_engine(None, "plain", **options)]
    for engine in engines:
        for number in range(1, 9):
            for micro_step in range(2):
                engine.backward(engine(batch(number, micro_step, 0)))
                engine.step()
    pairs = zip(*(engine.module.parameters() for engine in engines), strict=True)
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs) / 2e-3


def batch_arithmetic() -> list[Any]:
    """Configurations of the whole job, what DeepSpeed makes of them, and what each island reads."""
    start_deepspeed()
    import ds_gradprune

    answers: list[Any] = []
    rows = [torch.full((LENGTH,), i) for i in range(64)]
    for sizes in (
        {"train_batch_size": 8 * BATCH, "train_micro_batch_size_per_gpu": BATCH},
        {"train_batch_size": 8 * BATCH, "gradient_accumulation_steps": 2},
        {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 3},
    ):
        config = ds_config(BLOCK)
        for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            del config[name]
        model = TinyLM()
        engine, _, loader, _ = ds_gradprune.initialize(
            model=model,
            model_parameters=model.parameters(),
            training_data=rows,
            config=config | sizes,
        )
        numbers = [int(row[0]) for rows_ in loader for row in rows_]
        run_steps(engine, 1, 3)
        answers.append(
            {
                "train": engine.train_batch_size(),
                "micro": engine.train_micro_batch_size_per_gpu(),
                "gas": engine.gradient_accumulation_steps(),
                "samples": engine.global_samples,
                "rows": sorted(numbers),
            }
        )
    return answers


def two_engines() -> list[bool]:
    """Islands and an engine with pruned gradients side by side: neither disturbs the other."""
    gradient = BLOCK | {"prune": "gradient"}
    alone = [
        run_steps(make_engine(gradient, "attach"), 1, 6)["crcs"],
        run_steps(make_engine(BLOCK, "islands"), 1, 6)["crcs"],
    ]
    engines = [make_engine(gradient, "attach"), make_engine(BLOCK, "islands")]
    beside: list[list[int]] = [[], []]
    for step in range(1, 7):
        for engine, crcs in zip(engines, beside, strict=True):
            crcs += run_steps(engine, step, step)["crcs"]
    return [one == other for one, other in zip(alone, beside, strict=True)]


def sick_island(bf16: bool, warmup_steps: int = 2) -> dict[str, Any]:
    """Rank 1's loss is nan in step 5."""
    engine = make_engine(BLOCK | {"warmup_steps": warmup_steps}, "islands", bf16=bf16)
    run_steps(engine, 1, 4)
    before = engine.gradprune.parameters_crc()
    loss = engine(batch(5, 0, dist.get_rank()))

    def step() -> None:
        engine.backward(loss * float("nan") if dist.get_rank() else loss)
        engine.step()

    message = _message(step)
    answers = {
        "message": message,
        "shared_same": engine.gradprune.parameters_crc() == before,
        "skipped": engine.skipped_steps,
    }
    if bf16:
        answers["nonfinite"] = engine.gradprune.report.nonfinite
        answers["later"] = run_steps(engine, 6, 8)["reports"][-1]["loss"]
    return answers


def perturbed() -> str:
    """One bit of the shared weights differs on rank 1; the next hash finds it."""
    engine = make_engine(BLOCK | {"verify_every_steps": 3, "sync_every": 2}, "islands")
    run_steps(engine, 1, 4)
    if dist.get_rank() == 1:
        engine.gradprune.islands.weights.stores[0][7] += 1e-6
    return _message(lambda: run_steps(engine, 5, 10))


def detached() -> dict[str, Any]:
    """After detach the model has the shared weights, and nothing of ours is left."""
    from deepspeed.comm import comm

    import ds_gradprune
    from ds_gradprune.deepspeed.initialize import create

    start_deepspeed()
    torch.manual_seed(0)
    model = TinyLM()
    engine = create(model=model, model_parameters=model.parameters(), config=ds_config(BLOCK))[0]
    backend, before = comm.cdb, dict(engine.__dict__)
    hooks = len(model._forward_pre_hooks), len(model._state_dict_pre_hooks)
    ds_gradprune.attach(engine)
    run_steps(engine, 1, 6)
    ds_gradprune.detach(engine)
    left = [name for name in engine.__dict__ if name not in before and name != "gradprune"]
    left += [] if comm.cdb is backend else ["cdb"]
    now = len(model._forward_pre_hooks), len(model._state_dict_pre_hooks)
    answers = {"left": left, "hooks": now == hooks, "crc": crc(engine)}
    run_steps(engine, 7, 8)
    return answers


def island_refusals() -> dict[str, str]:
    """Each thing that islands do not support, and what is said about it."""
    deepspeed = start_deepspeed()
    import ds_gradprune
    from ds_gradprune.deepspeed.groups import Groups

    def start(**arguments: Any) -> str:
        config = ds_config(BLOCK, **arguments.pop("extra", {}))
        return _message(
            lambda: ds_gradprune.initialize(**({"model": TinyLM(), "config": config} | arguments))
        )

    plain = deepspeed.initialize(model=TinyLM(), config=ds_config(BLOCK))[0]
    return {
        "attach": _message(lambda: ds_gradprune.attach(plain)),
        "mpu": start(mpu=Groups(1)),
        "sequence": start(extra={"sequence_parallel_size": 2}),
        "bf16 weights": start(model=TinyLM().bfloat16()),
    }


def _crc_of(tensors: list[torch.Tensor]) -> int:
    import google_crc32c

    value = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        value = google_crc32c.extend(value, raw)
    return int(value)


def _message(action: Any) -> str:
    try:
        action()
    except GradPruneError as exc:
        return str(exc)
    return "accepted"
