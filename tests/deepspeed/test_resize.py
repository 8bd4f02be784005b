"""What islands had learned and not sent, when another number of them goes on: nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_gradprune.deepspeed import checkpoint
from ds_gradprune.deepspeed.checkpoint import Seat, state_path
from ds_gradprune.deepspeed.resize import Handed, deliver
from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.owned import OwnedResiduals
from ds_gradprune.wire.shares import share_out
from ds_gradprune.wire.transport import Transport
from tests.helpers.loopback_ranks import on_ranks
from tests.helpers.shards import random_shards

KEY = "'w'"


def seat(transport: Transport) -> Seat:
    return Seat(transport, transport.rank, transport.world_size)


def own_of(island: int) -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0]) + island * torch.tensor([0.5, 0.0, -0.25])


def save(folder: Path, islands: int, step: int = 5) -> None:
    """Islands with own weights and kept residuals, and with residuals of gradients."""

    def work(transport: Transport) -> None:
        rank = transport.rank
        island = {"own": {KEY: own_of(rank)}, "kept": [torch.full((2,), rank + 1.0)]}
        state = {"island": island, "residuals": {"w": torch.full((3,), 2.0 * rank + 1.0)}}
        checkpoint.save(str(folder), "tag", seat(transport), state, step)

    on_ranks(islands, work)


def handed(folder: Path | Callable[[int], Path], islands: int) -> list[Any]:
    def work(transport: Transport) -> Handed | None:
        own = folder(transport.rank) if callable(folder) else folder
        loaded = checkpoint.load(str(own), "tag", seat(transport))
        assert loaded is not None
        return loaded.handed

    return on_ranks(islands, work)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (3, 2), (1, 4)])
def test_everybody_gets_what_all_islands_had(before: int, after: int, tmp_path: Path) -> None:
    save(tmp_path, before)
    for found in handed(tmp_path, after):
        assert (found.num_islands, list(found.islands)) == (before, list(range(before)))
        expected = sum(own_of(i) for i in range(before)) - before * own_of(0)
        assert torch.equal(found.own[KEY], expected)
        assert torch.equal(found.kept[0], torch.full((2,), before * (before + 1) / 2))
        # The sum over new ranks, divided by their number, is that over the old ones.
        mean = found.mean_residuals()["w"]
        assert torch.equal(mean, torch.full((3,), before * before / before))


def test_the_same_number_of_islands_hands_nothing_over(tmp_path: Path) -> None:
    save(tmp_path, 2)
    assert handed(tmp_path, 2) == [None, None]


def test_islands_whose_files_are_not_on_every_host_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3)
    disks = [tmp_path, tmp_path / "host1"]
    (disks[1] / "tag").mkdir(parents=True)
    for island in (0, 2):
        shutil.copy(state_path(str(tmp_path), "tag", island, 0), disks[1] / "tag")
    for found in handed(lambda rank: disks[rank], 2):
        assert list(found.islands) == [0, 2]
        assert torch.equal(found.own[KEY], own_of(2) - own_of(0))
    assert "what island 1 had learned and not sent is left out" in caplog.text


def test_a_file_of_another_save_ends_the_resume_everywhere(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path / "later", 3, step=6)
    shutil.copy(state_path(str(tmp_path / "later"), "tag", 2, 0), tmp_path / "tag")
    for error in handed(tmp_path, 2):
        assert isinstance(error, CheckpointError)
        assert "must be of the save after step 5 by 3 islands, got step 6" in str(error)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_shared_weights_take_what_a_dense_exchange_would_have_given(decay: float) -> None:
    """Own weights of three islands, and a kept residual, into one copy."""
    shards = random_shards()
    weights = SharedWeights(shards)
    shared = weights.stores[0].clone()
    keys = [repr(piece.key) for piece in weights.known()]
    start = {repr(piece.key): piece.own.clone() for piece in weights.known()}
    generator = torch.Generator().manual_seed(3)
    owns = [
        {key: start[key] + torch.randn(start[key].shape, generator=generator) for key in keys}
        for _ in range(3)
    ]
    kept = torch.randn(shared.shape, generator=generator)
    sums = {key: sum(own[key] for own in owns) - 3 * owns[0][key] for key in keys}
    found = Handed(3, (0, 1, 2), sums, [kept])
    deliver(weights, owns[0], found, 0.5, decay)
    progress = torch.cat(
        [torch.stack([own[key] - start[key] for own in owns]).sum(0) for key in keys]
    )
    expected = shared + 0.5 * (progress + decay * kept)
    # Six roundings of sums below 16: 2^-20 each.
    assert torch.allclose(weights.stores[0], expected, rtol=0.0, atol=6 * 2.0**-20)
    own = torch.cat([piece.own for piece in weights.known()])
    assert torch.equal(own, weights.stores[0])


def test_what_owners_still_had_to_send_is_delivered() -> None:
    weights = SharedWeights(random_shards(), 8192)
    before = weights.stores[0].clone()
    owed = []
    for island in range(3):
        residuals = OwnedResiduals(keep=True)
        for number, bound in enumerate(weights.bound()):
            share = share_out(bound.layout, 3)[island]
            left = residuals.open(number, share).fill_(1.0)
            residuals.close(number, share, left)
        owed.append((island, residuals.state_dict()))
    deliver(weights, {}, Handed(3, (0, 1, 2), {}, [], owed), 0.5, 1.0)
    # Every element has one owner.
    assert torch.equal(weights.stores[0], before + 0.5)


def test_a_kept_residual_of_other_weights_moves_nothing() -> None:
    weights = SharedWeights(random_shards())
    before = weights.stores[0].clone()
    with pytest.raises(CheckpointError, match="kept residual is of other weights"):
        deliver(weights, {}, Handed(2, (0, 1), {}, [torch.ones(3)]), 0.5, 1.0)
    assert torch.equal(weights.stores[0], before)
