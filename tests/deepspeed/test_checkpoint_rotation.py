"""Case 15: with `save_total_limit` the second host kept every checkpoint till its disk was full."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from ds_gradprune.deepspeed import rotation
from ds_gradprune.deepspeed.checkpoint import Seat
from ds_gradprune.wire.transport import Transport
from tests.helpers.loopback_ranks import on_ranks

OURS = "gradient_pruning_island_00001_shard_00000.pt"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_rank_0_no_longer_has_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 8, 12):
        make(
            tmp_path / f"checkpoint-{step}", "rng_state_1.pth", f"global_step{step}/{OURS}",
            f"global_step{step}/{OURS}.tmp",
        )  # fmt: skip
    with caplog.at_level(logging.INFO):
        dropped = rotation.drop_orphans(str(tmp_path), ["checkpoint-12"])
    assert dropped == ["checkpoint-4", "checkpoint-8"]
    assert names(tmp_path) == ["checkpoint-12"]
    assert "deleted checkpoint-4, checkpoint-8, which rank 0" in caplog.text


def test_what_an_island_wrote_on_a_disk_of_its_own_goes_with_it(tmp_path: Path) -> None:
    theirs = ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    own = [f"global_step4/{name}" for name in (OURS, "gradient_pruning_own_disk", *theirs)]
    make(tmp_path / "checkpoint-4", "latest", "rng_state_1.pth", *own)
    make(tmp_path / "checkpoint-6", "config.json", *own)
    assert rotation.drop_orphans(str(tmp_path), ["checkpoint-8"]) == ["checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize(
    "content",
    [
        ("global_step4/mp_rank_00_model_states.pt", f"global_step4/{OURS}"),
        ("config.json", f"global_step4/{OURS}"),
        ("notes.txt", OURS),
        ("rng_state_1.pth",),
        ("best/model.pt",),
        ("gradient_pruning_rank_00000_of_00002.pt",),
    ],
)
def test_whatever_is_not_only_ours_stays(content: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-4", *content)
    assert rotation.drop_orphans(str(tmp_path), ["checkpoint-8"]) == []
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", OURS)
    runs = tmp_path / "runs"
    make(runs / "checkpoint-4", OURS)
    (runs / "checkpoint-4" / "link").symlink_to(tmp_path / "elsewhere")
    (runs / "checkpoint-8").symlink_to(tmp_path / "elsewhere")
    assert rotation.drop_orphans(str(runs), ["checkpoint-12"]) == []
    assert (tmp_path / "elsewhere" / OURS).exists()


def test_nothing_is_deleted_where_rank_0_has_nothing(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-4", OURS)
    assert rotation.drop_orphans(str(tmp_path), []) == []
    assert rotation.drop_orphans(str(tmp_path / "missing"), ["a"]) == []


def test_what_cannot_be_deleted_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "a", OURS)
    make(tmp_path / "b", OURS)

    def rmtree(path: str) -> None:
        raise FileNotFoundError if path.endswith("a") else PermissionError("read-only")

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert rotation.drop_orphans(str(tmp_path), ["c"]) == []
    assert f"{tmp_path / 'b'} is left over and cannot be deleted: read-only" in caplog.text


def test_all_hosts_keep_what_rank_0_keeps(tmp_path: Path) -> None:
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    make(hosts[0] / "checkpoint-8", "trainer_state.json", OURS)
    for step in (4, 8):
        make(hosts[1] / f"checkpoint-{step}", OURS)

    def work(transport: Transport) -> list[str]:
        return rotation.rotate(str(hosts[transport.rank]), Seat(transport, transport.rank, 2))

    assert on_ranks(2, work) == [[], ["checkpoint-4"]]
    assert names(hosts[0]) == names(hosts[1]) == ["checkpoint-8"]
