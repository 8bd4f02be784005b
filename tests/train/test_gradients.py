"""Pruned sums of gradient buckets on loopback: equal bits, conservation, steps that are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.train.inside import Inside, divide
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackHub, LoopbackTransport
from ds_gradprune.wire.owner_reduce import OwnerReduce
from tests.helpers.ranks import VirtualClock, run_ranks

SIGNALS = RankSignals(None, False, None, 0.0, 0.0, 0, 0)
FIRST = (Gradient("a", 6000, True), Gradient("b", 10, False))
SECOND = (Gradient("c", 9000, True),)
BUCKET_NUMEL = 4096


def make(transport: LoopbackTransport, value_bits: int = 32, owners: bool = False) -> Any:
    return GradientPruning(
        OwnerReduce(transport) if owners else AllGather(transport),
        Stopwatch(VirtualClock().now_s),
        value_bits=value_bits,
        error_feedback=True,
        bucket_numel=BUCKET_NUMEL,
    )


def gradient(rank: int, step: int, bucket: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numel = 6010 if bucket == 0 else 9000
    generator = torch.Generator().manual_seed(100 * step + 10 * bucket + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def step(pruning: GradientPruning, number: int, vectors: list[torch.Tensor], k: int = 100) -> None:
    pruning.begin()
    for vector, gradients in zip(vectors, (FIRST, SECOND), strict=True):
        pruning.reduce(vector, gradients, k, step=number, signals=SIGNALS)


def on_ranks(count: int, work: Callable[[GradientPruning, int], Any], **options: Any) -> list[Any]:
    def main(transport: LoopbackTransport) -> Any:
        return work(make(transport, **options), transport.rank)

    return run_ranks(count, main)


@pytest.mark.parametrize("owners", [False, True])
@pytest.mark.parametrize("value_bits", [2, 4, 16, 32])
def test_sums_are_equal_everywhere_and_nothing_is_lost(value_bits: int, owners: bool) -> None:
    """What all ranks put in is what was summed and what is still owed."""

    def work(pruning: GradientPruning, rank: int) -> list[torch.Tensor]:
        put_in = torch.zeros(6010, dtype=torch.float64)
        summed = torch.zeros(6010, dtype=torch.float64)
        for number in range(1, 7):
            vectors = [gradient(rank, number, bucket) for bucket in (0, 1)]
            put_in += vectors[0]
            step(pruning, number, vectors)
            pruning.commit(applied=True)
            summed += vectors[0]
        owed = torch.cat([pruning.residuals.state_dict()[key] for key in "ab"]).double()
        return [put_in, summed, owed]

    ranks = on_ranks(3, work, value_bits=value_bits, owners=owners)
    assert torch.equal(ranks[0][1], ranks[1][1])
    assert torch.equal(ranks[0][1], ranks[2][1])
    if not owners:  # else the owners owe something, too
        total = sum(rank[0] for rank in ranks)
        left = sum(rank[2] for rank in ranks)
        # Values around 4, some 30 roundings of each: 2^-22 apiece.
        assert torch.allclose(total, ranks[0][1] + left, rtol=0.0, atol=64 * 2.0**-22)


def test_a_skipped_step_touches_no_residual() -> None:
    """The sum overflowed in one bucket, and the other buckets' residuals were spent."""

    def work(pruning: GradientPruning, rank: int) -> list[bool]:
        step(pruning, 1, [gradient(rank, 1, b, torch.float16) for b in (0, 1)])
        pruning.commit(applied=True)
        before = {k: v.clone() for k, v in pruning.residuals.state_dict().items()}
        vectors = [gradient(rank, 2, 0, torch.float16), gradient(rank, 2, 1, torch.float16)]
        vectors[1][7] = 6e4  # finite on every rank, infinite as a sum
        step(pruning, 2, vectors)
        overflows = bool(vectors[1].isinf().any())
        pruning.commit(applied=False)
        after = pruning.residuals.state_dict()
        return [overflows, all(torch.equal(before[k], after[k]) for k in before)]

    assert on_ranks(2, work) == [[True, True]] * 2


def test_a_dense_step_that_is_skipped_owes_what_it_owed() -> None:
    """All residuals were cleared although the dense sum was infinite."""

    def work(pruning: GradientPruning, rank: int) -> list[float]:
        step(pruning, 1, [gradient(rank, 1, bucket) for bucket in (0, 1)])
        pruning.commit(applied=True)
        norms = [pruning.residuals.norm()]
        for applied in (False, True):
            pruning.begin()
            for bucket, gradients in enumerate((FIRST, SECOND)):
                vector = gradient(rank, 2, bucket)
                pruning.reduce_dense(vector, gradients, nonfinite=False)
            pruning.commit(applied=applied)
            norms.append(pruning.residuals.norm())
        return norms

    for before, skipped, paid in on_ranks(2, work):
        assert before == skipped > 0.0
        assert paid == 0.0


def test_a_fault_in_the_second_bucket_spends_nothing_of_the_first() -> None:
    def main(transport: LoopbackTransport) -> bool:
        pruning = make(transport)
        step(pruning, 1, [gradient(transport.rank, 1, bucket) for bucket in (0, 1)])
        pruning.commit(applied=True)
        before = {k: v.clone() for k, v in pruning.residuals.state_dict().items()}
        pruning.begin()
        first = gradient(transport.rank, 2, 0)
        pruning.reduce(first, FIRST, 100, step=2, signals=SIGNALS)
        if transport.rank == 1:
            return True  # gone
        with pytest.raises(TransportError, match="no answer"):
            pruning.reduce(gradient(0, 2, 1), SECOND, 100, step=2, signals=SIGNALS)
        pruning.abort()
        after = pruning.residuals.state_dict()
        return all(torch.equal(before[key], after[key]) for key in before)

    assert run_ranks(2, main, timeout_s=0.5) == [True, True]


