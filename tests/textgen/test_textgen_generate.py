"""Replies: deterministic where they should be, equal however they are made, within the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gradprune.errors import ConfigError, DataError
from textgen import model as models
from textgen.corpus import Document, TextSource
from textgen.generate import Replier, Sampling, prompt_ids
from textgen.tokenizer import train_tokenizer

CONTEXT = 24
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def replier() -> Replier:
    text = "the quick brown fox jumps over the lazy dog\n"
    tokenizer = train_tokenizer(TextSource("fox", (Document("one", text=text * 20),)), 270)
    sizes = {"tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": CONTEXT}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SIZES", sizes)
        model = models.build_model("tiny", len(tokenizer), 0, seed=0)
    # Larger weights: an untrained model is otherwise so even that sampling shows little.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return Replier(model, tokenizer, "cpu")


def test_greedy_reply_is_the_same_every_time(replier: Replier) -> None:
    first = replier.reply("the quick", GREEDY)
    torch.manual_seed(99)
    assert replier.reply("the quick", GREEDY) == first != ""


def test_greedy_reply_takes_the_likeliest_token(replier: Replier) -> None:
    tokens = replier.tokenizer.encode("the quick")
    prompt = len(tokens)
    for _ in range(GREEDY.max_new_tokens):
        logits = replier.model(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    assert replier.tokenizer.decode(tokens[prompt:]) == replier.reply("the quick", GREEDY)


def test_equal_seeds_give_equal_replies(replier: Replier) -> None:
    replies = [replier.reply("fox", Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


def test_reply_leaves_the_callers_random_state(replier: Replier) -> None:
    before = torch.get_rng_state()
    replier.reply("fox", Sampling(seed=1, max_new_tokens=3))
    replier.reply("fox", Sampling(seed=None, max_new_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_seed_draws_afresh(replier: Replier) -> None:
    assert len({replier.reply("fox", Sampling(temperature=5.0)) for _ in range(4)}) > 1


@settings(max_examples=15)
@given(prompt=st.text(max_size=30), seed=st.integers(0, 100))
def test_streamed_reply_equals_the_whole_one(replier: Replier, prompt: str, seed: int) -> None:
    sampling = Sampling(seed=seed, max_new_tokens=12)
    ids, _ = prompt_ids(replier.tokenizer, prompt, replier.context, 12)
    tokens = replier._generate(torch.tensor([ids]), sampling)[0, len(ids) :]
    whole = replier.tokenizer.decode(tokens, skip_special_tokens=True)
    assert replier.reply(prompt, sampling) == whole


def test_pieces_come_word_by_word(replier: Replier, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = replier.tokenizer.encode("the quick brown fox", add_special_tokens=False)

    def generate(*args: object, streamer: Any, **kwargs: object) -> None:
        streamer.put(torch.tensor([ids]))  # the prompt, which is no news
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(replier.model, "generate", generate)
    pieces = list[str]()
    assert replier.reply("x", GREEDY, pieces.append) == "the quick brown fox"
    assert pieces == ["the ", "quick ", "brown ", "fox"]


def test_who_listens_may_end_the_reply(replier: Replier) -> None:
    def leave(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError, match=r"^$"):
        replier.reply("the", Sampling(seed=1, max_new_tokens=20), leave)


@given(num_tokens=st.integers(0, 60), max_new_tokens=st.integers(1, 60))
def test_prompt_and_reply_fit_the_context(
    replier: Replier, num_tokens: int, max_new_tokens: int
) -> None:
    # A prompt of one-byte tokens that never merge: no pair of them is in the text.
    prompt = "#" * num_tokens
    ids, cut = prompt_ids(replier.tokenizer, prompt, CONTEXT, max_new_tokens)
    assert 1 <= len(ids) < CONTEXT
    if num_tokens == 0:
        assert ids == [replier.tokenizer.eos_token_id]
    elif num_tokens + max_new_tokens <= CONTEXT:
        assert (len(ids), cut) == (num_tokens, 0)
    else:
        assert len(ids) + min(max_new_tokens, CONTEXT // 2) <= CONTEXT


def test_long_prompt_keeps_its_end(replier: Replier) -> None:
    ids, _ = prompt_ids(replier.tokenizer, "#" * 50 + "fox", replier.context, 4)
    assert str(replier.tokenizer.decode(ids)).endswith("fox")
    assert replier.reply("#" * 50 + "fox", Sampling(temperature=0, max_new_tokens=50)) != ""


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"temperature": -0.1}, r"--temperature must be at least 0 and finite, got -0\.1"),
        ({"temperature": float("nan")}, r"--temperature must be .* got nan"),
        ({"temperature": float("inf")}, r"--temperature must be .* got inf"),
        ({"top_p": 0.0}, r"--top_p must be greater than 0 and at most 1, got 0\.0"),
        ({"top_p": 1.01}, r"--top_p must be .* got 1\.01"),
        ({"max_new_tokens": 0}, r"--max_new_tokens must be at least 1, got 0"),
        ({"seed": -1}, r"--seed must be at least 0 .* got -1"),
        ({"seed": -1, "top_p": 2.0}, r"2 faults"),
    ],
)
def test_sampling_out_of_range_is_refused(faulty: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**faulty)


def test_damaged_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="must be a readable model folder"):
        Replier.load(str(tmp_path), "cpu")


@pytest.mark.gpu
def test_gpu_replies_are_deterministic(replier: Replier) -> None:
    on_gpu = Replier(replier.model, replier.tokenizer, "cuda")
    assert on_gpu.reply("the quick", GREEDY) == on_gpu.reply("the quick", GREEDY) != ""
