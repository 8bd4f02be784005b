"""A tiny model in a folder, and what tests of the server need of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from textgen import model as models
from textgen.corpus import Document, TextSource
from textgen.tokenizer import train_tokenizer

CONTEXT = 64


def write_model(folder: Path, seed: int = 0) -> Path:
    """A folder with a random model, whose replies differ by seed."""
    text = "the quick brown fox jumps over the lazy dog\n"
    tokenizer = train_tokenizer(TextSource("fox", (Document("one", text=text * 20),)), 270)
    sizes = {"tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": CONTEXT}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SIZES", sizes)
        model = models.build_model("tiny", len(tokenizer), 0, seed=seed)
    with torch.no_grad():  # an untrained model is otherwise so even that texts hang on rounding
        for parameter in model.parameters():
            parameter.mul_(4.0)
    models.save_model(model, tokenizer, folder)
    return folder


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for another thread, bounded."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
