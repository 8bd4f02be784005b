"""Pruned gradients that leave while backward goes on, beside those that leave after it.

Longer than 300 lines: all cases that one start of ranks runs in a row.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_gradprune.errors import GradPruneError
from tests.helpers import ds_main
from tests.helpers.ds_main import VOCAB, TinyLM, batch, crc, ds_config
from tests.helpers.ranks import run_cases
from tests.helpers.shard_bench import start_deepspeed
from tests.helpers.zero_gradient_bench import KINDS, PRUNED, make, train

STEPS = 6
BUCKET_NUMEL = 4096
"""Elements of a bucket at stage 0, so that a matrix lies in several."""

WHOLE: dict[str, dict[str, Any]] = {
    "fp32": {"gas": 2},
    "clipped": {"gas": 2, "gradient_clipping": 0.5, "gradient_predivide_factor": 4.0},
    "prescaled": {"prescale_gradients": True},
    "bf16-wire": {"communication_data_type": "bf16"},
    "bf16": {"bf16": True},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
"""Engines at stage 0."""

ZERO = [name for name in KINDS if "unmanaged" not in name]
BLOCKS: dict[str, dict[str, Any]] = {
    "owners": {"exchange": "owner_reduce"},
    "median": {"clip_to_median": 0.5},
    "two-bits": {"value_bits": 2},
    "no-feedback": {"error_feedback": False},
}
Run = Callable[[Any], dict[str, Any]]


class Checkpointed(TinyLM):
    """Its MLP is computed twice; reentrant, a tied weight gets its gradient in two parts."""

    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self._is_reentrant = is_reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens[:, :-1])
        hidden = checkpoint(self._logits, hidden, use_reentrant=self._is_reentrant)
        return nn.functional.cross_entropy(hidden.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(hidden + self.down(torch.relu(self.up(hidden))))
        return hidden @ self.embed.weight.T


def whole_engine(block: dict[str, Any], model: nn.Module | None = None, **options: Any) -> Any:
    """An engine at stage 0 whose gradients are cut into small buckets."""
    import deepspeed

    from ds_gradprune.deepspeed.attach import Clock, attach
    from tests.helpers.ranks import VirtualClock

    torch.manual_seed(0)
    model = model or TinyLM()
    config = ds_config(block, **options)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[
        0
    ]
    clock = VirtualClock()
    attach(engine, clock=Clock(clock.now_s, clock.sleep))
    engine.gradprune.pruning._bucket_numel = BUCKET_NUMEL
    return engine


def compared(run: Run, engine_of: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A run without overlap and one with it: what differs, and how many messages left early."""
    answers: list[dict[str, Any]] = []
    for overlap in (False, True):
        torch.manual_seed(0)
        engine = engine_of(PRUNED | {"overlap": overlap})
        with early_messages(engine) as early, spoken() as said:
            answer = run(engine)
        residuals = engine.gradprune.pruning.residuals.state_dict()
        answer["residuals"] = {key: flat.tolist() for key, flat in sorted(residuals.items())}
        answer["owners"] = str(engine.gradprune.channel.state_dict())
        answer["reported"] = [report["loss"] for report in answer.pop("reports")]
        answers.append(answer)
        engine.gradprune.detach()
    off, on = answers
    differs = [key for key in off if off[key] != on[key]]
    owed = any(map(any, on["residuals"].values()))
    return {"differs": differs, "crcs": on["crcs"], "early": early, "owed": owed, "said": said}


