"""The one way a gradient goes: conserved, equal on all ranks, untouched when something breaks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.errors import RankMismatchError, TransportError, WireFormatError
from ds_gradprune.exchange import AllGather
from ds_gradprune.records import BucketLayout, RankSignals
from ds_gradprune.reducer import Reducer
from ds_gradprune.sparsify import layout_of
from ds_gradprune.transport.base import Transport
from tests.helpers.ranks import run_ranks

SIGNALS = RankSignals(1.5, False, 0.1, 0.2, 0.3, 400, 7)
SHAPES = [torch.Size(s) for s in [(64, 80), (100,), (3, 4096), (10, 10)]]  # two pruned, two dense
LAYOUT = layout_of(SHAPES, min_numel=4096)


def gradient(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(97 * step + rank)
    return torch.randn(LAYOUT.numel, generator=generator).to(dtype)


def reduce(
    reducer: Reducer, vector: torch.Tensor, k: int = 41, layout: BucketLayout = LAYOUT, **kw: Any
) -> list[Any]:
    return reducer.reduce(vector, layout, k, **({"step": 1, "bucket": 0, "signals": SIGNALS} | kw))


def dense_sum_with_memory(value_bits: int, k: int, steps: int, world_size: int) -> list[np.ndarray]:
    """Ten lines of numpy that say what the reducer must compute."""
    residuals = [np.zeros(LAYOUT.numel, np.float32) for _ in range(world_size)]
    sums = []
    for step in range(steps):
        total = np.zeros(LAYOUT.numel, np.float32)
        for rank in range(world_size):
            owed = gradient(rank, step).numpy() + residuals[rank]
            sent = np.zeros_like(owed)
            for s in LAYOUT.segments:
                for start in range(s.offset, s.offset + s.numel, 4096 if s.pruned else s.numel):
                    end = min(start + 4096, s.offset + s.numel) if s.pruned else start + s.numel
                    kept = -(-k * (end - start) // 4096) if s.pruned else end - start
                    order = np.argsort(-np.abs(owed[start:end]), kind="stable")[:kept]
                    sent[start + order] = owed[start + order]
            if value_bits == 16:
                sent = torch.from_numpy(sent).bfloat16().float().numpy()
            total += sent
            residuals[rank] = owed - sent
        sums.append(total)
    return sums


@pytest.mark.parametrize("value_bits", [16, 32])
@pytest.mark.parametrize("k", [1, 41, 4095, 4096])
def test_equals_the_numpy_reference_on_every_rank(value_bits: int, k: int) -> None:
    def work(transport: Transport) -> list[np.ndarray]:
        reducer = Reducer(AllGather(transport), value_bits=value_bits)
        sums = []
        for step in range(4):
            vector = gradient(transport.rank, step)
            reduce(reducer, vector, k)
            sums.append(vector.numpy())
        return sums

    expected = dense_sum_with_memory(value_bits, k, 4, 3)
    for sums in run_ranks(3, work):
        for ours, theirs in zip(sums, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)  # same order of additions: same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_bits", [2, 4, 16, 32])
def test_nothing_is_lost(dtype: torch.dtype, value_bits: int) -> None:
    """sent + residual == gradient + old residual, bit for bit.

    Exact for bf16 values too: e - bf16(e) is a multiple of e's last fp32 bit and smaller than e, so
    fp32 holds it, and so does the sum that gives e back (no denormals in these numbers). For levels
    of 4 and 2 bits `codec.levels` has the reason.
    """

    def work(transport: Transport) -> None:
        reducer = Reducer(AllGather(transport), value_bits=value_bits)
        old = torch.zeros(LAYOUT.numel)
        for step in range(5):
            before = gradient(transport.rank, step, dtype)
            vector = before.clone()
            reduce(reducer, vector, 205)
            residual = reducer.residuals.of(0, vector).buffer
            owed = old + before.float()
            sent = vector.float()  # one rank: the sum is what it sent
            if dtype is torch.float32:
                assert torch.equal(sent + residual, owed)
            else:
                # The result is rounded to the gradient's type on arrival: half an ulp of the sent
                # value, 2^-9 (bf16) or 2^-12 (fp16) relative; what was sent is exact before that.
                bound = sent.abs() * 2.0 ** (-8 if dtype is torch.bfloat16 else -11)
                assert bool(((sent + residual - owed).abs() <= bound + 1e-7).all())
            old = residual.clone()

    run_ranks(1, work)


@pytest.mark.parametrize("value_bits", [2, 4])
@pytest.mark.parametrize("k", [1, 41, 4095, 4096])
def test_few_bits_give_equal_sums_and_drain(value_bits: int, k: int) -> None:
    """All ranks add what was sent; what rounding lost is sent later, dense segments included."""

    def work(transport: Transport) -> tuple[list[torch.Tensor], torch.Tensor]:
        reducer = Reducer(AllGather(transport), value_bits=value_bits)
        sums = []
        for step in range(4):
            vector = gradient(transport.rank, step)
            reduce(reducer, vector, k)
            sums.append(vector)
        return sums, reducer.residuals.of(0, vector).buffer

    results = run_ranks(3, work)
    for sums, _ in results[1:]:
        for ours, theirs in zip(sums, results[0][0], strict=True):
            assert torch.equal(ours, theirs)
    arrived = sum(total.double() for total in results[0][0])
    owed = sum(residual.double() for _, residual in results)
    given_in = sum(gradient(rank, step).double() for rank in range(3) for step in range(4))
    # Exact but for two fp32 sums: three ranks' values, and gradient plus residual in every step;
    # 3 * (2 + 4) roundings of numbers below 32.
    torch.testing.assert_close(arrived + owed, given_in, rtol=0, atol=18 * 2.0**-20)
    if k == 4096:
        assert float(owed.norm()) < (0.3 if value_bits == 4 else 1.0) * float(given_in.norm())


def test_loss_scale_leaves_no_trace_in_the_residual() -> None:
    def work(transport: Transport) -> tuple[torch.Tensor, torch.Tensor]:
        plain = Reducer(AllGather(transport), value_bits=32)
        scaled = Reducer(AllGather(transport), value_bits=32)
        for step in range(3):
            scale = 2.0 ** (3 * step)  # powers of two: the scaling itself rounds nothing
            one, other = gradient(0, step), gradient(0, step) * scale
            reduce(plain, one)
            reduce(scaled, other, scale=scale)
            assert torch.equal(other, one * scale)
        like = torch.zeros(LAYOUT.numel)
        return plain.residuals.of(0, like).buffer, scaled.residuals.of(0, like).buffer

    plain, scaled = run_ranks(1, work)[0]
    assert torch.equal(plain, scaled)


def test_without_error_feedback_the_rest_is_dropped() -> None:
    def work(transport: Transport) -> int:
        reducer = Reducer(AllGather(transport), error_feedback=False)
        reduce(reducer, gradient(0, 0))
        return reducer.residuals.nbytes()

    assert run_ranks(1, work) == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_rank_stops_all_and_touches_no_residual(bad: float) -> None:
    def work(transport: Transport) -> tuple[bool, bool]:
        reducer = Reducer(AllGather(transport))
        reduce(reducer, gradient(transport.rank, 0))
        before = reducer.residuals.of(0, torch.zeros(LAYOUT.numel)).buffer.clone()
        vector = gradient(transport.rank, 1)
        poisoned = transport.rank == 1
        if poisoned:
            vector[4321] = bad
        headers = reduce(reducer, vector, signals=dataclasses.replace(SIGNALS, nonfinite=poisoned))
        after = reducer.residuals.of(0, vector).buffer
        assert [h.signals.nonfinite for h in headers] == [False, True]
        return bool(torch.isnan(vector).all()), torch.equal(before, after)

    assert run_ranks(2, work) == [(True, True), (True, True)]


def test_an_overflow_that_only_the_cast_made_is_caught() -> None:
    """The flag says finite, but the bucket holds inf (a cast to fp16 made it): nobody sends."""

    def work(transport: Transport) -> bool:
        reducer = Reducer(AllGather(transport))
        vector = gradient(transport.rank, 0, torch.float16)
        if transport.rank == 0:
            vector[7] = float("inf")
        reduce(reducer, vector)
        return bool(torch.isnan(vector).all()) and reducer.residuals.of(0, vector).is_zero

    assert run_ranks(2, work) == [True, True]


def test_fp16_sum_that_overflows_stays_owed() -> None:
    """Each value fits fp16, their sum does not: DeepSpeed skips the step, we owe it still."""

    def work(transport: Transport) -> tuple[bool, float]:
        reducer = Reducer(AllGather(transport))
        vector = torch.zeros(LAYOUT.numel, dtype=torch.float16)
        vector[0] = 60000.0
        reduce(reducer, vector)
        owed = reducer.residuals.of(0, vector).buffer[0]
        return bool(torch.isfinite(vector).all()), float(owed)

    finite, owed = zip(*run_ranks(2, work), strict=True)
    assert finite == (False, False)
    assert owed == (float(torch.tensor(60000.0).half()),) * 2


class _Breaks(Transport):
    """Fails, or damages what arrives."""

    def __init__(self, inner: Transport, fault: str) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner, self._fault = inner, fault

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        self._inner.all_gather(payload, out)
        if self._fault == "fails":
            raise TransportError("the link is down")
        out[1 - self.rank, 100] ^= 1

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._inner.all_reduce(tensor)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [("fails", TransportError, "link is down"), ("flips", WireFormatError, "crc")],
)
def test_a_failed_exchange_loses_no_gradient(
    fault: str, error: type[Exception], match: str
) -> None:
    def work(transport: Transport) -> torch.Tensor:
        reducer = Reducer(AllGather(_Breaks(transport, fault)))
        with pytest.raises(error, match=match):
            reduce(reducer, gradient(transport.rank, 0))
        return reducer.residuals.of(0, torch.zeros(LAYOUT.numel)).buffer

    for rank, residual in enumerate(run_ranks(2, work)):
        assert torch.equal(residual, gradient(rank, 0))


def test_dense_step_pays_off_the_residual() -> None:
    def work(transport: Transport) -> tuple[torch.Tensor, bool]:
        reducer = Reducer(AllGather(transport), value_bits=32)
        sent = gradient(transport.rank, 0)
        reduce(reducer, sent)
        rest = gradient(transport.rank, 1)
        reducer.reduce_dense(rest, bucket=0, nonfinite=False)
        return sent + rest, reducer.residuals.of(0, rest).is_zero

    everything = sum(gradient(rank, step) for rank in range(2) for step in range(2))
    for total, is_zero in run_ranks(2, work):
        # Four fp32 additions in another order: at most 4 ulp of numbers below 16.
        torch.testing.assert_close(total, everything, rtol=0, atol=4 * 2.0**-20)
        assert is_zero


def test_dense_step_with_a_bad_rank_leaves_the_residual() -> None:
    def work(transport: Transport) -> bool:
        reducer = Reducer(AllGather(transport))
        reduce(reducer, gradient(transport.rank, 0))
        before = reducer.residuals.of(0, torch.zeros(LAYOUT.numel)).buffer.clone()
        reducer.reduce_dense(gradient(transport.rank, 1), bucket=0, nonfinite=True)
        return torch.equal(before, reducer.residuals.of(0, torch.zeros(LAYOUT.numel)).buffer)

    assert run_ranks(2, work) == [True, True]


def test_dense_step_before_any_pruning_is_the_plain_sum() -> None:
    def work(transport: Transport) -> torch.Tensor:
        vector = gradient(transport.rank, 0)
        Reducer(AllGather(transport)).reduce_dense(vector, bucket=0, nonfinite=False)
        return vector

    for vector in run_ranks(2, work):
        assert torch.equal(vector, gradient(0, 0) + gradient(1, 0))


@pytest.mark.parametrize(("name", "value"), [("step", lambda r: 1 + r), ("bucket", lambda r: r)])
def test_ranks_in_different_steps_are_told(name: str, value: Any) -> None:
    def work(transport: Transport) -> None:
        reducer = Reducer(AllGather(transport))
        reduce(reducer, gradient(0, 0), **{name: value(transport.rank)})

    with pytest.raises(RankMismatchError, match="no longer agree"):
        run_ranks(2, work)


def test_ranks_with_different_histories_are_told() -> None:
    def work(transport: Transport) -> None:
        reducer = Reducer(AllGather(transport))
        reducer.share_signals(1, dataclasses.replace(SIGNALS, agreement=transport.rank))

    with pytest.raises(RankMismatchError, match=r"rank 0.*history 00000000; rank 1.*00000001"):
        run_ranks(2, work)


def test_costs_are_counted_once() -> None:
    def work(transport: Transport) -> tuple[int, int, float]:
        reducer = Reducer(AllGather(transport))
        reduce(reducer, gradient(0, 0))
        first, second = reducer.take_costs(), reducer.take_costs()
        assert first.codec_time_s > 0
        return first.traffic.wire_bytes, second.traffic.wire_bytes, second.codec_time_s

    from ds_gradprune.codec import codec_for

    payload_bytes = codec_for(41, 16).payload_bytes(LAYOUT, 41)
    assert run_ranks(3, work) == [(2 * payload_bytes, 0, 0.0)] * 3


@given(st.integers(1, 4096), st.integers(0, 2**31))
def test_every_element_arrives_in_the_end(k: int, seed: int) -> None:
    """Zero gradients after the first: the residual drains and the sum of the sums is the input."""

    def work(transport: Transport) -> None:
        reducer = Reducer(AllGather(transport), value_bits=32)
        start = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
        arrived = torch.zeros(LAYOUT.numel)
        for step in range(8):
            vector = start.clone() if step == 0 else torch.zeros(LAYOUT.numel)
            reduce(reducer, vector, k, step=step)
            arrived += vector  # disjoint supports: exact
        residual = reducer.residuals.of(0, start).buffer
        assert torch.equal(arrived + residual, start)
        if 8 * k >= 4096:
            assert torch.equal(arrived, start)

    run_ranks(1, work)


@pytest.mark.parametrize("value_bits", [16, 32])
def test_a_trade_is_a_sum_not_yet_added_up(value_bits: int) -> None:
    """The same elements and values that `reduce` adds, of vector - minus; nothing is changed."""

    def work(transport: Transport) -> Any:
        exchange = AllGather(transport)
        reducer = Reducer(exchange, value_bits=value_bits, error_feedback=False)
        vector, minus = gradient(transport.rank, 0), gradient(7, 0)
        kept = vector.clone(), minus.clone()
        trade = reducer.trade(vector, LAYOUT, 41, minus=minus, step=1, bucket=0, signals=SIGNALS)
        assert torch.equal(vector, kept[0])
        assert torch.equal(minus, kept[1])
        added = torch.zeros(LAYOUT.numel)
        for positions, values in trade.parts:
            assert positions.unique().numel() == positions.numel()
            added.index_add_(0, positions, values)
        total = vector - minus
        headers = reduce(reducer, total)
        assert [h.rank for h in trade.headers] == [h.rank for h in headers] == [0, 1, 2]
        assert torch.equal(added, total)
        return trade.parts

    one, *others = run_ranks(3, work)
    for other in others:
        for (positions, values), (again, values_again) in zip(one, other, strict=True):
            assert torch.equal(positions, again)
            assert torch.equal(values, values_again)


def test_a_trade_with_a_vector_that_is_not_finite_sends_nothing() -> None:
    def work(transport: Transport) -> Any:
        vector = gradient(transport.rank, 0)
        if transport.rank == 1:
            vector[5000] = float("inf")
        trade = Reducer(AllGather(transport)).trade(
            vector, LAYOUT, 41, minus=torch.zeros(LAYOUT.numel), step=1, bucket=0, signals=SIGNALS
        )
        return [header.signals.nonfinite for header in trade.headers], trade.parts

    assert run_ranks(2, work) == [([False, True], [])] * 2
