"""Ranks that die, freeze, or were started differently: the others say so, in time, by name.

Each test tells the story of a run that hung for minutes to hours, or ended in a traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import scripts
from tests.helpers.forked import Case, Doom, Ending, Nursery
from tests.helpers.scripts import arguments, block

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(200)]

TIMEOUT_S = 3.0
"""Of these runs; a frozen rank is found after so long."""

STEP = "textgen.train:_step"
VALIDATION = "textgen.train:_validate"
SAVE = "deepspeed.runtime.engine:DeepSpeedEngine._save_checkpoint"
PREPARE = "textgen.prepare:prepare"
ENGINE = "ds_gradprune:initialize"
CLOSE = "launch.support.run:Run._finish"


def config(folder: Path, **changes: Any) -> str:
    """The path of a configuration with short waits and a link without delay."""
    ours = block(timeout_s=TIMEOUT_S, prune="update", throttle=None)["gradient_pruning"]
    ours |= changes.pop("gradient_pruning", {})
    path = folder / f"config{len(list(folder.glob('config*')))}.json"
    return str(scripts.write_config(path, gradient_pruning=ours, **changes))


def run(nursery: Nursery, ranks: list[list[str]], *dooms: Doom) -> list[Ending]:
    environ = {"MASTER_PORT": scripts.free_port()}
    return nursery.run(Case(ranks, list(dooms), environ))


def assert_told(ending: Ending, *parts: str) -> None:
    """One typed line, exit code 2, no traceback."""
    assert ending.code == 2, ending.told
    assert "Traceback" not in ending.told, ending.told
    [error] = ending.errors
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("doom", "parts"),
    [
        # Its host held the store that says who tells of a failure: nobody ever spoke.
        (Doom(0, STEP, 5, "stop"), ["rank 1 of 2"]),
        (Doom(0, PREPARE, 1, "stop"), ["rank 1 of 2", "lost another rank while starting"]),
        (Doom(1, ENGINE, 1, "stop"), ["rank 0 of 2"]),
        (Doom(1, VALIDATION, 2, "stop"), ["rank 0 of 2", "while training"]),
        (Doom(1, SAVE, 1, "stop"), ["rank 0 of 2", "while saving a checkpoint"]),
        (Doom(1, CLOSE, 1, "stop"), ["rank 0 of 2", "while writing the model"]),
        (Doom(1, ENGINE, 1, "kill"), ["rank 0 of 2"]),
        (Doom(1, VALIDATION, 2, "kill"), ["rank 0 of 2", "while training"]),
        (Doom(1, SAVE, 2, "kill"), ["rank 0 of 2", "while saving a checkpoint"]),
        (Doom(1, CLOSE, 1, "kill"), ["rank 0 of 2", "while writing the model"]),
        # A question to rank 0's store has no time-out in torch: the other rank hung for ever.
        (Doom(0, "launch.support.peers:Peers.new_group", 1, "stop"), ["must end within 8 s"]),
        (
            Doom(0, "ds_gradprune.deepspeed.groups:Groups._mine", 1, "stop"),
            ["rank 0 has shown no life for 3 s", "while starting the engine"],
        ),
    ],
    ids=lambda value: f"{value.deed} {value.rank} in {value.at}" if isinstance(value, Doom) else "",
)
def test_a_rank_that_is_gone_is_told_in_time(
    doom: Doom, parts: list[str], nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = {"config": config(tmp_path), "eval_every": "4", "save_every": "6", "steps": "8"}
    endings = run(nursery, [arguments(here, out, **flags)] * 2, doom)
    if doom.at == SAVE and doom.call == 2:  # the one before is whole
        assert (out / "checkpoints" / "latest").read_text() == "step00000006"
        parts = [*parts, "8 steps were done (rank 0 on ", "The last checkpoint is step00000006 in"]
    assert_told(endings[1 - doom.rank], *parts)


def test_a_rank_that_is_frozen_for_a_moment_is_waited_for(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    path = config(tmp_path, gradient_pruning={"sync_every": 4})
    given = arguments(here, tmp_path / "out", config=path)
    endings = run(nursery, [given, given], Doom(0, STEP, 6, "pause"))
    assert [ending.code for ending in endings] == [0, 0], endings[1].told


def test_sigterm_to_one_rank_while_it_starts_is_told_by_the_other(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """It ended with 130, and the other one in a traceback."""
    given = arguments(here, tmp_path / "out", config=config(tmp_path))
    endings = run(nursery, [given, given], Doom(1, ENGINE, 1, "terminate"))
    assert endings[1].code == 130
    assert_told(endings[0], "has closed the connection")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many kB."""
    if os.geteuid():
        pytest.skip("a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size_kb: int) -> Path:
        options = ["-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], check=False).returncode:
            pytest.skip("a small disk needs the right to mount one")
        return folder / "out"

    yield mount
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.parametrize(
    ("size_kb", "part"),
    [
        (24, "must be writable: No space left on device"),  # the tokens
        (3000, "no space (1,539,008 bytes are needed"),  # the second checkpoint of a rank
        (4000, "no space (1,539,008 bytes are needed"),  # the same, of one rank alone
        (5000, "model must be writable: Error while serializing: I/O error: No space left"),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left_half_written(
    size_kb: int, part: str, small_disk: Any, nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """It was a traceback of torch's or safetensors' writer, and half a checkpoint stayed."""
    out = small_disk(size_kb)
    path = config(tmp_path, gradient_pruning={"prune": "gradient"})
    endings = run(nursery, [arguments(here, out, config=path, save_every="6")] * 2)
    assert [ending.code for ending in endings] == [2, 2], endings[0].told
    told = [error for ending in endings for error in ending.errors]
    assert any(part in error for error in told), told
    assert not [*out.rglob("*.tmp"), *out.rglob(".model*")]
    names = {path.name for path in out.glob("checkpoints/*")}
    newest = (out / "checkpoints" / "latest").read_text() if names else None
    assert names <= {"latest", "step00000006", newest}


def test_a_frozen_rank_between_two_exchanges_is_told_in_time(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """With sync_every 4 the question whether to stop comes before any exchange: it had 2 hours."""
    path = config(tmp_path, gradient_pruning={"sync_every": 4})
    given = arguments(here, tmp_path / "out", config=path, eval_every="50", steps="50")
    endings = run(nursery, [given, given], Doom(1, STEP, 10, "stop"))
    assert_told(endings[0], "rank 0 of 2")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"steps": "13"}, "--steps is 12 on rank 0"),
        ({"model": "nano"}, "--model is "),
        ({"seed": "1"}, "--seed is 0 on rank 0"),
        ({"save_every": "7"}, "--save-every is 500 on rank 0"),
        ({"config": {"gradient_clipping": 0.5}}, "gradient_clipping is absent on rank 0"),
        ({"config": {"bf16": {"enabled": True}}}, "bf16.enabled is absent on rank 0"),
        ({"config": {"train_micro_batch_size_per_gpu": 1}}, "train_micro_batch_size_per_gpu is 2"),
        ({"text": "other.txt"}, "text is "),
        ({"resume": True}, "--resume is false on rank 0"),
        ({"out": "elsewhere"}, '"elsewhere" on rank 1'),  # the text was blamed
    ],
    ids=str,
)
def test_a_rank_that_was_started_differently_is_named(
    changes: dict[str, Any], part: str, nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """Another --model, --steps or --resume hung; another seed or batch trained on in silence."""
    out, plain = tmp_path / "out", config(tmp_path)
    other = dict(changes)
    resume = ["--resume"] if other.pop("resume", False) else []
    if "config" in other:
        other["config"] = config(tmp_path, **other["config"])
    if "text" in other:
        (tmp_path / "other.txt").write_text((here / "text.txt").read_text() + "one line more\n")
        other["text"] = str(tmp_path / "other.txt")
    first = arguments(here, out, config=plain)
    folder = Path(other.pop("out", out))
    second = arguments(here, folder, **({"config": plain} | other)) + resume
    endings = run(nursery, [first, second])
    assert [ending.code for ending in endings] == [2, 2]
    [error] = [error for ending in endings for error in ending.errors]
    assert "All ranks must be given the same, but" in error
    assert part in error
    assert not out.exists()


def test_nan_ends_the_run_and_keeps_the_last_finite_checkpoint(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """In gradient mode training went on with nan, and both kept checkpoints held it."""
    out = tmp_path / "out"
    path = config(tmp_path, gradient_pruning={"prune": "gradient"})
    given = arguments(here, out, config=path, eval_every="50", save_every="4", steps="20")
    endings = run(nursery, [given, given], Doom(1, STEP, 7, "spoil"))
    assert [ending.code for ending in endings] == [2, 2]
    [error] = [error for ending in endings for error in ending.errors]
    assert "the gradients of rank 1 hold inf or nan in step 7. No rank has stepped" in error
    assert "6 steps were done" in error
    assert "The last checkpoint is step00000004 in" in error
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["latest", "step00000004"]
    # What is resumed is the finite one.
    endings = run(nursery, [[*given, "--resume"]] * 2)
    assert [ending.code for ending in endings] == [0, 0], endings[0].told
    assert json.loads((out / "result.json").read_text())["steps"] == 20


def test_of_two_runs_into_one_folder_the_first_is_unharmed(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """Both trained into it, and Ctrl-C at the second deleted the first one's checkpoints."""
    out = tmp_path / "out"
    out.mkdir()
    given = arguments(here, out, config=config(tmp_path), steps="40")
    ranks = scripts.start_ranks(given)
    scripts.wait_for_step(out / "log.jsonl", 1, ranks)
    for flags in ([], ["--resume"]):
        endings = run(nursery, [[*given, *flags]] * 2)
        assert [ending.code for ending in endings] == [2, 2]
    told = scripts.finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert json.loads((out / "result.json").read_text())["steps"] == 40


def test_what_a_resumed_run_does_not_take_from_its_flags_is_said(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """Another learning rate and another text were ignored in silence."""
    out = tmp_path / "out"
    text = scripts.write_text(tmp_path / "text.txt")
    given = {"text": str(text), "config": config(tmp_path)}
    assert [e.code for e in run(nursery, [arguments(here, out, **given)] * 2)] == [0, 0]
    text.write_text(text.read_text() + "one line more\n")
    given["config"] = config(
        tmp_path, optimizer={"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    )
    again = [*arguments(here, out, **(given | {"steps": "14"})), "--resume"]
    endings = run(nursery, [again, again])
    assert [ending.code for ending in endings] == [0, 0], endings[0].told
    assert "note: --text has changed; the run goes on with" in endings[0].told
    assert "note: optimizer has changed in --config" in endings[0].told
    used = json.loads((out / "config.json").read_text())
    assert used["optimizer"]["params"]["lr"] == 3e-3
    # Another kind of optimizer has no state to go on with: KeyError 'momentum' it was.
    given["config"] = config(tmp_path, optimizer={"type": "SGD", "params": {"lr": 1e-3}})
    again = [*arguments(here, out, **(given | {"steps": "16"})), "--resume"]
    endings = run(nursery, [again, again])
    assert [ending.code for ending in endings] == [2, 2]
    assert "optimizer.type must be 'AdamW' as in the run that is resumed" in endings[0].told


@pytest.mark.parametrize("prune", ["update", "gradient"])
def test_no_rank_ever_unpickles_what_another_one_sent(
    prune: str, nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """Whoever reached a port could send a pickle, and it was run: a rank that reads one dies."""
    out = tmp_path / "out"
    path = config(tmp_path, gradient_pruning={"prune": prune}, zero_optimization={"stage": 1})
    given = arguments(here, out, config=path, steps="6", save_every="3")
    reads = "torch.distributed.distributed_c10d:_tensor_to_object"
    dooms = [Doom(rank, reads, 1, "kill") for rank in (0, 1)]
    for flags in ([], ["--resume"]):
        endings = run(nursery, [[*given, *flags]] * 2, *dooms)
        assert [ending.code for ending in endings] == [0, 0], endings[0].told
        given[given.index("--steps") + 1] = "9"
