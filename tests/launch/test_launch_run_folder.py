"""The run folder: what may be overwritten, resumed, discarded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_gradprune.errors import CheckpointError, ConfigError, DataError
from launch.support.run_folder import (
    KEPT_CHECKPOINTS,
    RunFolder,
    checkpoint_tag,
    write_json,
)

IDENTITY = {"--seed": 1, "--text": None}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(run: RunFolder, step: int) -> None:
    (run.checkpoints / checkpoint_tag(step)).mkdir(parents=True)
    (run.checkpoints / "latest").write_text(checkpoint_tag(step))


def test_new_and_empty_folders_are_accepted(run: RunFolder) -> None:
    run.check_new()
    assert not run.path.exists()
    run.path.mkdir()
    run.check_new()


def test_folder_with_files_is_refused(run: RunFolder) -> None:
    write_json(run.result, {})
    with pytest.raises(ConfigError, match=r"run holds files\. Continue that run with --resume"):
        run.check_new()


def test_file_in_the_place_of_the_folder_is_refused(run: RunFolder) -> None:
    run.path.write_text("x")
    with pytest.raises(ConfigError, match="--out must be a folder, got the file"):
        run.check_new()


def test_run_resumes_with_what_it_began_with(run: RunFolder) -> None:
    run.write_identity(IDENTITY)
    save(run, 5)
    run.check_resumable(IDENTITY)


def test_resume_without_checkpoint_is_refused(run: RunFolder) -> None:
    run.write_identity(IDENTITY)
    with pytest.raises(CheckpointError, match=r"--resume must find a checkpoint"):
        run.check_resumable(IDENTITY)


def test_resume_of_another_run_names_every_difference(run: RunFolder) -> None:
    run.write_identity(IDENTITY)
    save(run, 5)
    with pytest.raises(ConfigError, match=r"--seed must be 1 .* got 2\.\n.*--text must be None"):
        run.check_resumable({"--seed": 2, "--text": "a.txt"})


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_damaged_identity_is_told(run: RunFolder, content: str | None) -> None:
    save(run, 5)
    if content is not None:
        (run.path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json must be readable"):
        run.check_resumable(IDENTITY)


def test_newest_checkpoints_are_kept(run: RunFolder) -> None:
    for step in (9, 10, 100, 1000):
        save(run, step)
        run.drop_old_checkpoints()
    kept = sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir())
    assert kept == [checkpoint_tag(100), checkpoint_tag(1000)]
    assert len(kept) == KEPT_CHECKPOINTS
    assert (run.checkpoints / "latest").read_text() == checkpoint_tag(1000)


def test_log_is_rewound_to_the_resumed_step(run: RunFolder) -> None:
    run.path.mkdir()
    run.rewind_log(3)
    assert not run.log.exists()
    for step in range(1, 6):
        run.append_log({"step": step, "loss": 0.5})
    with run.log.open("a") as file:
        file.write('{"step": 2, "lo')
    run.rewind_log(3)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [1, 2, 3]


def test_discarded_folder_is_gone(run: RunFolder) -> None:
    write_json(run.config, {})
    run.discard()
    run.discard()
    assert not run.path.exists()


def test_json_is_replaced_as_a_whole(run: RunFolder) -> None:
    write_json(run.result, {"steps": 1})
    write_json(run.result, {"steps": 2})
    assert json.loads(run.result.read_text()) == {"steps": 2}
    assert [path.name for path in run.path.iterdir()] == ["result.json"]


def test_disk_that_refuses_is_told(run: RunFolder) -> None:
    run.path.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"result\.json must be writable"):
        write_json(run.result, {})
