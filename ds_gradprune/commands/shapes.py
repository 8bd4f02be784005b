"""The parameters of a model shape, with random weights: by size name, number, or folder.

Needs torch and transformers; run by the agent of a host.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.errors import DataError, MissingDependencyError

SHAPES = {
    "nano": (4, 4, 128, 2048, 128),
    "micro": (6, 5, 320, 8192, 256),
    "small": (12, 12, 768, 50257, 1024),
}
"""Layers, heads, width, vocabulary, context of a GPT-2: those of the text generator."""

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGbB])")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}

_WIDE = 64
"""Width over layers of a shape that is made up, about that of GPT-2 and Llama models."""

_VOCABULARY, _CONTEXT = 50257, 1024


def config_of(model: str) -> Any:
    """The transformers configuration of a model.

    Args:
        model: a key of SHAPES, a number of parameters ("124M", "1.3B"), or a model folder.

    Raises:
        DataError: it is none of them.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _transformers()
    if model in SHAPES:
        return _gpt2(transformers, *SHAPES[model])
    number = _NUMBER.fullmatch(model.strip())
    if number:
        return _gpt2(transformers, *made_up(float(number[1]) * _UNITS[number[2].lower()]))
    if not (Path(model) / "config.json").is_file():
        raise DataError(
            f"--model must be {', '.join(SHAPES)}, a number of parameters such as 124M, or a "
            f"folder with a config.json, got {model!r}."
        )
    try:
        return transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise DataError(f"--model must be a readable model folder, got {model}: {reason}") from exc


def made_up(numel: float) -> tuple[int, int, int, int, int]:
    """A GPT-2 with about so many parameters: layers, heads, width, vocabulary, context.

    A block has 12 width^2 parameters, the embeddings (vocabulary + context) width.

    Raises:
        DataError: fewer than 0.1 or more than 1000 million times a thousand.
    """
    if not 1e5 <= numel <= 1e12:
        raise DataError(f"--model must have 100k to 1000B parameters, got {numel:g}.")
    vocabulary = _VOCABULARY if numel >= 5e7 else 8192 if numel >= 5e6 else 2048
    context = _CONTEXT if numel >= 5e7 else 256 if numel >= 5e6 else 128
    best: tuple[float, tuple[int, int, int, int, int]] | None = None
    for layers in range(2, 129):
        free = numel / (12 * layers)
        # 12 L w^2 + (V + C) w = numel
        half = (vocabulary + context) / (24 * layers)
        width = max(64, 32 * round((math.sqrt(half * half + free) - half) / 32))
        found = 12 * layers * width * width + (vocabulary + context) * width
        miss = abs(math.log(found / numel)) + 0.05 * abs(math.log(width / layers / _WIDE))
        if best is None or miss < best[0]:
            head = 64 if width % 64 == 0 else 32
            best = (miss, (layers, width // head, width, vocabulary, context))
    assert best is not None
    return best[1]


def build(config: Any, device: str | torch.device) -> torch.nn.Module:
    """A causal language model with random weights; on "meta" it has no memory."""
    transformers = _transformers()
    with torch.device(device):
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def sizes(model: torch.nn.Module, min_numel: int) -> tuple[list[int], list[bool]]:
    """Elements of every parameter that is trained, and whether it is pruned.

    Args:
        model: tied weights count once.
        min_numel: smaller parameters are sent whole, and those with one dimension.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    numels = [p.numel() for p in parameters]
    return numels, [p.dim() > 1 and p.numel() >= min_numel for p in parameters]


def share_of(
    numels: Sequence[int], pruned: Sequence[bool], most: int
) -> tuple[list[int], list[bool]]:
    """Parameters from the first on, the last one cut, with at most so many elements together."""
    kept: list[int] = []
    for numel in numels:
        take = min(numel, most - sum(kept))
        if take <= 0:
            break
        kept.append(take)
    return kept, list(pruned[: len(kept)])


def context_of(config: Any) -> int:
    """Tokens of a training sequence: what the model can see, 1024 at most."""
    for field in ("n_positions", "max_position_embeddings", "max_sequence_length"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return min(value, _CONTEXT)
    return _CONTEXT


def _gpt2(
    transformers: Any, layers: int, heads: int, width: int, vocabulary: int, context: int
) -> Any:
    return transformers.GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        vocab_size=vocabulary,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as exc:
        if exc.name != "transformers":
            raise
        raise MissingDependencyError(
            "doctor builds the model's shape with transformers, which is not installed. Run: pip "
            'install "ds_gradprune[textgen]"'
        ) from exc
    found: Any = transformers
    found.logging.set_verbosity_error()
    return found
