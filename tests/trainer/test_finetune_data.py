"""Sequences of launch/finetune.py: what is read, what is learned, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_gradprune.errors import DataError
from launch.support.tuning_data import IGNORED, collate, read_data, read_prompts
from tests.helpers import finetune_main

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return finetune_main.tiny_tokenizer()


def learned(row: dict[str, list[int]], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def test_loss_is_taken_on_answers_alone(tmp_path: Path, tokenizer: Any) -> None:
    finetune_main.write_questions(tmp_path / "qa.jsonl", 40)
    data = read_data(tmp_path / "qa.jsonl", tokenizer, 64, seed=0)
    assert (len(data.train), len(data.evaluation), data.num_skipped) == (38, 2, 0)
    for row in data.train + data.evaluation:
        text = str(tokenizer.decode(row["input_ids"]))
        number = text.split("what is ")[1].split("?")[0]
        assert learned(row, tokenizer) == f"{number} is the cat.<|im_end|>\n"
        assert text.endswith(learned(row, tokenizer))
        assert text.startswith("<|im_start|>system\nbe brief") == (int(number) % 2 == 0)


def test_tokens_are_those_of_the_whole_conversation(tmp_path: Path, tokenizer: Any) -> None:
    roles = [("user", "hello"), ("assistant", "the cat"), ("user", "and?"), ("assistant", "sat on")]
    messages = [{"role": role, "content": text} for role, text in roles]
    line = json.dumps({"messages": messages}) + "\n"
    (tmp_path / "qa.jsonl").write_text(2 * line)
    row = read_data(tmp_path / "qa.jsonl", tokenizer, 64, seed=0).train[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert learned(row, tokenizer) == "the cat<|im_end|>\nsat on<|im_end|>\n"


def test_without_a_template_questions_and_answers_follow_each_other(tmp_path: Path) -> None:
    plain = finetune_main.tiny_tokenizer(template=None)
    (tmp_path / "qa.jsonl").write_text(2 * '{"prompt": "who?", "response": "the cat"}\n')
    row = read_data(tmp_path / "qa.jsonl", plain, 64, seed=0).train[0]
    assert plain.decode(row["input_ids"]) == "who?\nthe cat<|im_end|>"
    assert learned(row, plain) == "the cat<|im_end|>"


def test_text_is_cut_into_equal_sequences(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(finetune_main.TEXT)
    data = read_data(tmp_path / "a.txt", tokenizer, 16, seed=0)
    rows = data.train + data.evaluation
    assert {len(row["input_ids"]) for row in rows} == {16}
    assert all(row["labels"] == row["input_ids"] for row in rows)
    # The end of the text is kept from training.
    ids = [token for row in rows for token in row["input_ids"]]
    assert finetune_main.TEXT.startswith(tokenizer.decode(ids))


def test_equal_seeds_split_equally(tmp_path: Path, tokenizer: Any) -> None:
    finetune_main.write_questions(tmp_path / "qa.jsonl", 40)
    digests = [
        read_data(tmp_path / "qa.jsonl", tokenizer, 64, seed=seed).digest for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_answers_beyond_the_length_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    lines = [{"prompt": "cat " * words, "response": "yes"} for words in (1, 2, 60)]
    (tmp_path / "qa.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    data = read_data(tmp_path / "qa.jsonl", tokenizer, 32, seed=0)
    assert (len(data.train), len(data.evaluation), data.num_skipped) == (1, 1, 1)


def test_batch_is_padded_and_masked() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_id=0)
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, 7], [8, -100, -100]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of .*qa.jsonl must be a JSON object"),
        ("[1]", 'must have the keys "prompt" and "response"'),
        ('{"question": "a"}', 'must have the keys "prompt" and "response"'),
        ('{"messages": []}', 'or a list "messages"'),
        ('{"prompt": 1, "response": "b"}', "must have messages with a role of system, user"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "with a role of system, user"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must end with a message of the ass"),
    ],
)
def test_line_that_is_no_example_is_named(
    line: str, words: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "qa.jsonl").write_text(f'{{"prompt": "a", "response": "b"}}\n{line}\n')
    with pytest.raises(DataError, match=words):
        read_data(tmp_path / "qa.jsonl", tokenizer, 64, seed=0)


def test_file_that_cannot_be_used_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"must be a readable text file, got .*: No such file"):
        read_data(tmp_path / "missing.txt", tokenizer, 64, seed=0)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="it is not UTF-8"):
        read_data(tmp_path / "a.txt", tokenizer, 64, seed=0)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match=r"at least two sequences.*got 0.*--max-length \(now 64\)"):
        read_data(tmp_path / "a.txt", tokenizer, 64, seed=0)


def test_conversation_needs_a_template(tmp_path: Path) -> None:
    finetune_main.write_questions(tmp_path / "qa.jsonl", 4)
    with pytest.raises(DataError, match=r"line 1 .* tokenizer has no chat template"):
        read_data(tmp_path / "qa.jsonl", finetune_main.tiny_tokenizer(None), 64, seed=0)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "template refuses it: no system role"),
        ("{{ messages | length }}", "template changes earlier text"),
    ],
)
def test_template_that_does_not_serve_is_told(template: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=words):
        read_data(tmp_path / "qa.jsonl", finetune_main.tiny_tokenizer(template), 64, seed=0)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(DataError, match="must hold a prompt on each line"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(DataError, match="--prompts must be a readable text file"):
        read_prompts(tmp_path / "missing.txt")
