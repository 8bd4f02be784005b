"""A text as the tokens of a model's own tokenizer, cut in two."""

from __future__ import annotations

import torch

from labs.convergence.text import VALIDATION_PART, Text

VALIDATION_SEQUENCES = 64
CURVE_SEQUENCES = 16


class TokenText(Text):
    """See `Text`: the same batches for all methods.

    Args:
        tokens: (n,) int64.
        context: tokens per sequence.
    """

    def __init__(self, tokens: torch.Tensor, context: int) -> None:
        self.digest = ""
        self.vocab_size = int(tokens.max()) + 1
        self._tokens = tokens
        self._train_numel = int(len(tokens) * (1 - VALIDATION_PART))
        self._context = context

    def validation(self, sequences: int | None = None) -> torch.Tensor:
        """See `Text.validation`; `VALIDATION_SEQUENCES`, and for a curve `CURVE_SEQUENCES`."""
        return super().validation(VALIDATION_SEQUENCES if sequences is None else CURVE_SEQUENCES)
