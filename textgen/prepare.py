"""From a text and a model name to a token folder: once per run."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ds_gradprune.errors import DataError
from textgen.corpus import open_text
from textgen.data import TokenMeta, read_meta, write_tokens
from textgen.model import SIZES
from textgen.tokenizer import VOCAB_SIZES, encode, load_tokenizer, train_tokenizer


def prepare(folder: Path, text: Path | None, model: str) -> TokenMeta:
    """Make the tokenizer and the token file of a run, unless they are there. Local.

    Args:
        folder: gets `tokenizer/`, then `tokens.bin`, then `tokens.json`. One that is complete is
            left as it is, so a resumed run, or another host on the same disk, reads nothing again.
        text: a file or folder; None: the embedded text.
        model: a size name trains a tokenizer on the text; a folder or hub name brings its own.

    Raises:
        DataError: the text or the model's tokenizer cannot be used.
    """
    meta = read_meta(folder)
    if meta is not None:
        return meta
    source = open_text(text)
    source.check()
    if model in SIZES:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(source, VOCAB_SIZES[model])
    else:
        tokenizer = load_tokenizer(model)
    try:
        tokenizer.save_pretrained(_tokenizer_folder(folder))
    except OSError as exc:
        raise DataError(f"{folder} must be writable: {exc.strerror}.") from exc
    return write_tokens(folder, encode(source, tokenizer), len(tokenizer), source.name)


def prepared_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `prepare` left. Local.

    Raises:
        DataError: it cannot be read.
    """
    return load_tokenizer(str(_tokenizer_folder(folder)))


def _tokenizer_folder(folder: Path) -> Path:
    return folder / "tokenizer"
