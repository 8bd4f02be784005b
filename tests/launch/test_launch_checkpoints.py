"""Checkpoints: never nan over a good one, a full disk told, a damaged file told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_gradprune.errors import CheckpointError, NonFiniteError, UnsupportedError
from launch.support.checkpoints import load_checkpoint, save_checkpoint, whole_weights
from launch.support.peers import Peers
from launch.support.place import Place
from launch.support.resumed import resumed_tag
from launch.support.run_folder import RunFolder

PEERS = Peers(Place())


class Engine:
    """What is asked of a DeepSpeed engine here."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.module = torch.nn.Linear(2, 2)
        self.optimizer: Any = torch.optim.Adam(self.module.parameters())
        self.module(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self._fault = fault

    def save_checkpoint(
        self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool
    ) -> None:
        path = Path(folder) / tag
        path.mkdir(parents=True)
        (path / "weights.tmp").write_text("half of it")
        if self._fault is not None:
            raise self._fault
        assert not save_latest  # a rank that is killed now must not leave `latest` at this one

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        if self._fault is not None:
            raise self._fault
        return None, {}

    def zero_optimization_stage(self) -> int:
        return 0


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_finite_state_is_saved_and_old_ones_dropped(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        save_checkpoint(Engine(), folder, PEERS, step, {})
    assert folder.newest() == "step00000003"
    assert not (folder.checkpoints / "step00000001").exists()


def test_a_host_with_a_disk_of_its_own_names_its_checkpoint(folder: RunFolder) -> None:
    """The second host's disk had no `latest`, and --resume said that ranks differ."""
    second: Any = SimpleNamespace(
        rank=1,
        is_first=False,
        place=Place(rank=1, world_size=2),
        gather=lambda value: [value],
        together=lambda work: work(),
    )
    save_checkpoint(Engine(), folder, second, 3, {})
    assert folder.newest() == "step00000003"


def spoil_weight(engine: Engine) -> None:
    with torch.no_grad():
        engine.module.weight[0, 0] = torch.nan


def spoil_moment(engine: Engine) -> None:
    engine.optimizer.state[engine.module.weight]["exp_avg"][0, 0] = torch.inf


def spoil_wrapped_moment(engine: Engine) -> None:
    spoil_moment(engine)
    engine.optimizer = SimpleNamespace(optimizer=engine.optimizer)  # as bf16 and ZeRO do


def spoil_shard(engine: Engine) -> None:
    """ZeRO-3: a rank holds its part of a weight apart from the weight."""
    weight: Any = engine.module.weight
    weight.ds_tensor = torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_moment, spoil_wrapped_moment, spoil_shard])
def test_nan_never_replaces_a_finite_checkpoint(folder: RunFolder, spoil: Any) -> None:
    """A run whose loss was nan went on and saved, until both kept checkpoints held nan."""
    engine = Engine()
    save_checkpoint(engine, folder, PEERS, 1, {})
    spoil(engine)
    with pytest.raises(NonFiniteError, match=r"after step 2 on rank 0, .* step00000001 is kept"):
        save_checkpoint(engine, folder, PEERS, 2, {})
    assert folder.newest() == "step00000001"
    assert (folder.checkpoints / "step00000001").is_dir()
    assert not (folder.checkpoints / "step00000002").exists()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            r"\[enforce fail at inline_container.cc:672\] . unexpected pos",
        ),
    ],
)
def test_full_disk_is_told_and_what_was_begun_removed(
    folder: RunFolder, fault: Exception, reason: str
) -> None:
    """A full disk was a traceback about an inline container, and stayed full."""
    save_checkpoint(Engine(), folder, PEERS, 1, {})
    with pytest.raises(CheckpointError, match=rf"step00000002 could not be saved: {reason}.* free"):
        save_checkpoint(Engine(fault), folder, PEERS, 2, {})
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["latest", "step00000001"]


def test_other_errors_of_a_save_stay_what_they_are(folder: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        save_checkpoint(Engine(RuntimeError("a bug")), folder, PEERS, 1, {})


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (KeyError("momentum"), CheckpointError, "must be readable: KeyError 'momentum'. Write the"),
        (AssertionError(), CheckpointError, "must be readable: AssertionError AssertionError"),
        (UnsupportedError("named."), UnsupportedError, "named"),
        (None, CheckpointError, "step00000001 must be a checkpoint of DeepSpeed, but is not"),
    ],
)
def test_checkpoint_that_cannot_be_loaded_is_told(
    folder: RunFolder, fault: Exception | None, kind: type[Exception], message: str
) -> None:
    save_checkpoint(Engine(), folder, PEERS, 1, {})
    with pytest.raises(kind, match=message):
        load_checkpoint(Engine(fault), folder, resumed_tag(PEERS, folder))


def test_latest_that_names_nothing_says_so(folder: RunFolder) -> None:
    """An AssertionError without a word was all, where the tag's folder was missing."""
    save_checkpoint(Engine(), folder, PEERS, 1, {})
    (folder.checkpoints / "latest").write_text("step00000009")
    with pytest.raises(CheckpointError, match="latest names, but has no folder step00000009"):
        load_checkpoint(Engine(), folder, resumed_tag(PEERS, folder))


def test_latest_that_leads_out_of_the_folder_is_refused(folder: RunFolder) -> None:
    """`../../..` was followed, and its files are unpickled."""
    save_checkpoint(Engine(), folder, PEERS, 1, {})
    (folder.checkpoints / "latest").write_text("../checkpoints/step00000001")
    with pytest.raises(CheckpointError, match="must name a folder inside the checkpoint folder"):
        load_checkpoint(Engine(), folder, resumed_tag(PEERS, folder))


def test_what_our_own_part_refuses_leaves_no_half_of_a_checkpoint(folder: RunFolder) -> None:
    """One rank's disk was full, and the other ranks' files of that save stayed."""
    save_checkpoint(Engine(), folder, PEERS, 1, {})
    fault = CheckpointError("rank 1: no space.")
    with pytest.raises(CheckpointError, match=r"rank 1: no space\."):
        save_checkpoint(Engine(fault), folder, PEERS, 2, {})
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["latest", "step00000001"]


def test_whole_weights_are_the_shared_ones() -> None:
    engine, entered = Engine(), []

    class Shared:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    with whole_weights(engine):
        pass
    engine.gradprune = SimpleNamespace(shared_weights=Shared)
    with whole_weights(engine):
        assert entered == ["in"]
    assert entered == ["in", "out"]
