"""One rank's file: whole or not at all, only what can be read again, and no flipped bit is used."""

from __future__ import annotations

import errno
import random
import zipfile
from collections import Counter, OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradprune.deepspeed import statefile
from ds_gradprune.deepspeed.statefile import Stamp
from ds_gradprune.errors import CheckpointError

STAMP = Stamp(island=1, num_islands=4, shard=2, num_shards=8, step=77)


def saved(path: Path, state: Any) -> Any:
    statefile.write(str(path), state, STAMP)
    read, stamp = statefile.read(str(path))
    assert stamp == statefile.read_stamp(str(path)) == STAMP
    return read


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    state = {"step": 3, "own": [torch.arange(3.0)], "island": {"lr": (0.1, None), "on": True}}
    read = saved(tmp_path / "tag" / "state.pt", state)
    assert torch.equal(read.pop("own")[0], torch.arange(3.0))
    assert read == {"step": 3, "island": {"lr": (0.1, None), "on": True}}
    assert [path.name for path in (tmp_path / "tag").iterdir()] == ["state.pt"]


def test_the_file_is_an_archive_that_torch_reads_itself(tmp_path: Path) -> None:
    saved(tmp_path / "state.pt", {"a": torch.arange(100.0)})
    assert zipfile.ZipFile(tmp_path / "state.pt").testzip() is None
    assert torch.equal(torch.load(tmp_path / "state.pt")["a"], torch.arange(100.0))


def test_numbers_of_any_kind_become_pythons(tmp_path: Path) -> None:
    """Case 07: a schedule with numpy rates ended the run at its first save."""
    numbers = {
        "lr": np.float64(0.5), "half": np.float32(0.5), "n": np.int64(3), "on": np.bool_(True),
        "name": np.str_("x"), "part": Fraction(1, 2), ("w", np.int32(0)): [np.float16(1.5)],
    }  # fmt: skip
    read = saved(tmp_path / "state.pt", numbers)
    assert read == {
        "lr": 0.5, "half": 0.5, "n": 3, "on": True, "name": "x", "part": 0.5, ("w", 0): [1.5],
    }  # fmt: skip
    assert {type(value) for value in read.values()} == {float, int, bool, str, list}


def test_kinds_of_dicts_that_schedules_need_stay(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 2, 5])
    state = {"lr_scheduler": schedule.state_dict(), "ordered": OrderedDict(b=1, a=2)}
    read = saved(tmp_path / "state.pt", state)
    schedule.load_state_dict(read["lr_scheduler"])
    assert schedule.milestones == Counter([2, 2, 5])
    assert isinstance(schedule.milestones, Counter)
    assert list(read["ordered"]) == ["b", "a"]


def test_parameters_and_types_of_tensors_can_be_saved(tmp_path: Path) -> None:
    state = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "dtype": torch.bfloat16,
        "size": torch.Size([3]),
    }
    read = saved(tmp_path / "state.pt", state)
    assert not read["p"].requires_grad
    assert (read["dtype"], read["size"]) == (torch.bfloat16, (3,))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"schedule": {"lambda": abs}}, r"state\.schedule\.lambda must be .* got builtin_function"),
        ({"lr": [1.0, torch.Size]}, r"state\.lr\[1\] must be"),
        ({"lr": Path("x")}, r"state\.lr must be .* got PosixPath"),
        ({"lr": np.zeros(3)}, r"state\.lr must be .* got ndarray"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(value: Any, where: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=where):
        statefile.write(str(tmp_path / "tag" / "state.pt"), value, STAMP)
    assert list(tmp_path.iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------


def test_any_flipped_bit_is_named_as_damage(tmp_path: Path) -> None:
    """One flipped exponent bit was loaded, and blamed on the learning rate two steps later."""
    path = tmp_path / "state.pt"
    saved(path, {"own": torch.zeros(300), "step": 3})
    whole = path.read_bytes()
    rng = random.Random(0)
    places = [*range(len(whole) - 60, len(whole)), *rng.sample(range(len(whole)), 300)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged: "):
            statefile.read(str(path))


@pytest.mark.parametrize("kept", [0, 10, 60, 500, -1])
def test_a_cut_file_is_named_as_damage(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    saved(path, {"own": torch.zeros(300)})
    path.write_bytes(path.read_bytes()[:kept])
    for read in (statefile.read, statefile.read_stamp):
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged: it is cut"):
            read(str(path))


def test_a_missing_file_a_folder_and_a_foreign_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.pt is missing"):
        statefile.read(str(tmp_path / "state.pt"))
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        statefile.read(str(tmp_path))
    torch.save({"a": 1}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt is damaged"):
        statefile.read(str(tmp_path / "foreign.pt"))


def test_a_later_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "_VERSION", 9)
    statefile.write(str(tmp_path / "state.pt"), {}, STAMP)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is no state file of this version of ds_gradprune"):
        statefile.read(str(tmp_path / "state.pt"))


# --- the disk -------------------------------------------------------------------------------------


class Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: Any, room: int, error: int) -> None:
        self._file, self._room, self._error = file, room, error

    def write(self, data: Any) -> int:
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(self._error, "No space left on device")
        return int(self._file.write(data))

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100, 40_000])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_the_file_before_stays(
    room: int, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    saved(path, {"step": 1})
    monkeypatch.setattr(
        statefile, "open", lambda name, mode: Full(open(name, mode), room, error), raising=False
    )
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be written: no space \("):
        statefile.write(str(path), {"own": torch.zeros(100_000)}, STAMP)
    monkeypatch.undo()
    assert statefile.read(str(path))[0] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statefile.shutil, "disk_usage", lambda _: Usage(2**21))
    shared = torch.zeros(2**18)
    statefile.write(str(tmp_path / "a.pt"), {"views": [shared[:9], shared[9:], shared[:4]]}, STAMP)
    fault = r"no space \(5,242,880 bytes are needed, 2,097,152 are free\)"
    with pytest.raises(CheckpointError, match=fault):
        statefile.write(str(tmp_path / "b.pt"), {"own": (torch.zeros(2**20),)}, STAMP)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"file/tag/state\.pt cannot be written \(.*directory"
    ):
        statefile.write(str(tmp_path / "file" / "tag" / "state.pt"), {}, STAMP)


def test_what_torch_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("enforce fail\nwith a C++ stack")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(CheckpointError, match=r"written \(RuntimeError: enforce fail\)\.$"):
        statefile.write(str(tmp_path / "state.pt"), {}, STAMP)
    assert list(tmp_path.iterdir()) == []
