"""Models: sizes, equal weights on equal seeds, folders that open, folders that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedTokenizerFast

from ds_gradprune.errors import DataError
from textgen import model as module
from textgen.corpus import Document, TextSource
from textgen.model import (
    SIZES,
    build_model,
    check_model_name,
    context_length,
    load_model,
    model_of,
    open_model,
    save_model,
    sequence_length,
)
from textgen.tokenizer import VOCAB_SIZES, train_tokenizer

SOURCE = TextSource("fox", (Document("one", text="the quick brown fox\n" * 20),))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    module.quiet_transformers()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SOURCE, 280)


def tiny(vocab_size: int = 280) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    save_model(tiny(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("size", "num_parameters"), [("nano", 1_071_872), ("micro", 10_101_760), ("small", 124_439_808)]
)
def test_sizes_have_their_number_of_parameters(size: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(size, VOCAB_SIZES[size], 0, seed=0)
    assert model.num_parameters() == num_parameters


@pytest.mark.parametrize("size", SIZES)
def test_every_matrix_is_large_enough_to_be_pruned(size: str) -> None:
    with torch.device("meta"):
        model = build_model(size, VOCAB_SIZES[size], 0, seed=0)
    assert min(p.numel() for p in model.parameters() if p.dim() > 1) >= 4096


def test_equal_seeds_give_equal_weights_and_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    models = [build_model("nano", 300, 0, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    key = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(states[0][key], states[2][key])


def test_model_is_built_without_dropout() -> None:
    model = build_model("nano", 300, 0, seed=0).train()
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_saved_folder_holds_the_same_model(folder: Path) -> None:
    model = load_model(str(folder))
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 16
    assert context_length(model) == sequence_length(model) == 16


def test_saving_replaces_the_folder_as_a_whole(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (folder / "left over").write_text("x")
    model = tiny()
    save_model(model, tokenizer, folder)
    assert not (folder / "left over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    loaded = load_model(str(folder)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_failed_saving_leaves_the_old_folder(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    model = tiny()
    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(DataError, match=r"model must be writable: No space left"):
        save_model(model, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-300])


def remove_a_layer_of_the_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))


def change_the_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 32}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "must be a readable model folder"),
        (lambda f: (f / "config.json").write_text("{"), "must be a readable model folder"),
        (lambda f: (f / "config.json").write_text("[]"), "must name a model_type"),
        (lambda f: (f / "config.json").write_text("{}"), "must name a model_type"),
        (lambda f: (f / "config.json").write_text('{"model_type": "x"}'), "must be a readable"),
        (lambda f: (f / "config.json").write_text('{"model_type": "t5"}'), "must be a readable"),
        (lambda f: (f / "model.safetensors").unlink(), "must be a readable model folder"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "must be a readable model folder"),
        (cut_weights, "must be a readable model folder"),
        (change_the_width, "must be a readable model folder"),
        (remove_a_layer_of_the_file, r"must hold every weight of its model, but 12 are missing"),
    ],
)
def test_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nano", "openai-community/gpt2", "gpt2"])
def test_names_that_may_be_models_pass_the_first_check(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize("name", ["", "./absent", "a/b/c", "runs/x/model", "nano!"])
def test_names_that_cannot_be_models_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"--model must be nano, micro, small, a model folder"):
        check_model_name(name)


def test_a_path_with_a_mistake_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve --model runs/frist` asked the hub for half a minute."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"--model must be a model folder .*, got 'runs/frist'"):
        check_model_name("runs/frist", has_weights=True)


def test_the_folder_of_a_run_means_its_model(tmp_path: Path) -> None:
    assert model_of("gpt2") == "gpt2"
    assert model_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"must hold a model, but its run has not ended"):
        model_of(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_of(str(tmp_path)) == str(tmp_path / "model")


def test_size_is_nothing_to_load() -> None:
    with pytest.raises(
        DataError, match=r"--model must be a model folder or a hub name, got 'nano'"
    ):
        load_model("nano")


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"--model must be nano"):
        check_model_name(str(tmp_path / "file"))


def test_model_with_too_few_embeddings_is_refused(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert open_model(str(folder), tokenizer, seed=0).num_parameters() == tiny().num_parameters()
    save_model(tiny(vocab_size=270), tokenizer, folder)
    with pytest.raises(DataError, match=r"each of its tokenizer's 272 tokens, got 270"):
        open_model(str(folder), tokenizer, seed=0)


def test_context_of_other_families_is_found() -> None:
    model = tiny()
    model.config = GPT2Config(n_positions=4096)
    assert sequence_length(model) == module.LONGEST_SEQUENCE
    model.config = PretrainedConfig()  # type: ignore[assignment] # another family
    assert context_length(model) is None
    assert sequence_length(model) == module.LONGEST_SEQUENCE
