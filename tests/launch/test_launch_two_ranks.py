"""launch/train.py on two ranks: pruned runs, interruption and resume."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from ds_gradprune.config import load_block
from ds_gradprune.errors import ConfigError
from tests.helpers import scripts
from tests.helpers.forked import Case, Doom, Ending, Nursery
from tests.helpers.scripts import RESULT_KEYS, arguments, block
from textgen.model import load_model

# DeepSpeed and the libraries it imports warn of their own use of torch.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]


STEPS = 24
STEP = "textgen.train:_step"


@pytest.fixture(scope="module")
def unbroken(here: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run over two ranks through DeepSpeed's launcher, and what it showed."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    launcher = Path(sys.executable).parent / "deepspeed"
    done = subprocess.run(
        [
            str(launcher),
            "--num_accelerators",
            "2",
            "--master_port",
            scripts.free_port(),
            "launch/train.py",
            *arguments(here, out, steps=str(STEPS), eval_every="10", save_every="5"),
        ],
        cwd=scripts.ROOT,
        env=scripts.script_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_train_over_pruned_gradients(unbroken: tuple[Path, str], here: Path) -> None:
    out, shown = unbroken
    result = json.loads((out / "result.json").read_text())
    assert result["val_loss"] < result["val_loss_start"] - 0.3
    assert [step for step, _ in result["val_losses"]] == [0, 10, 20, STEPS]
    assert 0 < result["wire_bytes"] < result["dense_bytes"]
    log = scripts.log_of(out)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert log[0]["density"] == 1.0
    assert result["density_min"] == result["density_max"] == log[-1]["density"] < 0.11
    assert log[0]["decision"]["reason"]
    assert f"step {STEPS}/{STEPS}  loss " in shown
    assert all(
        f"  {name} " in shown for name in ("P", "density", "sent", "link", "tokens/s", "time")
    )
    assert shown.count(f"step {STEPS}/{STEPS}") == 1  # one rank speaks
    verdict = r"dense [\d.]+ s a step.* pruned [\d.]+ s \(density 10 %\)"
    assert len(re.findall(verdict, shown)) == 1
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["latest", "step00000020", "step00000024"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trained_folder_is_a_plain_transformers_folder(unbroken: tuple[Path, str]) -> None:
    model = str(unbroken[0] / "model")
    assert load_model(model).num_parameters() > 0
    generate = transformers.pipeline("text-generation", model=model)
    [reply] = generate("the fox", max_new_tokens=5, do_sample=False)
    assert reply["generated_text"].startswith("the fox")
    assert len(reply["generated_text"]) > len("the fox")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resolved_config_is_complete_and_valid(unbroken: tuple[Path, str]) -> None:
    out, _ = unbroken
    config = json.loads((out / "config.json").read_text())
    assert config["train_batch_size"] == 8
    resolved = load_block(config)
    assert config["gradient_pruning"] == resolved.model_dump(mode="json")
    assert resolved.log_path == str(out / "log.jsonl")
    with pytest.raises(ConfigError, match="must be less than the run's 4 steps"):
        load_block(config, total_steps=4)


def run_two(nursery: Nursery, given: list[str], *dooms: Doom) -> list[Ending]:
    environ = {"MASTER_PORT": scripts.free_port()}
    return nursery.run(Case([given, given], list(dooms), environ))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_interrupted_killed_and_resumed_run_equals_the_unbroken_one(
    unbroken: tuple[Path, str], nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = arguments(here, out, steps=str(STEPS), eval_every="10", save_every="5")
    # One rank alone is asked to stop: both end at the same step, with a checkpoint.
    endings = run_two(nursery, given, Doom(1, STEP, 7, "interrupt"))
    assert [ending.code for ending in endings] == [0, 0], endings[0].told
    assert "continue with --resume" in endings[0].told
    assert "Traceback" not in endings[0].told + endings[1].told
    stopped = json.loads((out / "result.json").read_text())
    assert stopped["stopped"]
    assert stopped["steps"] == 8  # a question takes a step to travel
    # Both are killed some steps after a checkpoint: the log is ahead of what was saved.
    dooms = [Doom(rank, STEP, 10, "kill") for rank in (0, 1)]
    run_two(nursery, [*given, "--resume"], *dooms)
    assert scripts.log_of(out)[-1]["step"] == 17
    assert (out / "checkpoints" / "latest").read_text() == "step00000015"
    endings = run_two(nursery, [*given, "--resume"])
    assert [ending.code for ending in endings] == [0, 0], endings[0].told
    whole, _ = unbroken
    losses, wanted = ([entry["loss"] for entry in scripts.log_of(run)] for run in (out, whole))
    assert losses == wanted
    for name in ("model/model.safetensors", "data/tokens.bin"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    first, second = (json.loads((run / "result.json").read_text()) for run in (out, whole))
    for key in RESULT_KEYS - {"wire_bytes", "dense_bytes"} | {"val_losses"}:
        assert first[key] == second[key], key


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_islands_train_and_resume_in_the_middle_of_an_interval(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    changes = block(prune="update", sync_every=3)
    config = str(scripts.write_config(tmp_path / "config.json", **changes))

    def train_to(out: Path, steps: int, *flags: str) -> dict[str, Any]:
        given = arguments(here, out, config=config, steps=str(steps), eval_every="10")
        endings = run_two(nursery, [*given, *flags])
        assert [ending.code for ending in endings] == [0, 0], endings[0].told
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
        return result

    whole = train_to(tmp_path / "whole", 18)
    assert whole["val_loss"] < whole["val_loss_start"] - 0.3
    validations = json.loads((tmp_path / "whole" / "validation.json").read_text())
    assert validations["val_losses"] == whole["val_losses"]
    shared, own = dict(validations["val_losses"]), dict(validations["own_val_losses"])
    assert list(own) == [10, 18]
    # Step 10 is in the middle of a round. Step 18 ends one, and the residual is kept aside.
    assert 0 < abs(own[10] - shared[10]) < 1
    assert own[18] == shared[18]
    logged = [entry["step"] for entry in scripts.log_of(tmp_path / "whole")]
    assert logged == [1, 2, 3, 6, 9, 12, 15, 18]
    assert whole["density_min"] == whole["density_max"] < 0.11
    train_to(tmp_path / "parts", 11)
    parts = train_to(tmp_path / "parts", 18, "--resume")
    assert [entry for entry in parts["val_losses"] if entry[0] != 11] == whole["val_losses"]
    name = "model/model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses, wanted = (
        [entry["loss"] for entry in scripts.log_of(tmp_path / run)] for run in ("parts", "whole")
    )
    assert losses == wanted


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("stage", "mode"), [(1, "update"), (2, "update"), (3, "update"), (3, "off")]
)
def test_every_stage_trains_resumes_and_writes_a_whole_model(
    stage: int, mode: str, nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """Stage 3 was refused: no rank held a whole model to write."""
    ours = block(prune="update", throttle=None)["gradient_pruning"]
    path = scripts.write_config(
        tmp_path / "config.json",
        zero_optimization={"stage": stage},
        gradient_pruning=ours if mode == "update" else {"enabled": False},
    )
    out = tmp_path / "out"
    for steps, flags in (("8", []), ("11", ["--resume"])):
        given = [*arguments(here, out, config=str(path), steps=steps), *flags]
        endings = run_two(nursery, given)
        assert [ending.code for ending in endings] == [0, 0], endings[0].told
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 11
    assert result["val_loss"] < result["val_loss_start"] - 0.3
    model = load_model(str(out / "model"))
    assert model.num_parameters() == load_model(str(here / "model")).num_parameters()
    assert result["parameters"] == model.num_parameters()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_fault_on_two_ranks_is_told_once(nursery: Nursery, here: Path, tmp_path: Path) -> None:
    endings = run_two(nursery, arguments(here, tmp_path / "out", model="./absent"))
    assert [ending.code for ending in endings] == [2, 2]
    told = "".join(ending.told for ending in endings)
    assert told.count("error: ") == 1
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
