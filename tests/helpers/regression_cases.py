"""Two ranks meet what users met: single cases for tests/test_regressions.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_gradprune.errors import GradPruneError
from tests.helpers.ds_main import TinyLM, batch, ds_config, run_steps, start_deepspeed
from tests.helpers.ranks import run_cases

BLOCK = {
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "verify_every_steps": 2,
    "timeout_s": 30,
    "density": {"initial": 0.1, "min": 0.1, "max": 0.1},
}


def make(prune: str, model: nn.Module | None = None, optimizer: Any = None, **extra: Any) -> Any:
    """An engine around a model, pruned in one of the modes; what its user would write."""
    import ds_gradprune

    torch.manual_seed(0)
    model = model or TinyLM()
    config = ds_config(BLOCK | {"prune": prune} | extra.pop("block", {}), **extra)
    if optimizer is not None:
        del config["optimizer"]
        optimizer = optimizer(model.parameters())
    return ds_gradprune.initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config
    )[0]


def evaluate(engine: Any) -> float:
    engine.eval()
    with torch.no_grad():
        loss = float(engine(batch(77, 0, 0)))
    engine.train()
    return loss


def everyone(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except GradPruneError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "accepted"


def rollback(prune: str) -> dict[str, Any]:
    """Weights of step 4 are loaded back after an evaluation at step 12, then while training."""
    engine = make(prune)
    run_steps(engine, 1, 4)
    best = {name: value.clone() for name, value in engine.module.state_dict().items()}
    kept = evaluate(engine)
    run_steps(engine, 5, 12)
    late = evaluate(engine)
    engine.module.load_state_dict(best)
    back = evaluate(engine)
    run_steps(engine, 13, 13)
    after = evaluate(engine)
    engine.module.load_state_dict(best)  # training weights are in place now
    again = evaluate(engine)
    run_steps(engine, 14, 16)
    return {
        "losses": [kept, late, back, after, again],
        "crcs": everyone(engine.gradprune.parameters_crc()),
    }


def set_alike(prune: str) -> dict[str, Any]:
    """All ranks set a bias after the warm-up."""
    engine = make(prune)
    run_steps(engine, 1, 5)
    with torch.no_grad():
        engine.module.norm.bias.data.fill_(3.0)
    engine.eval()
    with torch.no_grad():
        engine(batch(77, 0, 0))
    seen = engine.module.norm.bias.detach().clone()
    engine.train()
    run_steps(engine, 6, 9)
    engine.eval()
    with torch.no_grad():
        engine(batch(77, 0, 0))
    return {
        "seen": bool((seen == 3.0).all()),
        "moved": float((engine.module.norm.bias.detach() - 3.0).abs().max()),
        "crcs": everyone(engine.gradprune.parameters_crc()),
    }


def clamp(how: str) -> dict[str, Any]:
    """Weights are clamped after every step: as documented, or just so."""
    engine = make("update")

    def bound() -> None:
        with torch.no_grad():
            engine.module.up.weight.clamp_(-0.05, 0.05)

    def train() -> None:
        for step in range(1, 10):
            run_steps(engine, step, step)
            if how == "documented":
                for _ in engine.gradprune.weight_sets():
                    bound()
            else:
                bound()

    told = message(train)
    engine.eval()
    if told == "accepted":
        with torch.no_grad():
            engine(batch(77, 0, 0))
    return {"told": told, "most": float(engine.module.up.weight.detach().abs().max())}


class Pair(nn.Module):
    """Two layers of one shape; the second takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.a(x) - y).square().mean() + 0 * self.b.weight.sum()


def swapped_layers(prune: str) -> dict[str, float]:
    """Layer a is trained, then frozen, and b of the same shape is thawed: b must stay."""
    model = Pair()
    for parameter in model.b.parameters():
        parameter.requires_grad_(False)
    engine = make(prune, model, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    b0 = model.b.weight.detach().clone()
    a1 = b0
    for step in range(1, 17):
        if step == 11:
            for parameter in model.a.parameters():
                parameter.requires_grad_(False)
            for parameter in model.b.parameters():
                parameter.requires_grad_(True)
            a1 = model.a.weight.detach().clone()
        generator = torch.Generator().manual_seed(50 * step + dist.get_rank())
        x, y = torch.randn(2, 4, 96, generator=generator)
        engine.backward(engine(x, y))
        engine.step()
    return {
        "b": float((model.b.weight - b0).abs().max()),
        "a": float((model.a.weight - a1).abs().max()),
    }


def longer_warmup(folder: str, verify: int | None) -> dict[str, Any]:
    """A checkpoint of parted islands is resumed with a warm-up that is not over."""
    engine = make("update")
    run_steps(engine, 1, 8)
    engine.save_checkpoint(folder, tag="eight")
    engine = make("update", block={"warmup_steps": 20, "verify_every_steps": verify})
    engine.load_checkpoint(folder, tag="eight")
    run_steps(engine, 9, 24)
    return {
        "losses": everyone(evaluate(engine)),
        "crcs": everyone(engine.gradprune.parameters_crc()),
    }


def stale_state(folder: str) -> dict[str, Any]:
    """A dense run's checkpoint is loaded into an engine that owes something."""
    plain = make("update", block={"enabled": False})
    run_steps(plain, 1, 3)
    plain.save_checkpoint(folder, tag="dense")
    engine = make("gradient")
    run_steps(engine, 1, 6)
    owed = engine.gradprune.pruning.residuals.norm()
    engine.load_checkpoint(folder, tag="dense")
    return {
        "owed": owed > 0.0,
        "owes": engine.gradprune.pruning.residuals.norm(),
        "step": engine.gradprune.loop.step,
    }


def two_backwards(prune: str) -> list[Any]:
    """Two partial losses, two backward calls, one step."""
    engine = make(prune)
    rank = dist.get_rank()
    rows = []
    for step in range(1, 6):
        losses = []
        for part, share in enumerate((0.7, 0.3)):
            loss = share * engine(batch(step, part, rank))
            engine.backward(loss)
            losses.append(float(loss))
        engine.step()
        report = engine.gradprune.report
        wanted = sum(everyone(sum(losses))) / 2
        rows.append((wanted, report.loss, report.wire_bytes, report.dense_bytes))
    return rows


def reference_model() -> list[bool]:
    """A trainer makes a second engine without an optimizer, through deepspeed itself."""
    import deepspeed

    import ds_gradprune

    ds_gradprune.register()
    try:
        engine = deepspeed.initialize(
            model=(model := TinyLM()),
            model_parameters=model.parameters(),
            config=ds_config(BLOCK | {"prune": "update"}),
        )[0]
        config = ds_config(BLOCK | {"prune": "update"})
        del config["optimizer"]
        reference = deepspeed.initialize(model=TinyLM(), config=config)[0]
        reference.eval()
        with torch.no_grad():
            float(reference(batch(1, 0, 0)))
        run_steps(engine, 1, 4)
        return [engine.gradprune.idle, getattr(reference, "gradprune", None) is None]
    finally:
        ds_gradprune.unregister()


def strided() -> str:
    """A parameter that lies in memory otherwise than in order."""
    model = TinyLM()
    model.up.weight = nn.Parameter(model.up.weight.detach().t().contiguous().t())
    return message(lambda: make("update", model))


def run(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """name -> (function of this module, its arguments); results by name, or what went wrong."""
    start_deepspeed()
    return run_cases(cases, globals().__getitem__)
