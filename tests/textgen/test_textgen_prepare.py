"""From text and model name to tokens: once, complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gradprune.errors import DataError
from textgen.data import read_meta
from textgen.model import build_model, save_model
from textgen.prepare import prepare, prepared_tokenizer
from textgen.tokenizer import VOCAB_SIZES


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the quick brown fox\n" for i in range(2000)))
    return path


def test_size_name_trains_a_tokenizer_on_the_text(tmp_path: Path, text: Path) -> None:
    meta = prepare(tmp_path / "data", text, "nano")
    tokenizer = prepared_tokenizer(tmp_path / "data")
    assert meta == read_meta(tmp_path / "data")
    assert meta.vocab_size == len(tokenizer) <= VOCAB_SIZES["nano"]
    assert meta.source == str(text)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_model_folder_brings_its_own_tokenizer(tmp_path: Path, text: Path) -> None:
    prepare(tmp_path / "first", text, "nano")
    tokenizer = prepared_tokenizer(tmp_path / "first")
    model = build_model("nano", len(tokenizer), 0, seed=0)
    save_model(model, tokenizer, tmp_path / "model")
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n" * 100)
    meta = prepare(tmp_path / "second", other, str(tmp_path / "model"))
    assert meta.vocab_size == len(tokenizer)
    again = prepared_tokenizer(tmp_path / "second")
    assert again.encode("brown fox") == tokenizer.encode("brown fox")


def test_complete_folder_is_left_as_it_is(tmp_path: Path, text: Path) -> None:
    meta = prepare(tmp_path / "data", text, "nano")
    written = (tmp_path / "data" / "tokens.bin").stat().st_mtime_ns
    text.unlink()  # a resumed run does not read the text again
    assert prepare(tmp_path / "data", text, "nano") == meta
    assert (tmp_path / "data" / "tokens.bin").stat().st_mtime_ns == written


def test_empty_text_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="must hold text, but is empty"):
        prepare(tmp_path / "data", tmp_path / "empty.txt", "nano")
    assert not (tmp_path / "data").exists()


def test_folder_that_cannot_be_made_is_told(tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data must be writable"):
        prepare(tmp_path / "file" / "data", text, "nano")
