"""Sequences to fine-tune on: question and answer in JSON lines, or plain text.

A line of a JSONL file is one of

    {"prompt": "...", "response": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Loss is taken on what the assistant says, and on everything in a plain text. Knows nothing of
training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_gradprune.errors import DataError
from textgen.serve.template import PLAIN_TEMPLATE

EVAL_SHARE, MAX_EVAL = 0.05, 64
"""So large a part of the sequences is kept from training, and so many at most: each evaluation
reads them all."""

IGNORED = -100
"""Label of a token that no loss is taken on, as torch and transformers have it."""

_ROLES = ("system", "user", "assistant")

Row = dict[str, list[int]]
"""input_ids and labels of one sequence, equally long."""


@dataclass(frozen=True)
class TuningData:
    """Tokens, ready for a Trainer.

    Attributes:
        train: sequences to train on.
        evaluation: sequences that are not trained on.
        num_skipped: examples whose answer lies beyond the maximal length.
        digest: tells one content from another.
    """

    train: list[Row]
    evaluation: list[Row]
    num_skipped: int
    digest: str


def read_data(path: Path, tokenizer: Any, max_length: int, seed: int) -> TuningData:
    """Read, tokenise and split a file. Local; equal arguments give equal sequences.

    Args:
        path: `.jsonl`, or a plain UTF-8 text.
        tokenizer: with a chat template, if the file holds messages.
        max_length: tokens of a sequence at most; longer answers are cut.
        seed: which examples are kept for evaluation.

    Raises:
        DataError: the file, or a line of it, cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise DataError(f"--data must be a readable text file, got {path}: {reason}.") from exc
    if path.suffix == ".jsonl":
        rows, num_skipped = _examples(path, text, tokenizer, max_length)
        order = np.random.default_rng(seed).permutation(len(rows))
        rows = [rows[index] for index in order]
    else:
        rows, num_skipped = _passages(text, tokenizer, max_length), 0
    if len(rows) < 2:
        raise DataError(
            f"--data must give at least two sequences, one of them for evaluation, got {len(rows)} "
            f"from {path}. Add text, or change --max-length (now {max_length})."
        )
    num_eval = max(1, min(MAX_EVAL, round(EVAL_SHARE * len(rows))))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    # The end of a text is what is kept of it: no passage for evaluation lies between trained ones.
    return TuningData(rows[:-num_eval], rows[-num_eval:], num_skipped, digest)


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch, (rows, longest) int64, padded on the right.

    Args:
        rows: sequences.
        pad_id: token to fill with; the mask hides it.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without empty ones. Local.

    Raises:
        DataError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"--prompts must be a readable text file, got {path}: {exc}.") from exc
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"--prompts must hold a prompt on each line, got {path} without any.")
    return prompts


def chat_text(tokenizer: Any, prompt: str) -> str:
    """What a model is given to answer a prompt: the prompt in its chat template, or itself."""
    if not tokenizer.chat_template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


# ---- plain text ----------------------------------------------------------------------------------


def _passages(text: str, tokenizer: Any, max_length: int) -> list[Row]:
    """The whole text, cut into sequences of equal length; what is left at the end is dropped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - max_length + 1, max_length)
    cut = [ids[start : start + max_length] for start in starts]
    return [{"input_ids": passage, "labels": passage} for passage in cut]


# ---- questions and answers -----------------------------------------------------------------------


def _examples(path: Path, text: str, tokenizer: Any, max_length: int) -> tuple[list[Row], int]:
    rows, num_skipped = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        row = _row(_pieces(_messages(line, where), tokenizer, where), tokenizer)
        row = {name: values[:max_length] for name, values in row.items()}
        # The first token is not predicted.
        if all(label == IGNORED for label in row["labels"][1:]):
            num_skipped += 1
        else:
            rows.append(row)
    return rows, num_skipped


def _messages(line: str, where: str) -> list[dict[str, str]]:
    """An example as messages, the last one of the assistant."""
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{where} must be a JSON object: {exc}.") from exc
    if isinstance(example, dict) and {"prompt", "response"} <= set(example):
        example = {
            "messages": [
                {"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": example["response"]},
            ]
        }
    messages = example.get("messages") if isinstance(example, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f'{where} must have the keys "prompt" and "response", or a list "messages", got '
            f"{line[:60]!r}."
        )
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") not in _ROLES or not isinstance(fields.get("content"), str):
            raise DataError(
                f"{where} must have messages with a role of {', '.join(_ROLES)} and a text as "
                f"content, got {str(message)[:60]!r}."
            )
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where} must end with a message of the assistant, which is learned.")
    return messages


def _pieces(
    messages: list[dict[str, str]], tokenizer: Any, where: str
) -> Iterator[tuple[str, bool]]:
    """The conversation as text, in pieces: each with whether it is learned."""
    if tokenizer.chat_template in (None, PLAIN_TEMPLATE):
        if len(messages) != 2 or messages[0]["role"] != "user":
            raise DataError(
                f"{where} is a conversation, and the model's tokenizer has no chat template. Use "
                'a chat model, or lines with "prompt" and "response".'
            )
        yield messages[0]["content"] + "\n", False
        yield messages[1]["content"] + tokenizer.eos_token, True
        return
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:index], where, add_generation_prompt=True)
        after = _templated(tokenizer, messages[: index + 1], where)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{where}: the model's chat template changes earlier text when an answer is "
                "added, so answers cannot be told from questions. Use another template."
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _templated(tokenizer: Any, messages: Any, where: str, **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    # A template is a program of its author's, and raises jinja2's errors and its own.
    except Exception as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise DataError(f"{where}: the model's chat template refuses it: {reason}.") from exc


def _row(pieces: Iterator[tuple[str, bool]], tokenizer: Any) -> Row:
    """Tokens of the pieces; a piece begins where the template's own marks end, so at a token."""
    row: Row = {"input_ids": [], "labels": []}
    for text, is_learned in pieces:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        row["input_ids"] += ids
        row["labels"] += ids if is_learned else [IGNORED] * len(ids)
    return row
