"""Models to fine-tune: a folder, a hub name or a GGUF file; adapters on them; their replies."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.errors import DataError, MissingDependencyError

from .tuning_data import chat_text

LORA_RANK = 16
"""Columns of an adapter; its scale is twice that, as in most published recipes."""

REPLY_TOKENS = 60


def is_gguf(name: str) -> bool:
    """Whether `--model` names a GGUF file."""
    return name.lower().endswith(".gguf")


def check_model(name: str, is_lora: bool) -> None:
    """Refuse what cannot be a model, before anything heavy is loaded. Local.

    Raises:
        DataError: there is no such model.
        MissingDependencyError: a package that it needs is absent.
    """
    from textgen.model import check_model_name, model_of

    _need("accelerate", "The Trainer")
    if is_gguf(name):
        if not Path(name).is_file():
            raise DataError(f"--model must be a GGUF file that exists, got {name!r}.")
        _need("gguf", "--model with a GGUF file")
    else:
        check_model_name(model_of(name), has_weights=True)
    if is_lora:
        _need("peft", "--lora")


def load_tuned(name: str) -> tuple[Any, Any]:
    """Model, in fp32, and tokenizer. Local.

    Raises:
        DataError: one of them cannot be read.
    """
    from textgen.model import load_model, model_of
    from textgen.tokenizer import load_tokenizer

    if not is_gguf(name):
        folder = model_of(name)
        return load_model(folder), load_tokenizer(folder)
    return _from_gguf(Path(name))


def _from_gguf(path: Path) -> tuple[Any, Any]:
    from transformers.integrations import deepspeed as integration
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    # At ZeRO stage 3 transformers would make the model in pieces, which its GGUF reader does not
    # know. DeepSpeed cuts the whole model into pieces later.
    partitioned = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of transformers, on every rank
            tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            quantized: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32
            )
        # What comes out of a GGUF file refuses to be saved, so its weights move into a fresh model.
        model = type(quantized)(quantized.config)
        model.load_state_dict(quantized.state_dict())
    # The reader raises whatever a damaged file trips, from struct's errors to torch's.
    except Exception as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]
        raise DataError(
            f"{path} must be a GGUF file of a causal language model: {reason}."
        ) from exc
    finally:
        integration._hf_deepspeed_config_weak_ref = partitioned
    return model, tokenizer


def add_adapters(model: Any) -> Any:
    """LoRA on every linear layer but the last one; all else is frozen. Local.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    import peft  # type: ignore[import-untyped,import-not-found,unused-ignore]

    config = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


@torch.no_grad()
def replies(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """What a model answers, always with the likeliest token.

    Collective where the model is in pieces (ZeRO stage 3): equal weights answer equally.
    """
    was_training = model.training
    model.train(False)
    found = []
    for prompt in prompts:
        text = chat_text(tokenizer, prompt)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        ids = ids.to(next(model.parameters()).device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=REPLY_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=pad_id_of(tokenizer),
        )
        found.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    model.train(was_training)
    return found


def pad_id_of(tokenizer: Any) -> int:
    """A token to fill sequences with; it is masked."""
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def _need(package: str, what: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"{what} needs {package}, which is not installed. Run: pip install "
            '"ds_gradprune[finetune]"'
        )
