"""The flags of launch/finetune.py and the DeepSpeed configuration, with every "auto" filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_gradprune.commands.dispatch import SHIPPED
from ds_gradprune.config import BLOCK, load_block
from ds_gradprune.errors import ConfigError

from .flags import ScriptParser, add_run_flags, name_or_path, path, positive
from .run_folder import RunFolder
from .settings import RunSettings
from .start import read_ds_config
from .tuning_data import read_prompts
from .tuning_model import check_model

DEFAULT_CONFIG = SHIPPED / "finetune_ethernet.json"

LEARNING_RATE = {False: 2e-5, True: 2e-4}
"""For "lr": "auto", without and with --lora: adapters start at zero and bear ten times as much."""

_AUTO: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
_AUTO_OPTIMIZER: Mapping[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}


def parser() -> ScriptParser:
    """The flags; all else is a key of the DeepSpeed configuration."""
    flags = ScriptParser("Fine-tune a language model over pruned updates or gradients.")
    add = flags.add_argument
    split = "order and evaluation split"
    add_run_flags(flags, DEFAULT_CONFIG, steps=200, out="finetune", seed=split)
    add(
        "--model",
        type=name_or_path,
        required=True,
        help="transformers folder, GGUF file, or hub name",
    )
    add(
        "--data",
        type=path,
        required=True,
        help='FILE.jsonl with {"prompt", "response"} or {"messages"} a line, or a UTF-8 text',
    )
    add("--lora", action="store_true", help="train adapters only; needs peft")
    add("--max-length", type=positive, default=512, help="tokens of a sequence (default: 512)")
    add("--bf16", action="store_true", help="set bf16 in the configuration")
    add("--prompts", type=path, help="a prompt on each line, replied to before and after")
    add("--eval-every", type=positive, help="steps between evaluations (default: at both ends)")
    add("--save-every", type=positive, help="steps between checkpoints (default: none)")
    return flags


@dataclass(frozen=True)
class TuningSettings(RunSettings):
    """What the user of launch/finetune.py asked for."""

    def check_inputs(self) -> list[str]:
        """Check model, data, prompts and run folder. Local, writes nothing.

        Returns:
            The prompts.

        Raises:
            ConfigError, DataError, MissingDependencyError: one of them cannot be used.
        """
        if not self.flags.resume:
            self.folder.check_new()
        check_model(self.flags.model, self.flags.lora)
        return [] if self.flags.prompts is None else read_prompts(self.flags.prompts)


def read_tuning_settings(arguments: Sequence[str] | None) -> TuningSettings:
    """Parse flags and configuration. Local.

    Raises:
        ConfigError: something is wrong.
    """
    flags = parser().parse_args(arguments)
    given = read_ds_config(flags.config)
    block = load_block(given, flags.steps)
    folder = RunFolder(flags.out)
    # A log_path that is null becomes the run folder's.
    block = block.model_copy(update={"log_path": block.log_path or str(folder.log)})
    filled = filled_config(given, is_lora=flags.lora, wants_bf16=flags.bf16)
    filled[BLOCK] = block.model_dump(mode="json")
    return TuningSettings(flags, filled, block, folder)


def filled_config(given: Mapping[str, Any], *, is_lora: bool, wants_bf16: bool) -> dict[str, Any]:
    """The configuration with every "auto" filled in that the Trainer would ask its flags for. Pure.

    Raises:
        ConfigError: --bf16 contradicts it.
    """
    config = dict(given)
    for key, value in _AUTO.items():
        if config.get(key, "auto") == "auto":
            config[key] = value
    # It follows from the others and the number of ranks.
    if config.get("train_batch_size") == "auto":
        del config["train_batch_size"]
    optimizer = dict(config.get("optimizer") or {"type": "AdamW", "params": {}})
    params = {"lr": "auto"} | dict(optimizer.get("params") or {})
    autos = {"lr": LEARNING_RATE[is_lora], **_AUTO_OPTIMIZER}
    optimizer["params"] = {
        key: autos.get(key, value) if value == "auto" else value for key, value in params.items()
    }
    config["optimizer"] = optimizer
    # accelerate refuses a file without this block.
    config.setdefault("zero_optimization", {"stage": 0})
    config["bf16"] = _bf16(config.get("bf16"), wants_bf16)
    return config


def _bf16(block: Any, wanted: bool) -> dict[str, Any]:
    found = dict(block) if isinstance(block, Mapping) else {}
    enabled = found.get("enabled", "auto")
    if wanted and enabled is False:
        raise ConfigError(
            'bf16.enabled must be true or "auto" with --bf16, got false. Change it, or leave '
            "--bf16 out."
        )
    return found | {"enabled": wanted if enabled == "auto" else bool(enabled)}
