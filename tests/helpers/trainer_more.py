"""Runs beyond `trainer_main.train`: other ways in, other loops, and mistakes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import trainer_main
from tests.helpers.trainer_main import ds_config, make_trainer, rows, tiny_model


def callback_alone(folder: str) -> dict[str, Any]:
    """`callbacks=[GradPruneCallback()]`, without `follow`, and a callback behind it."""
    import transformers

    from ds_gradprune.trainer import GradPruneCallback

    heard: list[dict[str, Any]] = []

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(dict(kwargs["logs"]))

    trainer = make_trainer(folder, {}, callbacks=(GradPruneCallback(), Recorder()))
    return trainer_main.trained(trainer) | {"heard": heard}


def follow_with_integration(folder: str) -> dict[str, Any]:
    """What an integration of `report_to` hears, which stands before all users' callbacks."""
    import transformers
    from transformers.integrations import integration_utils

    from ds_gradprune.trainer import GradPruneCallback, follow

    heard: list[dict[str, Any]] = []

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(dict(kwargs["logs"]))

    integration_utils.INTEGRATION_TO_CALLBACK["recorder"] = Recorder
    integration_utils.get_available_reporting_integrations = lambda: ["recorder"]
    # accelerate refuses "auto" where it does not know what for.
    trainer = make_trainer(folder, {"exchange": "auto"}, report_to="all", max_steps=3)
    callbacks = [follow(trainer), follow(trainer)]
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    trained = trainer_main.trained(trainer)
    assert isinstance(callbacks[0], GradPruneCallback)
    return trained | {"heard": heard, "names": names, "is_one": callbacks[0] is callbacks[1]}


def registered_only(folder: str, **changes: Any) -> dict[str, Any]:
    """`register()` and nothing else; what rotates our files comes with it."""
    import ds_gradprune

    # Those that are imported later are not found.
    import transformers.trainer  # isort: skip  # noqa: F401

    ds_gradprune.register()
    trainer = make_trainer(folder, {}, **changes)
    return trainer_main.trained(trainer)


def each_node(folder: str, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    """Every rank is the only one of a host of its own, and `save_on_each_node` is on."""
    from ds_gradprune.trainer import follow

    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    trainer = make_trainer(folder, {}, save_on_each_node=True, **changes)
    follow(trainer)
    where = os.path.join(trainer.args.output_dir, resume) if resume else None
    trained = trainer_main.trained(trainer, where)
    files = [str(p.relative_to(trainer.args.output_dir)) for p in _files(trainer.args.output_dir)]
    return trained | {"files": files}


def saved_by_hand(folder: str) -> dict[str, Any]:
    """`save_model`, `evaluate` and training on from there."""
    from safetensors.torch import load_file

    from ds_gradprune.trainer import follow

    trainer = make_trainer(folder, {}, max_steps=5)
    # Equally many labels in each, so that the Trainer's mean over ranks is that over all rows; and
    # none at the first place, which this Trainer counts and the model does not predict.
    whole = torch.stack([row["input_ids"] for row in rows(8)])
    labels = whole.clone()
    labels[:, 0] = -100
    trainer.eval_dataset = [
        {"input_ids": text, "labels": label} for text, label in zip(whole, labels, strict=True)
    ]
    follow(trainer)
    trained = trainer_main.trained(trainer)
    where = Path(folder) / "by_hand"
    trainer.save_model(str(where))
    dist.barrier()
    saved = load_file(where / "model.safetensors")
    fresh = tiny_model(seed=1)
    fresh.load_state_dict(saved, strict=False)
    fresh.tie_weights()
    fresh.train(False)
    with torch.no_grad():
        loss = float(fresh(input_ids=whole, labels=labels).loss)
    return trained | {
        "saved": saved,
        "loss": loss,
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def mistakes(folder: str) -> dict[str, str]:
    """What is told where something is missing; all before any work is done."""
    import deepspeed
    import transformers

    import ds_gradprune
    from ds_gradprune.trainer import GradPruneCallback, follow

    def told(work: Any) -> str:
        try:
            work()
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}"
        return "nothing"

    plain = transformers.TrainingArguments(
        output_dir=folder, report_to=[], disable_tqdm=True, use_cpu=True
    )
    dense = transformers.Trainer(tiny_model(), plain, train_dataset=rows(8))
    heard = {"no deepspeed": told(lambda: follow(dense))}
    heard["no block"] = told(lambda: follow(make_trainer(folder, None)))
    heard["wrong block"] = told(lambda: follow(make_trainer(folder, {"warmup_stepz": 1})))

    early = make_trainer(folder, {})
    early.model_wrapped = deepspeed.initialize(
        model=early.model,
        model_parameters=early.model.parameters(),
        config=ds_config(None) | _RESOLVED,
    )[0]
    heard["engine made before"] = told(lambda: follow(early))

    apart = make_trainer(folder, {}, stage=3)
    config = ds_config({}, 3) | _RESOLVED
    config.pop("optimizer")
    ds_gradprune.unregister()
    apart.ref_model = deepspeed.initialize(model=tiny_model(), config=config)[0]
    heard["reference made before"] = told(lambda: follow(apart))

    heard["miscounted"] = told(lambda: follow(make_trainer(folder, {}, use_cpu=False)))
    alone = make_trainer(folder, {}, max_steps=1, use_cpu=False, callbacks=(GradPruneCallback(),))
    heard["miscounted alone"] = told(alone.train)
    uneven = make_trainer(folder, {}, num_rows=64 + 2 * dist.get_rank(), seed=dist.get_rank())
    follow(uneven)
    heard["uneven"] = told(uneven.train)
    return heard


_RESOLVED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def accelerate_miscounts() -> str:
    """What is said where nobody has told accelerate that it runs on CPUs."""
    import accelerate  # type: ignore[import-untyped]

    import ds_gradprune
    from ds_gradprune.errors import UnsupportedError

    ds_gradprune.register()
    accelerate.state.AcceleratorState._reset_state(True)
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=ds_config({}) | _RESOLVED)
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin, cpu=False)
    model = tiny_model()
    optimizer = accelerate.utils.DummyOptim(model.parameters(), lr=1e-3)
    try:
        accelerator.prepare(model, optimizer)
    except UnsupportedError as exc:
        return f"refused: {exc}"
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    return "accepted"


