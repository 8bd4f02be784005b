"""Inputs of launch/finetune.py, a tiny chat model and questions it can learn; and runs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the cat sat on the mat and the dog sat on the log. " * 20


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Bytes and a few merges, with the marks of ChatML."""
    import tokenizers
    import transformers

    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([TEXT], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write_model(folder: Path, template: str | None = TEMPLATE) -> None:
    """A Llama of 80,000 parameters, untrained."""
    import transformers

    tokenizer = tiny_tokenizer(template)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_questions(path: Path, num_lines: int = 60) -> None:
    """Every question has the same kind of answer, in one of the two forms."""
    lines: list[dict[str, Any]] = []
    for number in range(num_lines):
        question, answer = f"what is {number}?", f"{number} is the cat."
        if number % 2:
            lines.append({"prompt": question, "response": answer})
        else:
            roles = [("system", "be brief"), ("user", question), ("assistant", answer)]
            lines.append({"messages": [{"role": r, "content": c} for r, c in roles]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def tune_all(runs: dict[str, list[str]]) -> dict[str, str]:
    """Runs of launch/finetune.py one after the other, on ranks that have met.

    Args:
        runs: name -> command line.

    Returns:
        Name -> "done", or the fault.
    """
    import os

    from deepspeed.comm import comm

    import ds_gradprune
    from ds_gradprune.errors import GradPruneError
    from launch import finetune
    from launch.support.peers import Peers
    from launch.support.place import find_place
    from launch.support.tuning_settings import read_tuning_settings
    from tests.helpers.ds_main import start_deepspeed

    start_deepspeed()
    peers = Peers(find_place(os.environ))
    environ, ends = dict(os.environ), {}
    for name, arguments in runs.items():
        os.environ.clear()
        os.environ.update(environ)
        comm.cdb = getattr(comm.cdb, "_adopted", comm.cdb)
        ds_gradprune.unregister()
        try:
            finetune._tune(read_tuning_settings(arguments), peers)
            ends[name] = "done"
        except GradPruneError as exc:
            ends[name] = str(exc)
    return ends
