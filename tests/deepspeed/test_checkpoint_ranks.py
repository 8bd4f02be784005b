"""A save and a load over all ranks: what goes wrong on one of them is told by all."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradprune.deepspeed import checkpoint
from ds_gradprune.deepspeed.checkpoint import Loaded, Seat
from ds_gradprune.errors import CheckpointError, UnsupportedError
from ds_gradprune.wire.transport import Transport
from tests.helpers.loopback_ranks import on_ranks


def seat(transport: Transport, num_shards: int = 1) -> Seat:
    island, shard = divmod(transport.rank, num_shards)
    return Seat(transport, island, transport.world_size // num_shards, shard, num_shards)


def save(folder: Path, world_size: int, num_shards: int = 1, step: int = 5) -> None:
    def work(transport: Transport) -> None:
        state = {"rank": transport.rank, "own": torch.full((3,), float(transport.rank))}
        checkpoint.save(str(folder), "tag", seat(transport, num_shards), state, step)

    assert on_ranks(world_size, work) == [None] * world_size


def load(folder: Path | Callable[[int], Path], world_size: int, num_shards: int = 1) -> list[Any]:
    """What every rank loads, or its error; a function gives each rank a disk of its own."""

    def work(transport: Transport) -> Loaded | None:
        own = folder(transport.rank) if callable(folder) else folder
        return checkpoint.load(str(own), "tag", seat(transport, num_shards))

    return on_ranks(world_size, work)


def fault(answers: list[Any]) -> str:
    """The one message of all ranks; only the folder in front is each rank's own."""
    assert len({str(answer).split(" ", 2)[2] for answer in answers}) == 1
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    return str(answers[0])


def name(island: int, shard: int = 0) -> str:
    return f"gradient_pruning_island_{island:05d}_shard_{shard:05d}.pt"


# --- the same run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_rank_reads_its_own_file(num_shards: int, tmp_path: Path) -> None:
    save(tmp_path, 4, num_shards)
    assert len(list((tmp_path / "tag").iterdir())) == 4
    for rank, loaded in enumerate(load(tmp_path, 4, num_shards)):
        assert loaded.state["rank"] == rank
        assert torch.equal(loaded.state["own"], torch.full((3,), float(rank)))
        assert (loaded.step, loaded.num_islands) == (5, 4 // num_shards)
        assert not loaded.is_resized
        assert len(loaded.paths) == 4


def test_hosts_without_latest_take_that_of_rank_0(tmp_path: Path) -> None:
    """Hosts with disks of their own were told that their checkpoints differ."""
    latest = {0: "new", 1: None, 2: "new"}

    def work(transport: Transport) -> str | None:
        disk = tmp_path / str(transport.rank)
        disk.mkdir(exist_ok=True)
        if tag := latest[transport.rank]:
            (disk / "latest").write_text(tag)
        return checkpoint.agree_tag(str(disk), None, seat(transport))

    assert on_ranks(3, work) == ["new"] * 3
    latest[1] = "old"
    assert "has not the same tag everywhere: new on " in fault(on_ranks(3, work))


def test_hosts_need_only_their_own_files(tmp_path: Path) -> None:
    save(tmp_path, 2)
    disks = [tmp_path / "host0", tmp_path / "host1"]
    for rank, disk in enumerate(disks):
        (disk / "tag").mkdir(parents=True)
        shutil.copy(tmp_path / "tag" / name(rank), disk / "tag")
    assert [loaded.state["rank"] for loaded in load(lambda rank: disks[rank], 2)] == [0, 1]


def test_a_checkpoint_of_a_run_without_pruning_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "mp_rank_00_model_states.pt").write_text("")
    assert load(tmp_path, 2) == [None, None]
    assert "holds no pruning state: a run without gradient pruning saved it" in caplog.text


def test_random_generators_go_on_where_they_were() -> None:
    state = checkpoint.random_state()

    def draws() -> list[float]:
        return [float(torch.rand(1)), float(np.random.rand()), random.random(), random.gauss(0, 1)]

    first = draws()
    checkpoint.set_random_state(state)
    assert draws() == first
    assert json.dumps(state["numpy"])


# --- another number of islands --------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1), (1, 4)])
def test_islands_that_are_more_or_fewer_read_those_of_island_0(
    before: int, after: int, tmp_path: Path
) -> None:
    save(tmp_path, 2 * before, num_shards=2)
    for rank, loaded in enumerate(load(tmp_path, 2 * after, num_shards=2)):
        assert loaded.is_resized
        assert loaded.num_islands == before
        assert loaded.state["rank"] == rank % 2
        assert set(loaded.paths) == {(i, s) for i in range(before) for s in range(2)}


def test_a_new_host_without_the_folder_is_named(tmp_path: Path) -> None:
    save(tmp_path, 2)
    disks = [tmp_path, tmp_path, tmp_path / "new"]
    message = fault(load(lambda rank: disks[rank], 3))
    assert "cannot be resumed: rank 2 on " in message
    assert "new/tag is missing" in message
    (disks[2] / "tag").mkdir(parents=True)
    assert f"{name(0)} is missing." in fault(load(lambda rank: disks[rank], 3))


def test_islands_of_another_size_are_refused_with_both_numbers(tmp_path: Path) -> None:
    save(tmp_path, 4, num_shards=2)
    assert "was saved with 2 ranks in an island, and now an island has 1" in fault(
        load(tmp_path, 4)
    )


