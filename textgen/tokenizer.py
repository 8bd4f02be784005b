"""Byte-level BPE, trained on the text it will encode.

Knows nothing of models beyond how large a vocabulary each size wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import AutoTokenizer

from ds_gradprune.errors import DataError
from textgen.corpus import TextSource
from textgen.serve.template import PLAIN_TEMPLATE

END_OF_TEXT = "<|endoftext|>"
"""Ends a document; also begins an empty prompt and pads. Id 0 in every vocabulary built here."""

VOCAB_SIZES = {"nano": 2048, "micro": 8192, "small": 50257}
"""Largest vocabulary by model size, END_OF_TEXT included. 256 bytes are always in it."""

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

SAMPLE_CHARS = 200_000_000
"""The merges are learned from at most this much of the text: more changes them little."""


def train_tokenizer(source: TextSource, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from a text. Local; the same text gives the same tokenizer.

    Args:
        source: the text; at most its first SAMPLE_CHARS characters are used.
        vocab_size: upper limit, >= 257. A short text that runs out of pairs gives fewer entries.

    Returns:
        A tokenizer with END_OF_TEXT as beginning, end, unknown and padding token, and the plain
        chat template, without which chat clients and servers refuse a model.

    Raises:
        DataError: the text cannot be read.

    References:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.2.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(source), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call] # transformers
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=PLAIN_TEMPLATE,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub name. Local.

    Raises:
        DataError: there is none, or its files are damaged.
    """
    folder = Path(name)
    local = folder.is_dir()
    # Without any of its files transformers makes an empty tokenizer and says nothing.
    if local and not any((folder / file).is_file() for file in _VOCABULARY_FILES):
        raise DataError(f"{name} must hold a tokenizer, but has no {', '.join(_VOCABULARY_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    # Damaged files raise whatever the reader that stumbles raises. It is told, never passed over.
    except Exception as exc:
        lines = str(exc).strip().splitlines() or [""]
        raise DataError(
            f"{name} must hold a tokenizer that can be read: {type(exc).__name__} {lines[0][:200]}."
        ) from exc
    if tokenizer.eos_token_id is None:
        raise DataError(f"The tokenizer in {name} must have an end-of-text token, but has none.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise DataError(f"{name} must hold a text tokenizer, got {type(tokenizer).__name__}.")
    return tokenizer


def encode(
    source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the tokens of a text in order, piece by piece, END_OF_TEXT after each document.

    Yields:
        (num_tokens,) uint32 arrays.

    Raises:
        DataError: the text cannot be read.
    """
    end = np.array([tokenizer.eos_token_id], dtype=np.uint32)
    for document in source.documents:
        for piece in document.pieces():
            ids = tokenizer.encode(piece, add_special_tokens=False, verbose=False)
            yield np.array(ids, dtype=np.uint32)
        yield end


def _sample(source: TextSource) -> Iterator[str]:
    left = SAMPLE_CHARS
    for piece in chain.from_iterable(document.pieces() for document in source.documents):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return
