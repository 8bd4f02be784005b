"""One rank of a Hugging Face Trainer run with our block in its DeepSpeed configuration."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.ds_main import crc, start_deepspeed


def train(
    folder: str,
    block: dict[str, Any],
    gas: int,
    spread: bool = False,
    resume: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A tiny GPT-2 for a few optimizer steps; what our handle saw.

    Accelerate counts one process wherever DeepSpeed runs on CPUs: all ranks then read the same
    data. With `spread` it is told what it counts itself on GPUs.
    """
    start_deepspeed()
    import transformers

    import ds_gradprune

    ds_gradprune.register()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64,
            n_layer=1,
            n_head=2,
            vocab_size=128,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )
    rows = [{"input_ids": torch.arange(i, i + 16) % 128} for i in range(64)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    options = {
        "output_dir": folder,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": gas,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "torch_adam": True},
            },
            "zero_optimization": {"stage": 0},
            "gradient_pruning": block,
        },
    }
    arguments = transformers.TrainingArguments(**(options | changes))
    if spread:
        state = arguments.distributed_state
        state.backend, state.num_processes = "gloo", dist.get_world_size()
        state.process_index = state.local_process_index = dist.get_rank()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8]
    )
    seen: list[Any] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            engine = trainer.model_wrapped
            report = engine.gradprune.report
            shared = engine.gradprune.parameters_crc()
            seen.append((report.step, report.density, report.loss, shared, crc(engine)))

    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=resume)
    dist.barrier()
    history = trainer.state.log_history
    with trainer.model_wrapped.gradprune.shared_weights():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        final = {name: value.detach().clone() for name, value in parameters.items()}
    return {
        "seen": seen,
        "logged": [entry["loss"] for entry in history if "loss" in entry],
        "evaluated": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "final": final,
        "rank": int(os.environ["RANK"]),
    }
