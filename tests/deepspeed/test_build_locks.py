"""Locks of killed compilations are found before DeepSpeed waits for them for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ds_gradprune.deepspeed.build_locks import (
    LONGEST_BUILD_S,
    refuse_stale_shm_lock,
    stale_locks,
    warn_of_locks,
    warning,
)
from ds_gradprune.errors import UnsupportedError


def lock_in(folder: Path, age_s: float = 0.0, op: str = "fused_adam") -> Path:
    path = folder / op / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    made_s = time.time() - age_s
    os.utime(path, (made_s, made_s))
    return path


def test_a_lock_that_no_process_has_open_is_stale_however_young(tmp_path: Path) -> None:
    """A start killed while an op loads left one; every later start hung without a word."""
    path = lock_in(tmp_path)
    assert stale_locks(tmp_path) == [path]
    assert warning([path]).endswith(f"waits for it for ever: rm {path}")


def test_the_op_that_training_never_loads_blocks_nobody(tmp_path: Path) -> None:
    lock_in(tmp_path, op="deepspeed_shm_comm")
    assert stale_locks(tmp_path) == []


def test_a_lock_that_is_held_is_not(tmp_path: Path) -> None:
    path = lock_in(tmp_path, LONGEST_BUILD_S + 60.0)  # or the clock has jumped
    with path.open():
        assert stale_locks(tmp_path) == []


def test_where_processes_cannot_be_looked_at_age_decides(tmp_path: Path) -> None:
    nothing = tmp_path / "no proc"
    lock_in(tmp_path)
    assert stale_locks(tmp_path, nothing) == []
    path = lock_in(tmp_path, LONGEST_BUILD_S + 60.0)
    assert stale_locks(tmp_path, nothing) == [path]


def test_torchs_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert stale_locks() == []
    direct, deeper = lock_in(tmp_path), lock_in(tmp_path / "py311_cpu")
    assert stale_locks() == [direct, deeper]


def test_a_start_that_would_wait_for_ever_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    refuse_stale_shm_lock()
    path = lock_in(tmp_path / "py311_cpu", op="deepspeed_shm_comm")
    with pytest.raises(UnsupportedError, match=f"no process holds {path}"):
        refuse_stale_shm_lock()


def test_locks_of_killed_compilations_are_told_once_per_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script of one's own, and launch/finetune.py, waited for them without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = lock_in(tmp_path)
    told: list[str] = []
    for local_rank in ("1", "0", "0"):  # launch/ warns, and then `initialize`
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        warn_of_locks(told.append)
    assert told == [warning([path])]
