"""A model with its tokenizer, ready to serve: what a request becomes, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ds_gradprune.errors import ConfigError
from textgen.generate import prompt_ids
from textgen.model import context_length, ready
from textgen.serve.template import PLAIN_TEMPLATE


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model.

    Attributes:
        model: in evaluation, on its device.
        tokenizer: with a chat template.
        name: what clients call it.
        version: what tells it from an earlier one of the same name.
        context: tokens of prompt and reply together, at most.
        stops: ids that end a reply.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    version: str
    context: int
    stops: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        version: str,
        context: int,
    ) -> Served:
        """Make a loaded model ready. A tokenizer without a chat template gets the plain one."""
        ready(model)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        ends = getattr(model.generation_config, "eos_token_id", None)
        stops = [ends] if isinstance(ends, int) else list(ends or [])
        stops.append(int(tokenizer.eos_token_id))
        limit = min(context, context_length(model) or context)
        return cls(model, tokenizer, name, version, limit, frozenset(stops))

    def chat_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that a conversation becomes.

        Raises:
            ConfigError: the model's template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        # A template is a program of the model's author and may raise whatever it wants.
        except Exception as exc:
            raise ConfigError(
                f"messages must fit the model's chat template: {str(exc)[:200].rstrip('.')}."
            ) from exc
        return str(text)

    def encode(self, text: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Tokens of a prompt, and how many were cut from its beginning. As in `Replier`."""
        return prompt_ids(self.tokenizer, text, self.context, max_new_tokens)


class Writer:
    """Tokens in, text out, as soon as no later token can change it.

    Args:
        tokenizer: of the model.
        stops: texts that end the reply; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._start = 0  # decoding begins here: some tokenizers write a first token differently
        self._read = 0
        self._text = ""
        self._given = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain; `stopped` is True once a stop was met."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self._text += now[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        return self._give(self._held())

    def end(self) -> str:
        """The rest: half letters as they are, and the beginning of a stop that never came."""
        if not self.stopped:
            before = self._decode(self._ids[self._start : self._read])
            self._text += self._decode(self._ids[self._start :])[len(before) :]
            self._cut()
        return self._give(0)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _cut(self) -> None:
        ends = [self._text.find(stop) for stop in self._stops]
        found = min((end for end in ends if end >= 0), default=-1)
        if found >= 0:
            self._text, self.stopped = self._text[:found], True

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        self._cut()
        if self.stopped:
            return 0
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _give(self, held: int) -> str:
        upto = max(len(self._text) - held, self._given)
        piece, self._given = self._text[self._given : upto], upto
        return piece
