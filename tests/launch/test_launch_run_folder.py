"""The run folder: what may be claimed, resumed, dropped and discarded."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import CheckpointError, ConfigError, DataError
from launch.support.run_folder import (
    KEPT_CHECKPOINTS,
    RunFolder,
    checkpoint_tag,
    is_in_use,
    write_json,
)

IDENTITY = {"--seed": 1, "--text": None}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def ended(run: RunFolder) -> RunFolder:
    """The folder of a run that has ended, before any checkpoint."""
    run.claim(IDENTITY, {"text": "abc"})
    run.release()
    return run


def save(run: RunFolder, step: int) -> None:
    (run.checkpoints / checkpoint_tag(step)).mkdir(parents=True)
    (run.checkpoints / "latest").write_text(checkpoint_tag(step))


def steps_in(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir())


# --- new runs -------------------------------------------------------------------------------------


def test_new_and_empty_folders_are_accepted(run: RunFolder) -> None:
    run.check_new()
    assert not run.path.exists()
    run.path.mkdir()
    run.check_new()
    run.claim(IDENTITY)
    assert json.loads((run.path / "run.json").read_text()) == IDENTITY
    run.release()


def test_folder_with_files_is_refused(run: RunFolder) -> None:
    write_json(run.result, {})
    with pytest.raises(ConfigError, match=r"run holds files\. Continue that run with --resume"):
        run.claim(IDENTITY)


def test_file_in_the_place_of_the_folder_is_refused(run: RunFolder) -> None:
    run.path.write_text("x")
    with pytest.raises(ConfigError, match="--out must be a folder, got the file"):
        run.check_new()


def test_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="run must be writable: Not a directory"):
        RunFolder(tmp_path / "file" / "run").claim(IDENTITY)


def test_of_two_runs_that_begin_at_once_one_gets_the_folder(run: RunFolder, monkeypatch) -> None:
    """Two runs into one new --out at once both trained into it."""
    second = RunFolder(run.path)
    monkeypatch.setattr(second, "check_new", lambda: None)  # it looked before the first began
    run.claim(IDENTITY)
    with pytest.raises(ConfigError, match="another run has just begun in"):
        second.claim(IDENTITY)
    # Ctrl-C at the second one, while it was preparing, deleted the folder of the first.
    second.discard()
    assert json.loads((run.path / "run.json").read_text()) == IDENTITY
    run.release()


def test_discard_removes_what_this_run_made_and_nothing_else(run: RunFolder) -> None:
    run.path.mkdir()
    run.claim(IDENTITY)
    write_json(run.config, {})
    write_json(run.data / "tokens.json", {})
    (run.path / "notes.txt").write_text("the user's")
    run.discard()
    run.discard()
    run.release()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def test_discarded_folder_that_was_new_is_gone(run: RunFolder) -> None:
    run.claim(IDENTITY)
    write_json(run.config, {})
    run.discard()
    run.release()
    assert not run.path.exists()


def test_unclaimed_folder_is_never_touched(run: RunFolder) -> None:
    write_json(run.config, {})
    run.discard()
    assert run.config.is_file()


def test_another_host_discards_the_data_it_made(run: RunFolder) -> None:
    run.share()
    write_json(run.data / "tokens.json", {})
    run.discard()
    assert not run.path.exists()


# --- resumed runs ---------------------------------------------------------------------------------


def test_run_resumes_with_what_it_began_with(ended: RunFolder) -> None:
    save(ended, 5)
    assert ended.resume(IDENTITY) == IDENTITY | {"text": "abc"}
    ended.release()


def test_resume_of_another_run_names_every_difference(ended: RunFolder) -> None:
    save(ended, 5)
    with pytest.raises(ConfigError, match=r"--seed must be 1 .* got 2\.\n.*--text must be None"):
        ended.resume({"--seed": 2, "--text": "a.txt"})
    ended.release()


def _resume(path: str, answers: Any) -> None:
    try:
        RunFolder(Path(path)).resume(IDENTITY)
        answers.put("resumed")
    except ConfigError as exc:
        answers.put(str(exc))


def test_run_that_is_alive_is_not_resumed_beside_itself(run: RunFolder) -> None:
    run.claim(IDENTITY)
    save(run, 5)
    assert is_in_use(run.path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    other = context.Process(target=_resume, args=(str(run.path), answers))
    other.start()
    assert "another process trains in" in answers.get(timeout=60)
    other.join()
    run.release()
    assert not is_in_use(run.path)
    assert not is_in_use(run.path / "absent")


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_damaged_identity_is_told(ended: RunFolder, content: str | None) -> None:
    save(ended, 5)
    (ended.path / "run.json").unlink()
    if content is not None:
        (ended.path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json must be readable"):
        ended.resume(IDENTITY)
    ended.release()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None])
def test_latest_that_names_nothing_is_no_checkpoint(run: RunFolder, content: bytes | None) -> None:
    save(run, 5)
    (run.checkpoints / "latest").unlink()
    if content is not None:
        (run.checkpoints / "latest").write_bytes(content)
    assert run.newest() is None


# --- while it runs --------------------------------------------------------------------------------


def test_newest_checkpoints_are_kept(run: RunFolder) -> None:
    for step in (9, 10, 100, 1000):
        save(run, step)
        run.drop_old_checkpoints()
    assert steps_in(run) == [checkpoint_tag(100), checkpoint_tag(1000)]
    assert KEPT_CHECKPOINTS == 2
    assert run.newest() == checkpoint_tag(1000)


def test_only_checkpoints_of_the_run_are_dropped(run: RunFolder, tmp_path: Path) -> None:
    """A user's checkpoints/best was deleted: "best" sorts before "step"."""
    for step in (1, 2, 3, 4):
        save(run, step)
    for name in ("best", "step7", "step00000001.copy"):
        (run.checkpoints / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (run.checkpoints / checkpoint_tag(0)).symlink_to(tmp_path / "elsewhere")
    run.drop_old_checkpoints()
    kept = ["best", checkpoint_tag(0), "step00000001.copy", checkpoint_tag(3), checkpoint_tag(4)]
    assert steps_in(run) == sorted([*kept, "step7"])


def test_checkpoint_to_resume_from_is_never_dropped(run: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        save(run, step)
    (run.checkpoints / "latest").write_text(checkpoint_tag(1))  # the user went back to it
    run.drop_old_checkpoints()
    assert steps_in(run) == [checkpoint_tag(step) for step in (1, 3, 4)]


def test_unfinished_checkpoint_is_removed_and_a_finished_one_is_not(run: RunFolder) -> None:
    save(run, 5)
    (run.checkpoints / checkpoint_tag(6)).mkdir()
    run.drop_unfinished(checkpoint_tag(6))
    run.drop_unfinished(checkpoint_tag(5))
    assert steps_in(run) == [checkpoint_tag(5)]


@pytest.mark.parametrize("how", ["removed", "another in its place"])
def test_a_folder_that_is_gone_is_claimed_again_with_the_next_checkpoint(
    how: str, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk was unmounted: the checkpoints that came later could not be resumed from."""
    run.claim(IDENTITY, {"text": "abc"})
    save(run, 10)
    run.name_newest(checkpoint_tag(10))
    assert not caplog.records
    run.path.rename(run.path.with_name("moved"))
    if how != "removed":
        run.path.mkdir()
        (run.path / "run.json").write_text("{}")
    save(run, 20)
    run.name_newest(checkpoint_tag(20))
    assert "was removed, or its disk was unmounted" in caplog.text
    assert is_in_use(run.path)
    run.name_newest(checkpoint_tag(20))
    assert len(caplog.records) == 1
    run.release()
    assert RunFolder(run.path).resume(IDENTITY)["text"] == "abc"


def test_json_is_replaced_as_a_whole(run: RunFolder) -> None:
    write_json(run.result, {"steps": 1})
    write_json(run.result, {"steps": 2})
    assert json.loads(run.result.read_text()) == {"steps": 2}
    assert [path.name for path in run.path.iterdir()] == ["result.json"]


def test_numbers_that_json_has_not_are_null(run: RunFolder) -> None:
    """`"val_loss": NaN` was written, which no JSON reader takes."""
    nan, inf = float("nan"), float("inf")
    write_json(run.result, {"val_loss": nan, "val_losses": [(0, 5.5), (10, inf)], "n": {"x": -inf}})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    document = json.loads(run.result.read_text(), parse_constant=refuse)
    assert document == {"val_loss": None, "val_losses": [[0, 5.5], [10, None]], "n": {"x": None}}


def test_disk_that_refuses_is_told_and_nothing_is_left(run: RunFolder, monkeypatch) -> None:
    run.path.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"result\.json must be writable"):
        write_json(run.result, {})
    run.path.unlink()
    run.path.mkdir()

    def full(self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match=r"result\.json must be writable: No space left on device"):
        write_json(run.result, {})
    assert list(run.path.iterdir()) == []
