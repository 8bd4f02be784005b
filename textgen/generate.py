"""Replies: a trained folder and a prompt in, text out.

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ds_gradprune.errors import ConfigError
from textgen.model import context_length, load_model, ready
from textgen.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: >= 0; 0 always takes the likeliest token, whatever the seed.
        top_p: in (0, 1]: draw among the likeliest tokens that together reach this probability.
        max_new_tokens: >= 1.
        seed: equal seeds give equal replies on one machine; None draws a fresh one.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 80
    seed: int | None = None

    def __post_init__(self) -> None:
        faults = []
        if not 0.0 <= self.temperature < float("inf"):
            faults.append(f"--temperature must be at least 0 and finite, got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            faults.append(f"--top_p must be greater than 0 and at most 1, got {self.top_p}.")
        if self.max_new_tokens < 1:
            faults.append(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            faults.append(f"--seed must be at least 0 and below 2^63, got {self.seed}.")
        if faults:
            raise ConfigError(faults)


class Replier:
    """A model that replies.

    Args:
        model: any causal language model of transformers.
        tokenizer: its tokenizer.
        device: where it runs; None takes a GPU if there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context_length(model)
        self.model: Any = ready(model, device)
        self.device = torch.device(model.device)

    @classmethod
    def load(cls, name: str, device: str | None = None) -> Replier:
        """Open a model folder or hub name. Local.

        Raises:
            DataError: the folder is damaged or no model.
        """
        return cls(load_model(name), load_tokenizer(name), device)

    def reply(
        self, prompt: str, sampling: Sampling, say: Callable[[str], object] = lambda text: None
    ) -> str:
        """Continue a prompt. Local.

        Args:
            prompt: any text; of a long one the model sees the end.
            sampling: how tokens are chosen.
            say: gets the new text in pieces, each as soon as no later token can change it.

        Returns:
            The new text alone.
        """
        pieces = _Pieces(self.tokenizer, say)
        ids, _ = prompt_ids(self.tokenizer, prompt, self.context, sampling.max_new_tokens)
        given = torch.tensor([ids], dtype=torch.int64, device=self.device)
        self._generate(given, sampling, streamer=pieces)
        return "".join(pieces.texts)

    def _generate(self, given: torch.Tensor, sampling: Sampling, **options: Any) -> torch.Tensor:
        num_new = sampling.max_new_tokens
        if self.context is not None:
            num_new = min(num_new, self.context - given.shape[1])
        if sampling.temperature > 0:
            options |= {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        else:
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            if sampling.seed is None:
                torch.seed()
            else:
                torch.manual_seed(sampling.seed)
            tokens: torch.Tensor = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=num_new,
                pad_token_id=self.tokenizer.eos_token_id,
                **options,
            )
        return tokens


class _Pieces(TextStreamer):
    """Hands out new text instead of printing it."""

    def __init__(self, tokenizer: Any, say: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts: list[str] = []
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See transformers."""
        if text:
            self.texts.append(text)
            self._say(text)


def prompt_ids(
    tokenizer: Any, prompt: str, context: int | None, max_new_tokens: int
) -> tuple[list[int], int]:
    """Tokens of a prompt, and how many were cut from its beginning. Pure.

    New tokens have priority up to half of the context; None: there is no limit.
    """
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
    ids = ids or [int(tokenizer.eos_token_id)]
    if context is None:
        return ids, 0
    kept = ids[-min(max(context - max_new_tokens, (context + 1) // 2), context - 1) :]
    return kept, len(ids) - len(kept)
