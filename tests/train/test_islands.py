"""Exchanges of updates between islands, on loopback: equal bits, conservation, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.errors import NonFiniteError, TransportError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.islands import Islands, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackTransport
from tests.helpers.ranks import VirtualClock, run_ranks
from tests.helpers.shards import PlainShards, random_shards

SIGNALS = RankSignals(None, False, None, 0.0, 0.0, 0, 0)
BUCKET_NUMEL = 8192  # the shards have about 11,000 elements: two buckets


def make(
    transport: LoopbackTransport,
    shards: PlainShards,
    *,
    slow: float = 0.0,
    decay: float | None = None,
    value_bits: int = 32,
    clip: float | None = None,
    sparse_scale: float | None = None,
    unpruned_bits: int | None = None,
) -> Islands:
    return Islands(
        SharedWeights(shards, BUCKET_NUMEL),
        AllGather(transport),
        Stopwatch(VirtualClock().now_s),
        value_bits=value_bits,
        scale=update_scale(transport.world_size, None),
        rule=make_rule(slow, 1),
        kept=None if decay is None else KeptResidual(decay),
        clip=clip,
        sparse_scale=sparse_scale,
        unpruned_bits=unpruned_bits,
    )


def train(shards: PlainShards, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    for name, tensor in shards.tensors.items():
        if name not in shards.frozen:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)


def exchange(islands: Islands, step: int, k: int = 200) -> None:
    if k == 4096:
        prepared = islands.prepare_dense([])
    else:
        prepared = islands.prepare(k, step=step, signals=SIGNALS)
        prepared.write()
    prepared.start()
    refuse(prepared.deliver(), step)
    prepared.commit()


def exchange_all(islands: Islands, step: int, *, unscaled: bool = True) -> int:
    """All elements in the codec, as in an unpruned warm-up; bytes of the payloads."""
    prepared = islands.prepare(4096, step=step, signals=SIGNALS, unscaled=unscaled)
    prepared.write()
    prepared.start()
    refuse(prepared.deliver(), step)
    prepared.commit()
    return sum(prepared.sizes)


def on_islands(count: int, work: Callable[[Islands, PlainShards, int], Any], **options: Any) -> Any:
    def main(transport: LoopbackTransport) -> Any:
        shards = random_shards()
        return work(make(transport, shards, **options), shards, transport.rank)

    return run_ranks(count, main)


@pytest.mark.parametrize("value_bits", [2, 4, 16, 32])
@pytest.mark.parametrize(
    "options", [{}, {"slow": 1.0}, {"decay": 0.95}, {"decay": 1.0, "slow": 1.0}]
)
def test_shared_weights_are_equal_after_every_exchange(
    options: dict[str, float], value_bits: int
) -> None:
    def work(islands: Islands, shards: PlainShards, rank: int) -> list[int]:
        crcs = []
        for step, k in enumerate([200, 40, 4096, 1, 300], start=1):
            train(shards, rank, step)
            exchange(islands, step, k)
            crcs.append(islands.weights.crc())
        return crcs

    ranks = on_islands(3, work, value_bits=value_bits, **options)
    assert ranks[0] == ranks[1] == ranks[2]
    assert len(set(ranks[0])) == 5


@pytest.mark.parametrize("options", [{}, {"decay": 0.95, "slow": 1.0}])
def test_an_island_that_shouts_moves_no_more_than_the_others(options: dict[str, float]) -> None:
    """Two buckets, three islands, and one whose progress is a million times too large."""

    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[int, float]:
        start = islands.weights.stores[0].clone()
        for step in range(1, 4):
            train(shards, rank, step)
            if rank == 2:
                for tensor in shards.tensors.values():
                    tensor.mul_(1e6)
            exchange(islands, step)
        return islands.weights.crc(), float((islands.weights.stores[0] - start).norm())

    quiet = on_islands(3, work, clip=1.0, **options)
    loud = on_islands(3, work, **options)
    assert len({crc for crc, _ in quiet}) == 1
    assert loud[0][1] > 1e4 * quiet[0][1] > 0.0


def test_an_unscaled_exchange_moves_by_the_mean_of_what_was_sent() -> None:
    """An unpruned warm-up once multiplied the mean by the root of N, and lost 1.5 % of the loss."""

    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.cat([store.clone() for store in islands.weights.stores])
        train(shards, rank, 0)
        learned = torch.cat([piece.own.clone() for piece in shards.pieces()]) - before
        exchange_all(islands, 1)
        return torch.cat(list(islands.weights.stores)) - before, learned

    (moved, first), (_, second) = on_islands(2, work)
    # Sums of numbers below 4, so that a rounding is at most 2 ** -23.
    torch.testing.assert_close(moved, (first + second) / 2, rtol=0.0, atol=4 * 2.0**-23)
    assert moved.abs().max() > 1e-3


def test_an_unpruned_exchange_has_bits_of_its_own() -> None:
    """All islands step with equal weights, and what two bits round away stays in the own ones."""

    def work(islands: Islands, shards: PlainShards, rank: int) -> Any:
        sizes, crcs = [], []
        for step, unscaled in enumerate([True, True, False], start=1):
            train(shards, rank, step)
            sizes.append(exchange_all(islands, step, unscaled=unscaled))
            crcs.append(islands.weights.crc())
        return sizes, crcs

    (sizes, crcs), (_, others) = on_islands(2, work, value_bits=32, unpruned_bits=2)
    assert crcs == others
    assert len(set(crcs)) == 3
    assert sizes[0] == sizes[1] < 0.1 * sizes[2]


def test_little_that_is_sent_moves_farther() -> None:
    def work(islands: Islands, shards: PlainShards, rank: int) -> torch.Tensor:
        before = islands.weights.stores[0].clone()
        train(shards, rank, 0)
        exchange(islands, 1, k=128)
        return islands.weights.stores[0] - before

    (plain, _), (sparse, _) = (on_islands(2, work, sparse_scale=s) for s in (None, 2.0))
    torch.testing.assert_close(sparse, plain * 2**0.5)


def test_a_dense_exchange_of_rounds_moves_by_the_mean() -> None:
    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = islands.weights.stores[0].clone()
        train(shards, rank, 0)
        learned = torch.cat([piece.own.clone() for piece in shards.pieces()]) - before
        exchange(islands, 1, k=4096)
        return islands.weights.stores[0] - before, learned

    (moved, first), (_, second) = on_islands(2, work, sparse_scale=2.0, decay=1.0)
    torch.testing.assert_close(moved, (first + second) / 2, rtol=0.0, atol=1e-6)


def test_what_was_sent_and_what_is_left_is_what_was_learned() -> None:
    """own - shared is all that was learned and not sent; nothing is lost, nothing counts twice."""

    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        learned = torch.zeros(sum(t.numel() for t in shards.tensors.values()), dtype=torch.float64)
        start = islands.weights.stores[0].double()
        for step in range(1, 9):
            before = torch.cat([t.view(-1) for t in shards.tensors.values()]).double()
            train(shards, rank, step)
            after = torch.cat([t.view(-1) for t in shards.tensors.values()]).double()
            learned += after - before
            exchange(islands, step)
        own = torch.cat([t.view(-1) for t in shards.tensors.values()]).double()
        shared = islands.weights.stores[0].double()
        sent = learned - (own - shared)
        return sent, (shared - start) / islands.factor

    ranks = on_islands(2, work)
    sent = sum(sent for sent, _ in ranks)
    # 8 steps of 4 roundings of weights around 1 to 4: 2^-22 each, and the factor magnifies them.
    assert torch.allclose(sent, ranks[0][1], rtol=0.0, atol=32 * 2.0**-22)


def test_a_kept_residual_conserves_too() -> None:
    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = islands.weights.stores[0].double()
        learned = torch.zeros_like(start)
        for step in range(1, 9):
            before = torch.cat([t.view(-1) for t in shards.tensors.values()]).double()
            assert torch.equal(before, islands.weights.stores[0].double())
            train(shards, rank, step)
            learned += torch.cat([t.view(-1) for t in shards.tensors.values()]).double() - before
            exchange(islands, step)
        assert islands.kept is not None
        sent = learned - islands.kept.state_dict()[0].double()
        return sent, (islands.weights.stores[0].double() - start) / islands.factor

    ranks = on_islands(2, work, decay=1.0)
    sent = sum(sent for sent, _ in ranks)
    assert torch.allclose(sent, ranks[0][1], rtol=0.0, atol=32 * 2.0**-22)


@pytest.mark.parametrize("k", [200, 4096])
def test_a_bad_value_in_the_second_bucket_moves_nothing(k: int) -> None:
    """Story: the first bucket had moved when the second one's nan was found."""

    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[bool, str]:
        train(shards, rank, 1)
        if rank == 1:
            shards.tensors["matrix1"][-1, -1] = float("nan")
        assert len(islands.weights.bound()) == 2
        own = [t.clone() for t in shards.tensors.values()]
        crc = islands.weights.crc()
        message = ""
        if k == 4096:
            prepared = islands.prepare_dense([1])
        else:
            prepared = islands.prepare(k, step=7, signals=SIGNALS)
            prepared.write()
        prepared.start()
        try:
            refuse(prepared.deliver(), 7)
        except NonFiniteError as exc:
            message = str(exc)
        same = all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7))
            for a, b in zip(own, shards.tensors.values(), strict=True)
        )
        return same and crc == islands.weights.crc(), message

    for same, message in on_islands(2, work):
        assert same
        assert "island 1" in message
        assert "after step 7" in message