def test_files_of_a_larger_run_under_the_same_tag_are_dropped(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "tag").iterdir()) == [name(0), name(1)]
    assert [loaded.is_resized for loaded in load(tmp_path, 2)] == [False, False]


# --- what is wrong --------------------------------------------------------------------------------


def test_a_missing_file_is_named_by_all_ranks(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "tag" / name(1)).unlink()
    message = fault(load(tmp_path, 3))
    assert "rank 1 on " in message
    assert f"{name(1)} is missing. Resume from another checkpoint" in message


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_file_is_named_by_all_ranks(damaged: int, tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = tmp_path / "tag" / name(damaged)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{name(damaged)} is damaged: its checksum is wrong" in fault(load(tmp_path, 2))
    path.write_bytes(data[:-1])
    assert f"{name(damaged)} is damaged: it is cut" in fault(load(tmp_path, 2))


def test_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    save(tmp_path / "old", 2, step=10)
    save(tmp_path, 2, step=20)
    shutil.copy(tmp_path / "old" / "tag" / name(1), tmp_path / "tag")
    message = fault(load(tmp_path, 2))
    assert "has not the same step everywhere: 20 on " in message
    assert "A save was cut short" in message


def test_files_of_an_earlier_release_are_named(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "gradient_pruning_rank_00000_of_00002.pt").write_text("")
    assert "was saved by ds_gradprune 0.1, whose files this version does not read" in fault(
        load(tmp_path, 2)
    )


def test_a_folder_of_other_islands_only_is_named(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for island in (0, 1):
        (tmp_path / "tag" / name(island)).unlink()
    assert "lacks the files of island 0 and of this run's ranks" in fault(load(tmp_path, 2))


def test_many_faults_are_counted(tmp_path: Path) -> None:
    message = fault(load(tmp_path, 8))
    assert message.count("is missing") == 4
    assert "4 more ranks tell the like." in message


def test_a_state_that_cannot_be_saved_on_one_rank_stops_all(tmp_path: Path) -> None:
    def work(transport: Transport) -> None:
        state = {"schedule": abs if transport.rank == 1 else 1}
        checkpoint.save(str(tmp_path), "tag", seat(transport), state)

    answers = on_ranks(3, work)
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    assert str(answers[1]).startswith("state.pruning.schedule must be a number")
    assert str(answers[0]).startswith("rank 1: state.pruning.schedule must be a number")


def test_what_the_caller_finds_wrong_on_one_rank_stops_all() -> None:
    def work(transport: Transport) -> None:
        error = UnsupportedError("other model") if transport.rank == 0 else None
        checkpoint.agree_on(error, seat(transport))

    assert [str(answer) for answer in on_ranks(2, work)] == ["other model", "rank 0: other model"]


# --- tags -----------------------------------------------------------------------------------------


def agreed(folders: list[Path], tag: Any = None) -> list[Any]:
    def work(transport: Transport) -> str | None:
        return checkpoint.agree_tag(str(folders[transport.rank]), tag, seat(transport))

    return on_ranks(len(folders), work)


def test_the_latest_tag_is_that_of_the_file(tmp_path: Path) -> None:
    assert agreed([tmp_path] * 2) == [None, None]
    (tmp_path / "latest").write_text("step10\n")
    assert agreed([tmp_path] * 2) == ["step10", "step10"]
    assert agreed([tmp_path] * 2, "best/one") == ["best/one"] * 2
    assert agreed([tmp_path] * 2, 7) == ["7", "7"]
    assert checkpoint.latest_tag(str(tmp_path), "latest_universal") is None
    (tmp_path / "latest_universal").write_text("step10_universal")
    assert checkpoint.latest_tag(str(tmp_path), "latest_universal") == "step10_universal"


@pytest.mark.parametrize(
    "content", [b"../../..", b"/etc", b"", b"a/../b", b"..", b"a\\..\\b", b"a\nb", b"\0", b"a//b"]
)
def test_a_tag_never_leads_out_of_the_folder(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest must name a folder inside the checkpoint"):
        checkpoint.latest_tag(str(tmp_path))
    assert "must name a folder inside" in fault(agreed([tmp_path] * 2))
    tag = content.decode()
    answers = on_ranks(2, lambda t: checkpoint.save(str(tmp_path), tag, seat(t), {}))
    assert all("the tag must name a folder inside" in str(answer) for answer in answers)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_latest_that_cannot_be_read_is_told_by_all(tmp_path: Path) -> None:
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "latest").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "folder" / "latest").mkdir(parents=True)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "latest").write_text("step10")
    assert "latest must be a text file" in fault(agreed([tmp_path / "good", tmp_path / "binary"]))
    assert "Is a directory" in fault(agreed([tmp_path / "folder", tmp_path / "good"]))


def test_hosts_with_other_tags_are_named(tmp_path: Path) -> None:
    for host, tag in (("a", "step10"), ("b", "step8")):
        (tmp_path / host).mkdir()
        (tmp_path / host / "latest").write_text(tag)
    message = fault(agreed([tmp_path / "a", tmp_path / "b"]))
    assert "has not the same tag everywhere: step10 on " in message
    assert ", step8 on " in message
