"""DeepSpeed's checkpoint files are read against their checksums before they are loaded."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_gradprune.deepspeed.archives import (
    archives_in,
    check_files,
    fault_of,
    first_fault,
    latest_file,
    needed_by,
    parts_of,
)
from ds_gradprune.errors import CheckpointError
from tests.helpers.loopback_ranks import on_ranks


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint's folder with one file of DeepSpeed's and one of ours."""
    torch.manual_seed(0)
    state = {"module": torch.randn(80, 60), "steps": 7}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "gradient_pruning_island_00000_shard_00000.pt").write_bytes(b"PK\x03\x04 cut")
    return tmp_path / "mp_rank_00_model_states.pt"


def test_a_flipped_bit_is_found_or_changes_nothing(saved: Path) -> None:
    """torch.load took a weight of 1e38 without a word."""
    whole, expected = saved.read_bytes(), torch.load(saved)["module"]
    rng, num_found = random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        saved.write_bytes(data)
        fault = fault_of(str(saved))
        if fault is not None:
            assert f"{saved} is damaged: " in fault
            num_found += 1
        elif data[:4] == whole[:4]:
            with contextlib.suppress(RuntimeError):  # torch has found it
                assert torch.equal(torch.load(saved)["module"], expected)
    assert num_found > 250  # nearly all bytes are a weight's


@pytest.mark.parametrize("size", [4, 100, 3000, -1])
def test_a_cut_file_is_found(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    assert "is damaged: File is not a zip file" in str(fault_of(str(saved)))


def test_what_is_no_archive_is_left_to_its_reader(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"something else")
    assert fault_of(str(tmp_path / "x.pt")) is None
    assert "is damaged: " in str(fault_of(str(tmp_path / "absent.pt")))


def test_the_ranks_of_a_host_share_the_work(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.pt") for number in range(4)]
    for path in paths:
        Path(path).write_bytes(b"PK\x03\x04")
    first = {"LOCAL_RANK": "1", "LOCAL_SIZE": "3"}
    assert f"{paths[1]} is damaged" in str(first_fault(paths, first))
    assert f"{paths[0]} is damaged" in str(first_fault(paths, {"LOCAL_RANK": "x"}))
    assert first_fault(paths[:1], first) is None
    assert sorted(archives_in(str(tmp_path))) == paths


def test_damage_that_one_rank_sees_is_told_on_all(saved: Path) -> None:
    """Only the damaged rank left, and the others waited in a barrier for it."""
    folders = [str(saved.parent), str(saved.parent / "elsewhere")]
    assert on_ranks(2, lambda t: check_files(folders[t.rank], t)) == [None, None]
    saved.write_bytes(saved.read_bytes()[:-20])
    answers = on_ranks(2, lambda t: check_files(folders[t.rank], t))
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    assert "is damaged: File is not a zip file. Nothing was loaded." in str(answers[0])
    assert str(answers[1]) == f"rank 0: {answers[0]}"


def test_a_file_that_one_host_lacks_is_told_on_all(saved: Path, tmp_path: Path) -> None:
    """On a disk of its own it was gone: that rank alone left, and the others waited for it."""
    disks = [tmp_path, tmp_path / "elsewhere"]

    def load(needed: list[Path]) -> list[object]:
        return on_ranks(
            2, lambda t: check_files(str(disks[t.rank]), t, None, [str(needed[t.rank])])
        )

    assert load([saved, saved]) == [None, None]
    answers = load([saved, disks[1] / saved.name])
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    assert all(f"missing: {saved.name} on " in str(answer) for answer in answers)
    assert all("(rank 1)" in str(answer) for answer in answers)
    # What nobody has, DeepSpeed tells on all alike.
    assert load([tmp_path / "absent.pt", tmp_path / "absent.pt"]) == [None, None]


def test_an_optimizer_in_other_parts_is_refused_where_a_plain_run_divided_it(
    tmp_path: Path,
) -> None:
    """Hosts without a shared disk: each has two of the four parts."""
    disks = [tmp_path / "a", tmp_path / "b"]
    for number, disk in enumerate(disks):
        disk.mkdir()
        for part in (2 * number, 2 * number + 1):
            (disk / f"bf16_zero_pp_rank_{part}_mp_rank_00_optim_states.pt").write_bytes(b"x")

    def load(parts: int | None) -> list[object]:
        return on_ranks(2, lambda t: check_files(str(disks[t.rank]), t, parts))

    assert load(4) == [None, None]
    assert load(None) == [None, None]
    answers = load(2)
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    assert all("by 4 ranks that divide the optimizer" in str(answer) for answer in answers)
    # What islands have saved has a check of its own, which knows their number.
    (disks[1] / "gradient_pruning_island_00001_shard_00000.pt").write_bytes(b"x")
    assert load(2) == [None, None]


def test_an_engine_names_its_files() -> None:
    engine: Any = SimpleNamespace(seq_dp_world_size=2)
    for has_zero, is_universal, expected in (
        (False, False, ("latest", None)),
        (True, False, ("latest", 2)),
        (True, True, ("latest_universal", None)),
    ):
        engine.zero_optimization = lambda has_zero=has_zero: has_zero
        engine.load_universal_checkpoint = lambda is_universal=is_universal: is_universal
        assert (latest_file(engine), parts_of(engine)) == expected
        engine._get_ckpt_name = lambda folder, tag: f"{folder}/{tag}/model"
        engine._get_zero_ckpt_name = lambda folder, tag: f"{folder}/{tag}/part"
        names = [] if is_universal else ["d/t/model", *(["d/t/part"] if has_zero else [])]
        assert needed_by(engine, "d", "t", resumes=True) == names
        assert needed_by(engine, "d", "t", resumes=False) == names[:1]