def test_a_lost_peer_moves_nothing() -> None:
    """Story: a transport error in the second bucket left the first one applied."""

    def main(transport: LoopbackTransport) -> bool:
        shards = random_shards()
        islands = make(transport, shards)
        train(shards, transport.rank, 1)
        own = [t.clone() for t in shards.tensors.values()]
        crc = islands.weights.crc()
        if transport.rank == 1:
            return True  # gone
        with pytest.raises(TransportError, match="no answer"):
            exchange(islands, 1)
        same = all(torch.equal(a, b) for a, b in zip(own, shards.tensors.values(), strict=True))
        return same and crc == islands.weights.crc()

    assert run_ranks(2, main, timeout_s=0.3) == [True, True]


def test_frozen_weights_stay_and_thawed_ones_join() -> None:
    """Story: tensors were told apart by position; a foreign layer moved instead."""

    def work(islands: Islands, shards: PlainShards, rank: int) -> tuple[int, bool]:
        shards.frozen = {"matrix1"}
        for step in (1, 2):
            train(shards, rank, step)
            exchange(islands, step)
        left = shards.tensors["matrix0"].clone()
        shards.frozen = {"matrix0"}
        for step in (3, 4):
            train(shards, rank, step)
            exchange(islands, step)
        return islands.weights.crc(), torch.equal(left, shards.tensors["matrix0"])

    ranks = on_islands(2, work)
    assert ranks[0] == ranks[1]
    assert ranks[0][1]


def test_swapping_twice_changes_no_bit_and_the_crc_is_always_of_the_shared_weights() -> None:
    def work(islands: Islands, shards: PlainShards, rank: int) -> bool:
        train(shards, rank, 1)
        exchange(islands, 1)
        own = [t.clone() for t in shards.tensors.values()]
        crc = islands.weights.crc()
        islands.weights.swap()
        assert islands.weights.crc() == crc
        assert not all(torch.equal(a, b) for a, b in zip(own, shards.tensors.values(), strict=True))
        islands.weights.swap()
        return all(torch.equal(a, b) for a, b in zip(own, shards.tensors.values(), strict=True))

    assert on_islands(2, work) == [True, True]


def test_the_shared_copy_is_all_that_is_held() -> None:
    def work(islands: Islands, shards: PlainShards, rank: int) -> int:
        train(shards, rank, 1)
        exchange(islands, 1)
        return islands.weights.nbytes - 4 * sum(t.numel() for t in shards.tensors.values())

    assert on_islands(2, work) == [0, 0]
