"""Which island writes DeepSpeed's files on hosts that share a disk, or do not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("default")

from ds_gradprune.deepspeed import disks  # noqa: E402
from ds_gradprune.deepspeed.checkpoint import Seat  # noqa: E402
from ds_gradprune.errors import CheckpointError  # noqa: E402
from ds_gradprune.wire.transport import Transport  # noqa: E402
from tests.helpers.loopback_ranks import on_ranks  # noqa: E402


@pytest.mark.parametrize(
    ("disk_of_rank", "first"),
    [
        ((0, 0, 0, 0), [0, 0, 0, 0]),
        ((0, 0, 1, 1), [0, 0, 2, 2]),
        ((0, 1, 1, 0), [0, 1, 1, 0]),
        ((0, 1, 2, 3), [0, 1, 2, 3]),
    ],
)
def test_the_first_island_on_a_disk_is_found(
    tmp_path: Path, disk_of_rank: tuple[int, ...], first: list[int]
) -> None:
    def work(transport: Transport) -> int:
        folder = tmp_path / str(disk_of_rank[transport.rank]) / "tag"
        return disks.first_island(str(folder), Seat(transport, transport.rank, 4))

    assert on_ranks(4, work) == first
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_ranks_of_an_island_find_the_same(tmp_path: Path) -> None:
    def work(transport: Transport) -> int:
        island, shard = divmod(transport.rank, 2)
        return disks.first_island(str(tmp_path / str(island)), Seat(transport, island, 2, shard, 2))

    assert on_ranks(4, work) == [0, 0, 1, 1]


def test_a_folder_that_cannot_be_written_is_told_by_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    def work(transport: Transport) -> int:
        folder = tmp_path / ("file/tag" if transport.rank else "tag")
        return disks.first_island(str(folder), Seat(transport, transport.rank, 2))

    one, other = on_ranks(2, work)
    assert isinstance(one, CheckpointError)
    assert isinstance(other, CheckpointError)
    assert str(one).endswith(str(other))
    assert "must be a folder that can be written, got: Not a directory" in str(other)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), "enforce"),
    ],
)
def test_what_a_disk_refuses_to_deepspeed_is_told(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    """A full disk was a RuntimeError of torch's file writer, about a position."""
    told = rf"tag could not be saved: .*{reason}.* \(\d+ MB free\). What was saved before is whole"
    with pytest.raises(CheckpointError, match=told), disks.told(str(tmp_path), "tag"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), disks.told(str(tmp_path), "tag"):
        raise RuntimeError("shapes")


def test_a_save_names_itself_on_its_disk(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    disks.name_latest(str(tmp_path), "tag", names=False)
    assert not (tmp_path / "latest").exists()
    disks.name_latest(str(tmp_path), "tag", names=True)
    assert (tmp_path / "latest").read_text() == "tag"
    assert {path.name for path in tmp_path.rglob("*")} == {"tag", "latest", disks.OWN_DISK}
    (tmp_path / "tag" / disks.OWN_DISK).unlink()
    disks.name_latest(str(tmp_path), "tag", names=True, marks=False)  # rank 0's
    assert [*(tmp_path / "tag").iterdir()] == []
    with pytest.raises(CheckpointError, match="latest cannot be written"):
        disks.name_latest(str(tmp_path / "none"), "tag", names=True)
