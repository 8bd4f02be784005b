"""What a delivered block does: sums, and moves of shared and own weights, bit for bit.

Longer than 300 lines: every way to apply a block, on the same few inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ds_gradprune.bucket import apply, apply_torch
from ds_gradprune.bucket.apply import Move, move_at_once, scatter_add, take_at_once
from ds_gradprune.bucket.block import SparseBlock, empty_block
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from tests.helpers.buckets import bits, flat

pytestmark = pytest.mark.usefixtures("implementation")

LAYOUT = lay_out([5000, 7, 3 * 4096, 0, 100, 60, 9], [True, False, True, True, False, False, True])
"""Full and short rows, dense neighbours that are segments of their own, an empty segment."""

layouts = st.lists(
    st.tuples(st.sampled_from([0, 1, 7, 300, 4096, 4100, 9000]), st.booleans()),
    min_size=1,
    max_size=6,
).map(lambda parts: lay_out([n for n, _ in parts], [p for _, p in parts]))
ks = st.sampled_from([1, 41, 1500, 4096])


def split(vector: torch.Tensor, layout: BucketLayout) -> list[torch.Tensor]:
    """Views, one per segment."""
    return list(vector.split([s.numel for s in layout.segments]))


def apart(vector: torch.Tensor, layout: BucketLayout) -> list[torch.Tensor]:
    """The same numbers in memory of their own, one tensor per segment."""
    return [part.clone() for part in split(vector, layout)]


def blocks_of(
    islands: Sequence[torch.Tensor], shared: torch.Tensor, layout: BucketLayout, k: int
) -> list[SparseBlock]:
    """What each island sends of its progress, rounded to bfloat16 as on the wire."""
    blocks = [select(own, layout, k, plus=shared, plus_scale=-1.0) for own in islands]
    for block in blocks:
        block.values.copy_(block.values.bfloat16())
        block.dense.copy_(block.dense.bfloat16())
    return blocks


def moved_as_in_0_1(
    own: torch.Tensor,
    shared: torch.Tensor,
    blocks: Sequence[SparseBlock],
    rank: int,
    factor: float,
) -> None:
    """`SharedWeights.move` of version 0.1: all deliveries in memory at once, both in place."""
    parts = [flat(block) for block in blocks]
    mine, sent = parts[rank]
    others = [positions for number, (positions, _) in enumerate(parts) if number != rank]
    moved = torch.cat([mine[:0], *others])
    unsent = own.index_select(0, mine).sub_(shared.index_select(0, mine)).sub_(sent)
    beyond = own.index_select(0, moved).sub_(shared.index_select(0, moved))
    for positions, values in parts:
        shared.index_add_(0, positions, values.mul(factor))
    own.scatter_(0, moved, beyond.add_(shared.index_select(0, moved)))
    own.scatter_(0, mine, unsent.add_(shared.index_select(0, mine)))


def moved_in_a_stream(
    own: Sequence[torch.Tensor],
    shared: torch.Tensor,
    blocks: Sequence[SparseBlock],
    rank: int,
    factor: float,
) -> None:
    move = Move(own, shared, blocks[0].layout)
    for number, block in enumerate(blocks):
        if number == rank:
            move.sent(block)
        move.add(block, factor)
    move.close()


def moved_in_fewer_passes(
    own: Sequence[torch.Tensor],
    shared: torch.Tensor,
    blocks: Sequence[SparseBlock],
    rank: int,
    factor: float,
) -> None:
    move = Move(own, shared, blocks[0].layout)
    for number, block in enumerate(blocks):
        move.add(block, factor, is_own=number == rank)
    move.close()


def moved_at_once(
    own: Sequence[torch.Tensor],
    shared: torch.Tensor,
    blocks: Sequence[SparseBlock],
    rank: int,
    factor: float,
) -> None:
    move_at_once(own, shared, blocks, rank=rank, factor=factor)


def assert_moves_alike(layout: BucketLayout, k: int, world_size: int, spread: float) -> None:
    start = torch.randn(layout.numel)
    islands = [start + spread * torch.randn(layout.numel) for _ in range(world_size)]
    blocks = blocks_of(islands, start, layout, k)
    factor = world_size**0.5 / world_size
    for rank in range(world_size):
        own, shared = islands[rank].clone(), start.clone()
        moved_as_in_0_1(own, shared, blocks, rank, factor)
        for how in (moved_in_a_stream, moved_in_fewer_passes, moved_at_once):
            ours, ours_shared = apart(islands[rank], layout), start.clone()
            how(ours, ours_shared, blocks, rank, factor)
            assert torch.equal(bits(ours_shared), bits(shared))
            assert torch.equal(bits(torch.cat(ours)), bits(own))


# --- scatter_add ----------------------------------------------------------------------------------


@given(layouts, ks, st.sampled_from([1.0, -1.0, 0.5, 1 / 3]))
def test_every_element_is_added_once_and_rounded_twice(
    layout: BucketLayout, k: int, factor: float
) -> None:
    torch.manual_seed(0)
    block = select(torch.randn(layout.numel), layout, k)
    vector = torch.randn(layout.numel)
    expected = vector.clone()
    positions, values = flat(block)
    expected[positions] += values * factor
    scatter_add(vector, block, factor)
    assert torch.equal(bits(vector), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_another_width(dtype: torch.dtype) -> None:
    block = select(torch.randn(LAYOUT.numel), LAYOUT, 400)
    vector = torch.randn(LAYOUT.numel).to(dtype)
    positions, values = flat(block)
    expected = vector.clone()
    expected[positions] += (values * 0.3).to(dtype)
    scatter_add(vector, block, 0.3)
    assert torch.equal(vector, expected)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vector must have shape \(17464,\), got \(3,\)"):
        scatter_add(torch.zeros(3), empty_block(LAYOUT, 5))
    with pytest.raises(ValueError, match="block must be on cpu, got meta"):
        scatter_add(torch.zeros(LAYOUT.numel), empty_block(LAYOUT, 5, "meta"))


# --- Move -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 410, 4096])
def test_bits_are_those_of_all_deliveries_at_once(world_size: int, k: int) -> None:
    assert_moves_alike(LAYOUT, k, world_size, 0.01)


@given(layouts, ks, st.sampled_from([1, 2, 3]), st.sampled_from([1e-6, 0.01, 10.0]))
def test_bits_are_those_of_all_deliveries_at_once_for_any_layout(
    layout: BucketLayout, k: int, world_size: int, spread: float
) -> None:
    torch.manual_seed(0)
    assert_moves_alike(layout, k, world_size, spread)


def test_order_of_first_touch_does_not_matter() -> None:
    """What a peer delivers first counts as touched when the own part is taken."""
    start = torch.randn(LAYOUT.numel)
    islands = [start + 0.01 * torch.randn(LAYOUT.numel) for _ in range(3)]
    blocks = blocks_of(islands, start, LAYOUT, 400)
    results = []
    for sent_first in (True, False):
        own, shared = apart(islands[2], LAYOUT), start.clone()
        move = Move(own, shared, LAYOUT)
        if sent_first:
            move.sent(blocks[2])
        for block in blocks:
            move.add(block, 0.5)
        if not sent_first:
            move.sent(blocks[2])
        move.close()
        results.append(torch.cat([*own, shared]))
    assert torch.equal(bits(results[0]), bits(results[1]))


@pytest.mark.parametrize("k", [1, 410, 4096])
def test_bits_of_what_own_weights_lose_are_those_of_a_move(k: int) -> None:
    start = torch.randn(LAYOUT.numel)
    mine = start + 0.01 * torch.randn(LAYOUT.numel)
    block = blocks_of([mine], start, LAYOUT, k)[0]
    own, shared, (moved, kept) = apart(mine, LAYOUT), start.clone(), (apart(mine, LAYOUT), start)
    take_at_once(own, shared, block)
    move = Move(moved, kept, LAYOUT)
    move.sent(block)
    move.close()
    assert torch.equal(bits(torch.cat(own)), bits(torch.cat(moved)))
    assert not torch.equal(torch.cat(own), mine)
    assert torch.equal(bits(shared), bits(start))


def test_what_is_sent_leaves_the_own_weights_and_enters_the_shared_ones() -> None:
    """On a grid of 2^-15 every sum is exact, so conservation holds to the last bit."""
    grid = [torch.randint(-4096, 4096, (LAYOUT.numel,)) * 2.0**-12 for _ in range(3)]
    start, mine, theirs = grid[0], grid[0] + grid[1] / 8, grid[0] + grid[2] / 8
    blocks = [select(own, LAYOUT, 400, plus=start, plus_scale=-1.0) for own in (theirs, mine)]
    sent = [torch.zeros(LAYOUT.numel).index_add_(0, *flat(block)) for block in blocks]
    own, shared = split(mine.clone(), LAYOUT), start.clone()
    moved_in_a_stream(own, shared, blocks, rank=1, factor=0.75)
    assert torch.equal(shared, start + 0.75 * (sent[0] + sent[1]))
    assert torch.equal(torch.cat(own) - shared, (mine - start) - sent[1])


def test_what_nobody_sent_keeps_its_bits() -> None:
    """Even where shared + (own - shared) would not give own back: 1e-12 beside 1."""
    layout = lay_out([4], [True])
    own, shared = torch.tensor([1.0 + 2.0**-20, 3.0, -0.0, 5.0]), torch.tensor([1e-12, 1e30, 7, 5])
    before, shared_before = own.clone(), shared.clone()
    block = SparseBlock(
        layout, 1, torch.tensor([3], dtype=torch.int16), torch.tensor([0.5]), torch.empty(0)
    )
    moved_in_a_stream([own], shared, [block, block], rank=0, factor=0.5)
    assert torch.equal(bits(own[:3]), bits(before[:3]))
    assert torch.equal(bits(shared[:3]), bits(shared_before[:3]))
    assert shared[3] == 5.5
    assert own[3] == 5.0  # 0.5 of it was sent and came back


def test_what_cancels_still_leaves_the_residual() -> None:
    layout = lay_out([2], [True])
    own, shared = torch.tensor([2.5, 8.0]), torch.tensor([2.0, 8.0])
    plus, minus = (
        SparseBlock(
            layout, 1, torch.tensor([0], dtype=torch.int16), torch.tensor([v]), torch.empty(0)
        )
        for v in (0.5, -0.5)
    )
    moved_in_a_stream([own], shared, [plus, minus], rank=0, factor=0.5)
    assert shared.tolist() == own.tolist() == [2.0, 8.0]


def test_a_move_without_deliveries_changes_nothing() -> None:
    own, shared = torch.randn(LAYOUT.numel), torch.randn(LAYOUT.numel)
    before = own.clone(), shared.clone()
    Move(split(own, LAYOUT), shared, LAYOUT).close()
    assert torch.equal(bits(own), bits(before[0]))
    assert torch.equal(bits(shared), bits(before[1]))


@pytest.mark.parametrize("how", ["Move", "move_at_once", "scatter_add"])
def test_a_change_between_forward_and_backward_is_found_by_autograd(how: str) -> None:
    layout = lay_out([4], [True])
    weights = torch.ones(4, requires_grad=True)
    block = select(torch.ones(4), layout, 4096)
    loss = (weights * weights).sum()
    if how == "Move":
        moved_in_a_stream([weights], torch.zeros(4), [block], rank=0, factor=0.5)
    elif how == "move_at_once":
        move_at_once([weights], torch.zeros(4), [block], rank=0, factor=0.5)
    else:
        scatter_add(weights, block)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest memory that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if result.untyped_storage().data_ptr() not in old:
                self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_a_move_needs_a_byte_per_element() -> None:
    layout = lay_out([2**22], [True])
    own, shared = torch.randn(layout.numel), torch.zeros(layout.numel)
    block = select(own, layout, 2048)
    with Largest() as largest:
        moved_in_a_stream([own], shared, [block, block], rank=0, factor=0.5)
    assert largest.nbytes <= layout.numel
    assert 16 * apply_torch._CPU_SPAN_NUMEL < layout.numel


@pytest.mark.parametrize(
    ("own", "shared", "message"),
    [
        ([torch.zeros(4)], torch.zeros(6), r"own must have one tensor for each of 2 segments"),
        ([torch.zeros(4), torch.zeros(3)], torch.zeros(6), r"own\[1\] must be .* shape \(2,\)"),
        ([torch.zeros(4), torch.zeros(2).half()], torch.zeros(6), r"own\[1\] must be float32"),
        ([torch.zeros(8)[::2], torch.zeros(2)], torch.zeros(6), r"own\[0\] must be contiguous"),
        ([torch.zeros(4), torch.zeros(2)], torch.zeros(5), r"shared must be .* shape \(6,\)"),
        ([torch.zeros(4), torch.zeros(2)], torch.zeros(6).half(), "shared must be float32"),
        (
            [torch.zeros(4), torch.zeros(2, device="meta")],
            torch.zeros(6),
            r"own\[1\] must be on cpu, got meta",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    own: list[torch.Tensor], shared: torch.Tensor, message: str
) -> None:
    layout = lay_out([4, 2], [True, False])
    block = empty_block(layout, 5)
    with pytest.raises(ValueError, match=message):
        Move(own, shared, layout)
    with pytest.raises(ValueError, match=message):
        move_at_once(own, shared, [block], rank=0, factor=0.5)


def test_blocks_of_another_layout_are_refused() -> None:
    own, shared = torch.zeros(LAYOUT.numel), torch.zeros(LAYOUT.numel)
    move = Move(split(own, LAYOUT), shared, LAYOUT)
    same = lay_out([s.numel for s in LAYOUT.segments], [s.pruned for s in LAYOUT.segments])
    for call in (move.sent, lambda block: move.add(block, 0.5)):
        with pytest.raises(ValueError, match="block must be of BucketLayout"):
            call(empty_block(same, 5))
        with pytest.raises(ValueError, match="block must be on cpu, got meta"):
            call(empty_block(LAYOUT, 5, "meta"))
    mine = empty_block(LAYOUT, 5)
    for other in (empty_block(same, 5), empty_block(LAYOUT, 6)):
        with pytest.raises(ValueError, match="blocks must all be of BucketLayout"):
            move_at_once(split(own, LAYOUT), shared, [mine, other], rank=0, factor=0.5)
    for rank in (-1, 1):
        with pytest.raises(ValueError, match=rf"rank must be in 0 \.\. 0, got {rank}"):
            move_at_once(split(own, LAYOUT), shared, [mine], rank=rank, factor=0.5)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    start = torch.randn(LAYOUT.numel)
    islands = [start + 0.01 * torch.randn(LAYOUT.numel) for _ in range(3)]
    blocks = blocks_of(islands, start, LAYOUT, 400)
    own, shared = apart(islands[1], LAYOUT), start.clone()
    moved_in_a_stream(own, shared, blocks, rank=1, factor=0.4)
    there = [
        SparseBlock(LAYOUT, b.k, b.indices.cuda(), b.values.cuda(), b.dense.cuda()) for b in blocks
    ]
    own_there, shared_there = [t.cuda() for t in apart(islands[1], LAYOUT)], start.cuda()
    moved_in_a_stream(own_there, shared_there, there, rank=1, factor=0.4)
    assert torch.equal(bits(shared_there.cpu()), bits(shared))
    assert torch.equal(bits(torch.cat(own_there).cpu()), bits(torch.cat(own)))


def test_the_reference_is_what_runs_without_kernels(implementation: str) -> None:
    move = Move([torch.zeros(4)], torch.zeros(4), lay_out([4], [True]))
    expected = apply_torch.TorchMove if implementation == "reference" else apply._NativeMove
    assert isinstance(move._how, expected)
