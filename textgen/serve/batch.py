"""Continuous batching: texts join and leave a running batch between two tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from textgen.generate import Sampling
from textgen.serve.served import Served, Writer
from textgen.serve.slots import Slots

PREFILL_TOKENS = 512
"""Prompts are read in passes of about this many tokens: running replies wait no longer."""


@dataclass(eq=False)
class Row:
    """A text that is being continued.

    Attributes:
        ids: of the prompt, then of the reply.
        num_prompt: how many of them are the prompt.
        sampling: how the next token is chosen.
        writer: makes text of tokens.
        owner: whose it is; not looked at.
        top_k: draw among so many; 0: all.
        reason: why it ended: "stop", "length"; None while it runs.
    """

    ids: list[int]
    sampling: Sampling
    writer: Writer
    owner: Any = None
    top_k: int = 0
    num_prompt: int = field(init=False)
    reason: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)
        self.random: torch.Generator | None = None

    @property
    def num_new(self) -> int:
        """Tokens of the reply."""
        return len(self.ids) - self.num_prompt


class Batch:
    """Texts that one version of a model continues together.

    Args:
        served: the model.
        rows: texts at a time.
    """

    def __init__(self, served: Served, rows: int) -> None:
        self.served = served
        self.rows: list[Row] = []
        self._most = rows
        self._slots = Slots(served.model, rows, served.context)
        self._device = served.model.device
        penalty = getattr(served.model.generation_config, "repetition_penalty", None)
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        )

    @property
    def room(self) -> int:
        """Texts that could join now."""
        return self._most - len(self.rows)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Read prompts and choose the first token of each.

        Args:
            rows: at most `room`.

        Returns:
            Each with the text that is certain. Those that have ended are not in the batch.
        """
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
        last = torch.tensor([len(row.ids) - 1 for row in rows])
        wanted, column = torch.unique(last, return_inverse=True)
        places = torch.arange(longest)
        self._slots.fill(len(self.rows), len(rows))
        logits = self._pass(
            ids,
            places.expand(len(rows), -1),
            (places[None, :] <= places[:, None])[None, None].expand(len(rows), 1, -1, -1),
            logits_to_keep=wanted.to(self._device),
        )
        first = len(self.rows)
        self.rows += rows
        for row in rows:
            row.random = _generator(row.sampling.seed, self._device)
        chosen = logits[torch.arange(len(rows)), column.to(logits.device)]
        return self._take(list(range(first, len(self.rows))), chosen)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, str]]:
        """Choose the next token of every text; see `join` for what is returned."""
        lengths = torch.tensor([len(row.ids) - 1 for row in self.rows])
        longest = int(lengths.max()) + 1
        self._slots.extend(lengths.to(self._device))
        logits = self._pass(
            torch.tensor([[row.ids[-1]] for row in self.rows]),
            lengths[:, None],
            (torch.arange(longest)[None, :] <= lengths[:, None])[:, None, None],
        )
        return self._take(list(range(len(self.rows))), logits[:, -1])

    @torch.inference_mode()
    def drop(self, gone: Sequence[Row]) -> None:
        """Take texts out; the last ones move into their places."""
        for row in gone:
            place = self.rows.index(row)
            final = self.rows.pop()
            if final is not row:
                self._slots.move(len(self.rows), place, len(final.ids))
                self.rows[place] = final

    def _pass(
        self, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """One pass of the model; `seen` is True where a token attends to a place."""
        model = self.served.model
        mask = torch.zeros(seen.shape, dtype=model.dtype)
        mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
        logits: torch.Tensor = model(
            input_ids=ids.to(self._device),
            position_ids=positions.to(self._device),
            attention_mask=mask.to(self._device),
            past_key_values=self._slots,
            use_cache=True,
            **options,
        ).logits
        return logits.float()

    def _take(self, places: list[int], logits: torch.Tensor) -> list[tuple[Row, str]]:
        """Append a token to each of the texts at `places`; logits is (texts, vocabulary)."""
        likeliest = logits.argmax(dim=-1).tolist()
        out = []
        for number, place in enumerate(places):
            row = self.rows[place]
            token = likeliest[number]
            if row.sampling.temperature > 0 or self._penalty is not None:
                token = self._choose(row, logits[number : number + 1])
            out.append((row, self._append(row, token)))
        self.drop([row for row, _ in out if row.reason is not None])
        return out

    def _choose(self, row: Row, scores: torch.Tensor) -> int:
        """Choose a token as `generate` does; scores is (1, vocabulary) fp32."""
        given: Any = None
        if self._penalty is not None:
            given = torch.tensor([row.ids], device=scores.device)
            scores = self._penalty(given, scores)
        if row.sampling.temperature == 0:
            return int(scores.argmax())
        if row.sampling.temperature != 1.0:
            scores = TemperatureLogitsWarper(row.sampling.temperature)(given, scores)
        if row.top_k:
            scores = TopKLogitsWarper(row.top_k)(given, scores)
        if row.sampling.top_p < 1.0:
            scores = TopPLogitsWarper(row.sampling.top_p)(given, scores)
        chances = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(chances, 1, generator=row.random))

    def _append(self, row: Row, token: int) -> str:
        row.ids.append(token)
        if token in self.served.stops:
            row.reason = "stop"
            return row.writer.end()
        piece = row.writer.add(token)
        if row.writer.stopped:
            row.reason = "stop"
        elif row.num_new >= row.sampling.max_new_tokens or len(row.ids) >= self.served.context:
            row.reason = "length"
            piece += row.writer.end()
        return piece


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