def accelerate_loop(folder: str, gas: int = 2) -> dict[str, Any]:
    """A plain Accelerate loop: 3 batches an epoch, so every other step is incomplete."""
    import accelerate

    import ds_gradprune

    ds_gradprune.register()
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.PartialState(cpu=True)
    config = ds_config({"warmup_steps": 1}) | _RESOLVED | {"gradient_accumulation_steps": gas}
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=config)
    accelerator = accelerate.Accelerator(
        deepspeed_plugin=plugin, gradient_accumulation_steps=gas, cpu=False
    )
    model = tiny_model()
    optimizer = accelerate.utils.DummyOptim(model.parameters(), lr=1e-3)
    mine = rows(12)[dist.get_rank() :: 2]
    loader: Any = torch.utils.data.DataLoader(mine, batch_size=2)
    engine, optimizer = accelerator.prepare(model, optimizer)
    losses, reported = [], []
    for _epoch in range(3):
        made: list[float] = []
        for index, batch in enumerate(loader):
            accelerator.gradient_state._set_sync_gradients(index % gas == gas - 1 or index == 2)
            loss = engine(**batch).loss
            made.append(float(loss.detach()))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                losses.append(sum(made) / len(made))
                reported.append(engine.gradprune.report.loss)
                made = []
    saved = Path(folder) / "state"
    accelerator.save_state(str(saved))
    final = trainer_main.shared_state(engine)
    return {"losses": losses, "reported": reported, "final": final}


def preference(stage: int = 0) -> dict[str, Any]:
    """Direct preference optimisation as TRL does it: a second engine that is never trained."""
    import copy

    import deepspeed

    import ds_gradprune

    ds_gradprune.register()
    config = ds_config({"warmup_steps": 1}, stage) | _RESOLVED
    model = tiny_model()
    reference = copy.deepcopy(model)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=copy.deepcopy(config)
    )
    # trl 1.16.0, models/utils.py, prepare_deepspeed: a copy of the same configuration, without an
    # optimizer, at stage 0 unless the policy is at stage 3.
    config.pop("optimizer")
    config["zero_optimization"]["stage"] = stage if stage == 3 else 0
    other, *_ = deepspeed.initialize(model=reference, config=config)
    other.train(False)
    before = _held(reference)
    losses = []
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        start = torch.randint(0, 128, (4, 1), generator=generator)
        chosen, rejected = (start + torch.arange(16)) % 128, (start + 2 * torch.arange(16)) % 128
        margins = []
        for one in (engine, other):
            with torch.set_grad_enabled(one is engine):
                good, bad = (_log_probability(one, text) for text in (chosen, rejected))
            margins.append(good - bad)
        loss = -torch.nn.functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    same = [bool(torch.equal(a, b)) for a, b in zip(before, _held(reference), strict=True)]
    return {
        "losses": losses,
        "density": engine.gradprune.report.density,
        "shared": engine.gradprune.parameters_crc(),
        "reference_is_untouched": all(same) and getattr(other, "gradprune", None) is None,
    }


def _held(model: torch.nn.Module) -> list[torch.Tensor]:
    """What this rank holds of a model: at stage 3 its pieces."""
    return [getattr(w, "ds_tensor", w).detach().clone() for w in model.parameters()]


def _log_probability(engine: Any, text: torch.Tensor) -> torch.Tensor:
    logits = engine(input_ids=text).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, text[:, 1:, None]).sum((1, 2))


def _files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
