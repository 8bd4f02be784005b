"""Causal language models: built by size name, loaded from a folder or hub name, saved.

Knows nothing of training. A saved folder is a plain `transformers` folder (config, tokenizer,
safetensors); nothing of this package is needed to open it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ds_gradprune.errors import DataError

LONGEST_SEQUENCE = 1024
"""A loaded model is trained on sequences of at most this many tokens, to bound memory."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128},
    "micro": {"n_layer": 6, "n_head": 5, "n_embd": 320, "n_positions": 256},
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
}
"""Shapes of GPT-2; every matrix has more than 4096 elements. With the vocabularies of
tokenizer.VOCAB_SIZES they have about 1, 10 and 124 million parameters."""


def quiet_transformers() -> None:
    """Keep transformers' advice and bars off the screen; its errors are raised anyway. Local."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def build_model(size: str, vocab_size: int, end_of_text_id: int, seed: int) -> PreTrainedModel:
    """Make an untrained model. Local; equal arguments give equal weights on every rank.

    Args:
        size: a key of SIZES.
        vocab_size: rows of the embedding, tied to the output.
        end_of_text_id: begins, ends and pads.
        seed: decides the weights; the caller's random state is left alone.

    References:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # GPT-2's 0.02 belongs to a width of 768; a sum over fewer inputs wants larger weights.
        initializer_range=0.02 * math.sqrt(768 / SIZES[size]["n_embd"]),
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        pad_token_id=end_of_text_id,
        **SIZES[size],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def check_model_name(name: str, *, has_weights: bool = False) -> None:
    """Refuse a name that cannot be a model, before anything heavy is loaded. Local.

    Args:
        name: a key of SIZES, a folder, or a hub name.
        has_weights: a size alone is not enough.

    Raises:
        DataError: it is none of them, or the folder has no readable config.json.
    """
    path = Path(name)
    if name in SIZES and not has_weights:
        return
    # "runs/frist", where runs is a folder here, is a path with a mistake and no hub name.
    is_here = path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
    if name not in SIZES and not is_here and _HUB_NAME.fullmatch(name):
        return
    if not name or not path.is_dir():
        sizes = "" if has_weights else f"{', '.join(SIZES)}, "
        raise DataError(f"--model must be {sizes}a model folder or a hub name, got {name!r}.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise _unreadable(name, exc) from exc
    if not isinstance(config, dict) or "model_type" not in config:
        raise DataError(f"{name}/config.json must name a model_type, but does not.")


def model_of(name: str) -> str:
    """The model that a name means: of a run's folder the one that it has written. Local.

    Raises:
        DataError: the run has written none yet.
    """
    folder = Path(name)
    if not (folder / "run.json").is_file():
        return name
    if not (folder / "model" / "config.json").is_file():
        raise DataError(
            f"{name} must hold a model, but its run has not ended. `ds-gradprune serve --model "
            f"{name}` takes its newest checkpoint."
        )
    return str(folder / "model")


def load_model(name: str) -> PreTrainedModel:
    """Load any causal language model, in fp32. Local.

    Args:
        name: a model folder, or a hub name, which may download.

    Raises:
        DataError: the model cannot be read, or weights are missing from it.
    """
    check_model_name(name, has_weights=True)
    local = Path(name).is_dir()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, local_files_only=local, output_loading_info=True
        )
    # A damaged folder raises whatever the reader that stumbles raises, from json's errors to
    # safetensors' own, which has no base but Exception. It is told, never passed over.
    except Exception as exc:
        raise _unreadable(name, exc) from exc
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(
            f"{name} must hold every weight of its model, but {len(missing)} are missing, "
            f"{missing[0]} first. Copy the folder again."
        )
    if not isinstance(model, PreTrainedModel):
        raise DataError(f"{name} must be a transformers model, got {type(model).__name__}.")
    return model


def open_model(name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build a size or load a folder or hub name, and make sure that the tokenizer fits. Local.

    Raises:
        DataError: the model cannot be read, or has fewer embeddings than the tokenizer has tokens.
    """
    if name in SIZES:
        return build_model(name, len(tokenizer), int(tokenizer.eos_token_id), seed)
    model = load_model(name)
    check_fits(name, model, tokenizer)
    return model


def check_fits(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has tokens which the model does not know. Local.

    Raises:
        DataError: it has.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if rows < len(tokenizer):
        raise DataError(
            f"{name} must have an embedding for each of its tokenizer's {len(tokenizer)} tokens, "
            f"got {rows}."
        )


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model can see; None if it names no limit."""
    for field in ("n_positions", "max_position_embeddings", "max_sequence_length"):
        value = getattr(model.config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def sequence_length(model: PreTrainedModel) -> int:
    """Tokens per training sequence."""
    return min(context_length(model) or LONGEST_SEQUENCE, LONGEST_SEQUENCE)


def ready(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """Make a model reply: in evaluation, and in half precision on a GPU. In place. Local.

    Args:
        model: any.
        device: where it runs; None takes a GPU if there is one.
    """
    model.train(False)
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cpu":
        half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        torch.nn.Module.to(model, device=device or "cuda", dtype=half)
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a transformers folder; a reader sees the old one or the new one. Local.

    Args:
        model: weights are written in the dtype they have.
        tokenizer: written beside them, with the model's context length.
        folder: replaced if it exists.

    Raises:
        DataError: the disk refuses.
    """
    tokenizer.model_max_length = context_length(model) or tokenizer.model_max_length
    try:
        with _replaced(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except (OSError, SafetensorError) as exc:  # the latter hides a full disk
        reason = getattr(exc, "strerror", None) or str(exc)
        raise DataError(f"{folder} must be writable: {reason}.") from exc


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well."""
    temporary = folder.with_name(f".{folder.name}.new")
    previous = folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def _unreadable(name: str, exc: BaseException) -> DataError:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return DataError(f"{name} must be a readable model folder: {lines[0][:200].rstrip('.')}.")
