"""Byte-level BPE: deterministic, lossless, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_gradprune.errors import DataError
from textgen import tokenizer as module
from textgen.corpus import Document, TextSource
from textgen.tokenizer import (
    END_OF_TEXT,
    VOCAB_SIZES,
    encode,
    load_tokenizer,
    train_tokenizer,
)

SOURCE = TextSource(
    "fox",
    (
        Document("one", text="the quick brown fox jumps over the lazy dog\n" * 20),
        Document("two", text="le renard brun saute, là-bas\n" * 20),
    ),
)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(SOURCE, 300)


def test_a_saved_tokenizer_carries_a_chat_template(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`transformers serve` answered chats of our folders with HTTP 500."""
    trained.save_pretrained(tmp_path)
    said = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": " fox"}]
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.apply_chat_template(said, tokenize=False) == "the quick fox\n\n"


def test_same_text_gives_the_same_tokenizer(trained: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(SOURCE, 300)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_vocabulary_has_the_asked_size_and_one_special_token(
    trained: PreTrainedTokenizerFast,
) -> None:
    assert len(trained) == 300
    assert trained.all_special_tokens == [END_OF_TEXT]
    assert trained.eos_token_id == trained.bos_token_id == trained.pad_token_id == 0


def test_short_text_gives_a_smaller_vocabulary() -> None:
    source = TextSource("short", (Document("short", text="abab"),))
    assert len(train_tokenizer(source, 1000)) < 300


@given(st.text(max_size=60))
def test_any_text_survives(trained: PreTrainedTokenizerFast, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_tokenizer_learns_from_a_sample_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_CHARS", 10)
    assert list(module._sample(SOURCE)) == ["the quick "]


def test_encoding_ends_every_document(trained: PreTrainedTokenizerFast) -> None:
    tokens = np.concatenate(list(encode(SOURCE, trained)))
    assert tokens.dtype == np.uint32
    ends = np.flatnonzero(tokens == trained.eos_token_id)
    assert len(ends) == 2
    assert ends[-1] == len(tokens) - 1
    assert trained.decode(tokens[: ends[0]].tolist()) == SOURCE.documents[0].text
    assert trained.decode(tokens[ends[0] + 1 : -1].tolist()) == SOURCE.documents[1].text


def test_saved_tokenizer_opens_with_transformers(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.encode("the lazy fox") == trained.encode("the lazy fox")
        assert loaded.eos_token_id == 0


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a tokenizer, but has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[]", "no json"])
def test_damaged_tokenizer_is_refused(
    trained: PreTrainedTokenizerFast, tmp_path: Path, content: str
) -> None:
    trained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"must hold a tokenizer that can be read"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(SOURCE, 260).backend_tokenizer)
    bare.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="must have an end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_every_size_has_a_vocabulary() -> None:
    assert VOCAB_SIZES == {"nano": 2048, "micro": 8192, "small": 50257}
