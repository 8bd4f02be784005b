"""Keys and values of several texts in one memory that never grows: a row a text, a slot a token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ds_gradprune.errors import UnsupportedError


class Slots(Cache):
    """The cache that a model writes to and reads from.

    Token t of the text in row b lies at [b, :, t], so texts join and leave without moving others.
    Before each pass the caller says which rows and places the pass fills.

    Args:
        model: its layers must all attend to every earlier token.
        rows: texts at a time.
        places: tokens of a text, reply included.

    Raises:
        UnsupportedError: a layer keeps something else: a window, or a state.
    """

    def __init__(self, model: PreTrainedModel, rows: int, places: int) -> None:
        usual = DynamicCache(config=model.config)
        for number, layer in enumerate(usual.layers):
            if type(layer) is not DynamicLayer:
                raise UnsupportedError(
                    f"serve needs layers that attend to all earlier tokens, but layer {number} of "
                    f"{model.config.model_type} keeps a {type(layer).__name__}. Use "
                    "ds-gradprune reply, or transformers serve."
                )
        count = int(model.config.get_text_config().num_hidden_layers)
        self.rows, self.places = rows, places
        self._slots = [_Layer(self) for _ in range(count)]
        self.first, self.count = 0, 0
        self.lengths: torch.Tensor | None = None
        self.longest = 0
        super().__init__(layers=list(self._slots))

    def fill(self, first: int, count: int) -> None:
        """The next pass brings whole prompts: rows first to first + count, from place 0 on."""
        self.first, self.count, self.lengths = first, count, None

    def extend(self, lengths: torch.Tensor) -> None:
        """The next pass brings one token for each of the first rows.

        Args:
            lengths: (rows,) int64: tokens that each of them has.
        """
        self.first, self.count = 0, int(lengths.numel())
        self.lengths, self.longest = lengths, int(lengths.max()) + 1

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        for layer in self._slots:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions and mask are given in every pass."""
        return 0


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's part: keys and values of (rows, heads, places, width)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = slots
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the memory when the first pass shows its shape."""
        rows, places = self._owner.rows, self._owner.places
        self.keys = _zeros(key_states, rows, places)
        self.values = _zeros(value_states, rows, places)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what a pass computed; returns what it attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self._owner
        last = owner.first + owner.count
        if owner.lengths is None:
            self.keys[owner.first : last, :, : key_states.shape[2]] = key_states
            self.values[owner.first : last, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        index = torch.arange(last, device=key_states.device)
        self.keys[index, :, owner.lengths] = key_states[:, :, 0]
        self.values[index, :, owner.lengths] = value_states[:, :, 0]
        return self.keys[:last, :, : owner.longest], self.values[:last, :, : owner.longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the mask is given in every pass."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Unused: positions are given in every pass."""
        return 0

    def get_max_length(self) -> int:
        """Tokens of a text."""
        return self._owner.places


def _zeros(like: torch.Tensor, rows: int, places: int) -> torch.Tensor:
    """(rows, heads, places, width) zeros: a place that is masked is still multiplied, by zero.

    On a CPU the system hands out zeros page by page, so places that no token uses take no memory.
    """
    shape = (rows, like.shape[1], places, like.shape[3])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(shape)
