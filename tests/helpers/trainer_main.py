"""One rank of Hugging Face Trainer runs with our block in their DeepSpeed configuration."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.helpers.ds_main import crc, start_deepspeed

BLOCK = {
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "verify_every_steps": 1,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}
LENGTH, VOCAB = 16, 128


def run_all(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Run many cases one after the other: starting transformers costs more than most of them.

    Args:
        cases: name -> (function of this module, its arguments).

    Returns:
        name -> result, or the text of what went wrong. A failure ends the list: the ranks may no
        longer be in step.
    """
    from deepspeed.comm import comm

    import ds_gradprune
    from ds_gradprune.deepspeed.trainers import leave_trainers
    from tests.helpers import trainer_more

    results: dict[str, Any] = {}
    start_deepspeed()
    environ = dict(os.environ)
    for name, (function, arguments) in cases.items():
        # Each case starts as a new process would; transformers and accelerate write variables.
        os.environ.clear()
        os.environ.update(environ)
        comm.cdb = getattr(comm.cdb, "_adopted", comm.cdb)
        ds_gradprune.unregister()
        leave_trainers()
        try:
            run = globals().get(function) or getattr(trainer_more, function)
            results[name] = run(**arguments)
        except Exception:
            results[name] = traceback.format_exc()
            break
    return results


def tiny_model(seed: int = 0) -> Any:
    """A GPT-2 of 60,000 parameters; its dropout draws random numbers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64,
            n_layer=1,
            n_head=2,
            vocab_size=VOCAB,
            n_positions=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )


def rows(num_rows: int) -> list[dict[str, Any]]:
    """Sequences that can be learned; the later ones have fewer labels."""
    texts = [torch.arange(i, i + LENGTH) % VOCAB for i in range(num_rows)]
    labels = [text.clone() for text in texts]
    for i, label in enumerate(labels):
        label[: i % 5] = -100
    return [{"input_ids": t, "labels": label} for t, label in zip(texts, labels, strict=True)]


def ds_config(block: dict[str, Any] | None, stage: int = 0) -> dict[str, Any]:
    """What a user's file says, with "auto" for what the Trainer knows."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "torch_adam": True},
        },
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    return config if block is None else config | {"gradient_pruning": BLOCK | block}


def make_trainer(
    folder: str,
    block: dict[str, Any] | None,
    stage: int = 0,
    num_rows: int = 64,
    callbacks: tuple[Any, ...] = (),
    base: str = "Trainer",
    **changes: Any,
) -> Any:
    """A Trainer with the tiny model; each rank may have a folder of its own ("{rank}")."""
    import transformers

    model = tiny_model()
    options: dict[str, Any] = {
        "output_dir": folder.format(rank=dist.get_rank()),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "deepspeed": ds_config(block, stage),
    }
    data = rows(num_rows)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**(options | changes)),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=list(callbacks),
    )


def train(folder: str, block: dict[str, Any], resume: Any = None, **changes: Any) -> Any:
    """The one line `follow` after the Trainer was made."""
    from ds_gradprune.trainer import follow

    trainer = make_trainer(folder, block, **changes)
    follow(trainer)
    return trained(trainer, resume)


def trained(trainer: Any, resume: Any = None) -> dict[str, Any]:
    """Train; what the handle, the logs and the disk show."""
    import transformers

    seen: list[Any] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            handle = trainer.model_wrapped.gradprune
            report = handle.report
            seen.append(
                (report.step, report.density, report.loss, handle.parameters_crc())
                + ((crc(trainer.model_wrapped),) if not trainer.is_zero3() else ())
            )

    trainer.is_zero3 = lambda: trainer.model_wrapped.zero_optimization_stage() == 3
    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=resume)
    dist.barrier()
    return {"seen": seen, "rank": dist.get_rank()} | shown(trainer)


def shown(trainer: Any) -> dict[str, Any]:
    """Logs, weights and checkpoints of a trained Trainer."""
    history, best = trainer.state.log_history, trainer.state.best_model_checkpoint
    engine = trainer.model_wrapped
    folder = trainer.args.output_dir
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return {
        "logs": [entry for entry in history if "loss" in entry],
        "logged": [entry["loss"] for entry in history if "loss" in entry],
        "evaluated": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "eval_logs": [entry for entry in history if "eval_loss" in entry],
        "final": shared_state(engine),
        "best": best,
        "saved_best": load_file(os.path.join(best, "model.safetensors")) if best else None,
        "checkpoints": [name for name in names if name.startswith("checkpoint-")],
        "steps": trainer.state.global_step,
    }


def shared_state(engine: Any) -> dict[str, torch.Tensor]:
    """The weights that all islands share, whole, by name."""
    import deepspeed

    with engine.gradprune.shared_weights():
        named = dict(engine.module.named_parameters(remove_duplicate=False))
        if engine.zero_optimization_stage() != 3:
            return {name: value.detach().clone() for name, value in named.items()}
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: value.detach().clone() for name, value in named.items()}