@contextmanager
def early_messages(engine: Any) -> Iterator[list[int]]:
    """The steps of the messages that were made during a backward."""
    steps: list[int] = []
    handle = engine.gradprune
    load = handle.pruning.load

    def looked(*args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            steps.append(handle.loop.exchange_step)
        return load(*args, **kwargs)

    handle.pruning.load = looked
    yield steps
    del handle.pruning.load


@contextmanager
def spoken() -> Iterator[list[str]]:
    """What our loggers say."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_gradprune")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def steps_of(engine: Any) -> dict[str, Any]:
    return dict(ds_main.run_steps(engine, 1, STEPS))


def whole(name: str) -> dict[str, Any]:
    """A kind of engine at stage 0."""
    return compared(steps_of, lambda block: whole_engine(block, **WHOLE[name]))


def zero(name: str) -> dict[str, Any]:
    """A kind of engine at stages 1 and 2."""
    return compared(lambda engine: dict(train(engine, 1, 5)), lambda b: make(b, **KINDS[name]))


def block(name: str, stage: int) -> dict[str, Any]:
    """Another setting of ours."""
    extra = BLOCKS[name]
    if not stage:
        return compared(steps_of, lambda block: whole_engine(block | extra, gas=2))
    return compared(lambda e: dict(train(e, 1, 5)), lambda b: make(b | extra, stage=stage))


def checkpointed(is_reentrant: bool) -> dict[str, Any]:
    """Gradient checkpointing of a model with a tied weight."""
    return compared(steps_of, lambda block: whole_engine(block, Checkpointed(is_reentrant), gas=2))


def hooked() -> dict[str, Any]:
    """Somebody's own hook changes a gradient after it was complete."""

    def halve(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    def engine_of(block: dict[str, Any]) -> Any:
        engine = whole_engine(block)
        engine.module.up.weight.register_post_accumulate_grad_hook(halve)
        return engine

    return compared(steps_of, engine_of)


def partial_losses() -> dict[str, Any]:
    """Two backwards in a step, each of which DeepSpeed reduces."""

    def run(engine: Any) -> dict[str, Any]:
        def twice(step: int) -> list[float]:
            losses = [engine(batch(step, part, dist.get_rank())) for part in (0, 1)]
            for loss in losses:
                engine.backward(loss / 2)
            engine.step()
            return [float(loss.detach()) for loss in losses]

        return by_hand(engine, twice)

    return compared(run, whole_engine)


def unsynced() -> dict[str, Any]:
    """A backward under no_sync, and the one at the boundary."""

    def run(engine: Any) -> dict[str, Any]:
        def two(step: int) -> list[float]:
            with engine.no_sync():
                first = engine(batch(step, 0, dist.get_rank()))
                engine.backward(first)
            engine.step()
            second = engine(batch(step, 1, dist.get_rank()))
            engine.backward(second)
            engine.step()
            return [float(first.detach()), float(second.detach())]

        return by_hand(engine, two)

    return compared(run, lambda block: whole_engine(block, gas=2))


def thawed() -> dict[str, Any]:
    """A layer is frozen for two steps."""

    def run(engine: Any) -> dict[str, Any]:
        def one(step: int) -> list[float]:
            engine.module.up.requires_grad_(step not in (4, 5))
            loss = engine(batch(step, 0, dist.get_rank()))
            engine.backward(loss)
            engine.step()
            return [float(loss.detach())]

        return by_hand(engine, one, steps=8)

    return compared(run, whole_engine)


def by_hand(
    engine: Any, step_of: Callable[[int], list[float]], steps: int = STEPS
) -> dict[str, Any]:
    """Steps of a loop of one's own."""
    trace: dict[str, Any] = {"losses": [], "crcs": [], "reports": []}
    for step in range(1, steps + 1):
        trace["losses"].append(step_of(step))
        trace["crcs"].append(crc(engine))
        trace["reports"].append({"loss": engine.gradprune.report.loss})
    return trace


def overflow(stage: int) -> dict[str, Any]:
    """fp16: rank 1's gradients are infinite in step 4, which all skip."""
    half = {"enabled": True, "initial_scale_power": 8}

    def run(engine: Any) -> dict[str, Any]:
        def one(step: int) -> list[float]:
            loss = engine(batch(step, 0, dist.get_rank()))
            spoilt = step == 4 and dist.get_rank() == 1
            before = engine.gradprune.residual_norm()
            engine.backward(loss * float("inf") if spoilt else loss)
            engine.step()
            kept = step != 4 or before == engine.gradprune.residual_norm() > 0.0
            return [float(loss.detach()), float(engine.skipped_steps), float(kept)]

        return by_hand(engine, one)

    if not stage:
        return compared(run, lambda block: whole_engine(block, fp16=half))
    zero = {"stage": stage, "reduce_bucket_size": BUCKET_NUMEL}
    return compared(run, lambda block: whole_engine(block, fp16=half, zero_optimization=zero))


def poisoned() -> list[Any]:
    """fp32 at stage 0: a gradient that is not finite ends the run before the step, on all ranks."""
    engine = whole_engine(PRUNED | {"overlap": True})
    ds_main.run_steps(engine, 1, 4)
    before, owed = crc(engine), engine.gradprune.residual_norm()
    message = "not noticed"
    try:
        loss = engine(batch(5, 0, dist.get_rank()))
        engine.backward(loss * float("inf") if dist.get_rank() else loss)
        engine.step()
    except GradPruneError as exc:
        message = str(exc)
    same = before == crc(engine) and owed == engine.gradprune.residual_norm() > 0.0
    engine.gradprune.detach()
    return [message, same]


def interrupted(stage: int) -> str:
    """A backward fails after buckets have left, and the script goes on with the next batch."""
    zero = {"stage": stage, "reduce_bucket_size": BUCKET_NUMEL}
    options = {"zero_optimization": zero} if stage else {}
    engine = whole_engine(PRUNED | {"overlap": True}, **options)
    ds_main.run_steps(engine, 1, 4)

    def fail(_parameter: torch.Tensor) -> None:
        raise ValueError("out of patience")

    handle = engine.module.embed.weight.register_post_accumulate_grad_hook(fail)
    message = "it went on"
    with contextlib.suppress(ValueError):
        engine.backward(engine(batch(5, 0, dist.get_rank())))
    handle.remove()
    try:
        engine.backward(engine(batch(6, 0, dist.get_rank())))
    except GradPruneError as exc:
        message = str(exc)
    engine.gradprune.detach()
    return message


def timed() -> list[str]:
    """What a script of one's own is told about where its time goes, without asking."""
    engine = whole_engine(PRUNED | {"overlap": True})
    with contextlib.redirect_stderr(io.StringIO()) as screen:
        ds_main.run_steps(engine, 1, 21)
    engine.gradprune.detach()
    return [line for line in screen.getvalue().splitlines() if "a step: computation" in line]


def hooks_left() -> int:
    """Hooks of parameters that detach leaves behind."""
    engine = whole_engine(PRUNED | {"overlap": True})
    ds_main.run_steps(engine, 1, 4)
    engine.gradprune.detach()
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in engine.module.parameters())


def run_all(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Run cases one after the other; a failure ends the list, the ranks may be out of step."""
    start_deepspeed()
    return run_cases(cases, globals().__getitem__)