def test_nan_on_one_rank_is_nan_everywhere_and_spoils_no_residual() -> None:
    def work(pruning: GradientPruning, rank: int) -> list[bool]:
        vectors = [gradient(rank, 1, bucket) for bucket in (0, 1)]
        if rank:
            vectors[0][3] = float("nan")
        step(pruning, 1, vectors)
        pruning.commit(applied=True)
        owed = pruning.residuals.state_dict()
        return [bool(vectors[0].isnan().all()), bool(vectors[1].isnan().any()), "a" in owed]

    assert on_ranks(2, work) == [[True, False, False]] * 2


# ---- islands of several ranks --------------------------------------------------------------------


def in_islands(work: Callable[[GradientPruning, int], Any], fault: int | None = None) -> list[Any]:
    """Two islands of two ranks; `fault`: the rank on which the exchange fails."""
    inner, outer = ([LoopbackHub(2, 10.0), LoopbackHub(2, 10.0)] for _ in range(2))

    def main(everyone: LoopbackTransport) -> Any:
        island, shard = divmod(everyone.rank, 2)
        transport, watch = inner[island].transport(shard), Stopwatch(VirtualClock().now_s)

        def together(error: Exception | None) -> None:
            rows = torch.zeros(2, 1, dtype=torch.uint8)
            transport.all_gather(torch.tensor([error is not None], dtype=torch.uint8), rows)
            if rows.any():
                raise error or TransportError("another rank of the island has failed")

        pruning = GradientPruning(
            AllGather(outer[shard].transport(island)),
            watch,
            value_bits=32,
            error_feedback=True,
            bucket_numel=BUCKET_NUMEL,
            inside=Inside(transport, watch, together),
        )
        if everyone.rank == fault:
            fail_in_exchange(pruning)
        return work(pruning, everyone.rank)

    return run_ranks(4, main)


def fail_in_exchange(pruning: GradientPruning) -> None:
    start = pruning.channel.start

    def broken(*args: Any) -> Any:
        pending = start(*args)
        pending.wait()
        raise TransportError("the link is gone")

    pruning.channel.start = broken  # type: ignore[method-assign, assignment]


def test_every_rank_gets_the_same_part_of_every_gradient() -> None:
    gradients = (Gradient("a", 10, True), Gradient("b", 1, False), Gradient("c", 3, False))
    shares = divide(gradients, 3)
    places = sorted((part.start, part.stop) for share in shares for part in share)
    assert [start for start, _ in places] == [0, *(stop for _, stop in places[:-1])]
    assert places[-1][1] == 14
    sizes = [sum(part.stop - part.start for part in share) for share in shares]
    assert max(sizes) - min(sizes) <= len(gradients)
    assert [part.gradient.key for part in shares[0]] == ["a[0:3]", "c[0:1]"]
    # What else lies in the bucket does not matter, so a residual stays where it is.
    assert [part.gradient for part in divide(gradients[:1], 3)[0]] == [shares[0][0].gradient]
    assert [part.gradient.key for part in divide(gradients, 1)[0]] == ["a", "b", "c"]


@pytest.mark.parametrize("dense", [False, True])
def test_an_island_puts_in_the_sum_of_its_ranks_and_each_rank_owes_its_share(dense: bool) -> None:
    def work(pruning: GradientPruning, rank: int) -> list[torch.Tensor]:
        put_in, summed = torch.zeros(6010).double(), torch.zeros(6010).double()
        for number in range(1, 5):
            vectors = [gradient(rank, number, bucket) for bucket in (0, 1)]
            put_in += vectors[0]
            if dense and number == 4:
                pruning.begin()
                pruning.reduce_dense(vectors[0], FIRST, nonfinite=False)
            else:
                step(pruning, number, vectors)
            pruning.commit(applied=True)
            summed += vectors[0]
        owed = torch.zeros(6010).double()
        for key, flat in pruning.residuals.state_dict().items():
            if key[0] in "ab":
                first = (0 if key[0] == "a" else 6000) + int(key.split("[")[1].split(":")[0])
                owed[first : first + flat.numel()] = flat
        return [put_in, summed, owed]

    ranks = in_islands(work)
    assert all(torch.equal(rank[1], ranks[0][1]) for rank in ranks)
    owed = [rank[2] for rank in ranks]
    assert not (owed[0] * owed[1]).any()  # no element has two debtors in an island
    assert dense == (not any(bool(each.any()) for each in owed))
    total, left = sum(rank[0] for rank in ranks), sum(owed)
    # Values around 4, some 40 roundings of each: 2^-22 apiece.
    assert torch.allclose(total, ranks[0][1] + left, rtol=0.0, atol=64 * 2.0**-22)


@pytest.mark.parametrize("fault", [0, 1])
def test_what_fails_on_one_rank_is_raised_in_its_island_and_touches_no_residual(fault: int) -> None:
    def work(pruning: GradientPruning, rank: int) -> bool:
        pruning.begin()
        vector = gradient(rank, 1, 0)
        if rank < 2:
            with pytest.raises(TransportError, match=r"the link is gone|another rank"):
                pruning.reduce(vector, FIRST, 100, step=1, signals=SIGNALS)
            pruning.abort()
        else:
            pruning.reduce(vector, FIRST, 100, step=1, signals=SIGNALS)
        return not pruning.residuals.state_dict()

    assert in_islands(work, fault)[:2] == [True, True]
