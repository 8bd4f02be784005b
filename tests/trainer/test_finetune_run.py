"""launch/finetune.py on two ranks: trained, resumed, adapted, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import finetune_main
from tests.helpers.ranks import run_processes

pytestmark = [pytest.mark.trainer, pytest.mark.distributed, pytest.mark.timeout(300)]

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
    "gradient_pruning": {
        "warmup_steps": 2,
        "ramp_steps": 0,
        "window_size": 4,
        "density": {"initial": 0.1, "min": 0.1, "max": 0.1},
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finetune")
    finetune_main.write_model(home / "model")
    finetune_main.write_questions(home / "qa.jsonl")
    (home / "text.txt").write_text(finetune_main.TEXT)
    (home / "prompts.txt").write_text("what is 7?\nwhat is 8?\n")
    for stage in (0, 2, 3):
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        document = json.dumps(CONFIG | {"zero_optimization": zero})
        (home / f"zero{stage}.json").write_text(document)
    return home


@pytest.fixture(scope="module")
def ends(home: Path) -> dict[str, str]:
    def flags(name: str, stage: int, *more: str, data: str = "qa.jsonl") -> list[str]:
        places = {
            "--model": "model",
            "--data": data,
            "--out": name,
            "--config": f"zero{stage}.json",
        }
        given = [part for flag, value in places.items() for part in (flag, str(home / value))]
        return [*given, "--steps", "24", "--max-length", "48", *more]

    prompts = ("--prompts", str(home / "prompts.txt"))
    runs = {
        "questions": flags("questions", 0, "--save-every", "8", "--eval-every", "8", *prompts),
        "not empty": flags("questions", 0),
        "other length": [*flags("questions", 0, "--resume"), "--max-length", "32"],
        "text": flags("text", 3, "--bf16", *prompts, data="text.txt"),
    }
    if importlib.util.find_spec("peft") is not None:
        runs["adapters"] = flags("adapters", 2, "--lora", *prompts)
    before = {"questions": runs.pop("questions")}
    resumed = {
        "resumed": flags("questions", 0, "--save-every", "8", "--eval-every", "8", "--resume")
    }

    def run(which: dict[str, list[str]]) -> dict[str, str]:
        one, other = run_processes(
            2,
            "tests.helpers.finetune_main",
            "tune_all",
            {"runs": which},
            timeout_s=280,
            # peft may lie on a path of the caller's own.
            env={"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert one == other
        return dict(one)

    found = run(before | runs)
    # As if it had been interrupted after step 16.
    (home / "first.json").write_text((home / "questions" / "result.json").read_text())
    weights = load_file(home / "questions" / "model" / "model.safetensors")
    torch.save(weights, home / "first.pt")
    (home / "questions" / "checkpoints" / "latest").write_text("checkpoint-16")
    return found | run(resumed)


def result(home: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((home / name / "result.json").read_text())
    return document


def test_answers_are_learned(ends: dict[str, str], home: Path) -> None:
    assert ends["questions"] == "done"
    found = json.loads((home / "first.json").read_text())
    assert found["steps"] == 24
    assert [step for step, _ in found["val_losses"]] == [0, 8, 16, 24]
    assert found["val_loss"] < 0.5 * found["val_loss_start"]
    assert found["wire_bytes"] < 0.2 * found["dense_bytes"]
    assert found["density_min"] == found["density_max"] == pytest.approx(0.1, abs=1e-3)
    assert found["step_s"] > 0
    assert not found["stopped"]
    assert [reply["prompt"] for reply in found["replies"]] == ["what is 7?", "what is 8?"]
    assert all("cat" in reply["after"] for reply in found["replies"])
    assert not any("cat" in reply["before"] for reply in found["replies"])


def test_model_is_a_plain_folder(ends: dict[str, str], home: Path) -> None:
    import transformers

    assert ends["questions"] == "done"
    folder = str(home / "questions" / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert tokenizer.chat_template == finetune_main.TEMPLATE
    log = (home / "questions" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 25))


def test_resumed_run_ends_as_the_unbroken_one(ends: dict[str, str], home: Path) -> None:
    assert ends["resumed"] == "done"
    first, again = json.loads((home / "first.json").read_text()), result(home, "questions")
    for key in ("val_losses", "train_losses", "wire_bytes", "dense_bytes"):
        assert again[key] == first[key]
    weights = load_file(home / "questions" / "model" / "model.safetensors")
    for name, value in torch.load(home / "first.pt").items():
        assert torch.equal(value, weights[name])
    assert [reply["before"] for reply in again["replies"]] == []


def test_what_would_spoil_a_run_is_refused(ends: dict[str, str]) -> None:
    assert "--out must be a new or empty folder" in ends["not empty"]
    assert "--max-length must be 48 as in the run that is resumed, got 32" in ends["other length"]


def test_plain_text_at_stage_3_in_bf16(ends: dict[str, str], home: Path) -> None:
    assert ends["text"] == "done"
    found = result(home, "text")
    assert found["val_loss"] < found["val_loss_start"]
    assert all(reply["before"] != reply["after"] for reply in found["replies"])
    assert load_file(home / "text" / "model" / "model.safetensors")


@needs_peft
def test_adapters_are_trained_and_merged(ends: dict[str, str], home: Path) -> None:
    assert ends["adapters"] == "done"
    found = result(home, "adapters")
    assert found["val_loss"] < found["val_loss_start"]
    # Only adapters cross the wire.
    assert found["dense_bytes"] == 24 * 4 * found["trained_parameters"]
    assert found["trained_parameters"] < 0.25 * found["parameters"]
    adapter = load_file(home / "adapters" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    merged = load_file(home / "adapters" / "model" / "model.safetensors")
    base = load_file(home / "model" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert changed
    assert all("proj" in name for name in changed)


@pytest.mark.slow
def test_real_model_out_of_a_gguf_file(
    tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from launch.support.tuning_model import load_tuned, replies
    from textgen.model import load_model, save_model

    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_gradprune"
    path = cached / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("labs/smollm2.sh fetches the model")
    model, tokenizer = load_tuned(str(path))
    assert capsys.readouterr().err == ""  # every rank drew a bar over the others'
    question = ["What is the capital of France?"]
    assert "Paris" in replies(model, tokenizer, question)[0]
    save_model(model, tokenizer, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
