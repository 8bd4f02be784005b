"""Islands without DeepSpeed: what they share is equal, nothing is lost, every interval counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ds_gradprune.config import load_block
from ds_gradprune.errors import CheckpointError, NonFiniteError, TransportError
from ds_gradprune.islands import IslandSession
from ds_gradprune.records import Cause
from ds_gradprune.session import PruningSession
from ds_gradprune.shared import SharedWeights
from ds_gradprune.transport.base import Transport
from ds_gradprune.transport.throttle import RatePoint, ThrottledTransport
from tests.helpers.ranks import VirtualClock, run_ranks

SHAPES = [(64, 80), (100,), (3, 4096), (10, 10)]  # two pruned, two always sent whole
NUMEL = 64 * 80 + 100 + 3 * 4096 + 100
GRID = 2.0**-16
BLOCK = {
    "prune": "update",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "value_bits": 32,
    "density": {"initial": 0.02, "min": 0.02, "max": 0.02},
}
DENSE = {"density": {"initial": 1.0, "min": 1.0, "max": 1.0}}


class Island:
    """Weights that move by a given update in every step, and their session.

    All numbers are whole multiples of `GRID` and so small that sums in fp32 are exact.
    """

    def __init__(self, transport: Transport, slow: bool = False, **block: Any) -> None:
        config = load_block({"gradient_pruning": BLOCK | block})
        clock = VirtualClock()
        if slow:
            points = [RatePoint(0, 1e6 / 8), RatePoint(30, 1e7 / 8)]
            transport = ThrottledTransport(transport, points, sleep=clock.sleep)
        self.rank, self.islands = transport.rank, transport.world_size
        self.own = list(self.numbers(0).split([torch.Size(s).numel() for s in SHAPES]))
        self.own = [tensor.view(s) for tensor, s in zip(self.own, SHAPES, strict=True)]
        self.weights = SharedWeights(lambda: self.own, bucket_numel=6000)
        self.session = IslandSession(config, transport, self.weights, clock.now_s)
        self.progress = torch.zeros(NUMEL, dtype=torch.float64)

    def numbers(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-512, 512, (NUMEL,), generator=generator).float() * GRID

    def flat(self) -> torch.Tensor:
        return torch.cat([tensor.view(-1) for tensor in self.own])

    def shared(self) -> torch.Tensor:
        return torch.cat([self.weights.shared(b) for b in range(len(self.weights.shapes))])

    def move(self, update: torch.Tensor) -> None:
        start = 0
        for tensor in self.own:
            tensor.view(-1).add_(update[start : start + tensor.numel()])
            start += tensor.numel()

    def train(self, first: int, last: int) -> list[Any]:
        """Steps first .. last; (step, shared weights, own weights, report) of each."""
        trace = []
        for step in range(first, last + 1):
            session, loss = self.session, 4.0 / step + self.rank
            update = self.numbers(1000 * step + self.rank)
            session.begin_step()
            if session.is_warmup:
                session.begin_reduction(loss, nonfinite=False)
                session.reduce_bucket(update, [torch.Size((NUMEL,))])
                session.end_reduction()
                self.move(update / 4)
                session.end_step()
                self.weights.capture()
            else:
                self.move(update)
                self.progress += update
                if session.is_due:
                    session.exchange(loss)
                    session.end_step()
                else:
                    session.finish_step()
            trace.append((step, self.shared(), self.flat(), session.report))
        return trace


@pytest.mark.parametrize("islands", [2, 3])
@pytest.mark.parametrize("sync_every", [1, 4])
@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_shared_weights_are_equal_on_all_islands_after_every_step(
    islands: int, sync_every: int, slow: float
) -> None:
    block = {"sync_every": sync_every, "slow_momentum": slow}
    traces = run_ranks(islands, lambda t: Island(t, **block).train(1, 14))
    for step in zip(*traces, strict=True):
        number, shared, own, _ = step[0]
        assert all(torch.equal(other, shared) for _, other, _, _ in step)
        assert all(torch.equal(other, own) for _, _, other, _ in step) == (number <= 2)
    moved = [not torch.equal(a[1], b[1]) for a, b in zip(traces[0], traces[0][1:], strict=False)]
    # After the warm-up of two steps the shared weights move every `sync_every` steps only.
    assert moved[1:] == [(step - 2) % sync_every == 0 for step in range(3, 15)]


@pytest.mark.parametrize("options", [{}, {"sync_every": 4}, DENSE], ids=["1", "4", "dense"])
def test_no_progress_is_lost_or_made_up(options: dict[str, Any]) -> None:
    """What the islands gained is in the shared weights, at their weight, or still in their own.

    shared - start = scale / N * sum over islands of (progress - (own - shared)), exactly.
    """

    def work(transport: Transport) -> Any:
        island = Island(transport, update_scale=1.5, **options)
        start = island.train(1, 2)[-1][1].double()
        island.train(3, 13)
        shared = island.shared().double()
        unsent = island.flat().double() - shared
        return shared - start, island.progress - unsent, unsent

    ranks = run_ranks(2, work)
    sent = 1.5 / 2 * sum(sent for _, sent, _ in ranks)
    for moved, _, unsent in ranks:
        assert torch.equal(moved, sent)
        assert bool((unsent == 0).all()) == (options == DENSE)


@pytest.mark.parametrize("density", [0.02, 1.0])
def test_a_slow_momentum_moves_own_and_shared_weights_alike(density: float) -> None:
    """By strength * a hundredth of it after the first exchange; what is unsent stays."""
    pinned = {"density": dict.fromkeys(("initial", "min", "max"), density)}

    def work(transport: Transport) -> Any:
        both = [Island(transport, slow_momentum=s, **pinned).train(1, 4)[1:] for s in (0, 3.0)]
        return [[(shared.double(), own.double()) for _, shared, own, _ in one] for one in both]

    plain, slow = run_ranks(2, work)[0]
    first = plain[1][0] - plain[0][0]
    torch.testing.assert_close(slow[1][0] - plain[1][0], 3.0 * 0.01 * first, rtol=0, atol=1e-7)
    unsent = [own - shared for shared, own in (plain[1], slow[1])]
    torch.testing.assert_close(unsent[1], unsent[0], rtol=0, atol=1e-7)


def test_a_state_without_its_slow_momentum_is_refused() -> None:
    def work(transport: Transport) -> None:
        state = Island(transport).session.state_dict()
        Island(transport, slow_momentum=1.0).session.load_state_dict(state)

    with pytest.raises(CheckpointError, match="slow momentum must be on, got off"):
        run_ranks(1, work)


@pytest.mark.parametrize("value_bits", [2, 4, 16])
def test_what_rounding_of_values_loses_stays_with_the_island(value_bits: int) -> None:
    """As above; now every exchange rounds a weight below 1 at most four times, by 2^-25."""

    def work(transport: Transport) -> Any:
        island = Island(transport, value_bits=value_bits)
        start = island.train(1, 2)[-1][1].double()
        island.train(3, 13)
        shared = island.shared().double()
        return shared - start, island.progress - (island.flat().double() - shared)

    ranks = run_ranks(2, work)
    sent = 2**0.5 / 2 * sum(sent for _, sent in ranks)
    limit = 11 * 4 * 2.0**-25
    for moved, _ in ranks:
        assert float(moved.abs().max()) > 1000 * limit
        assert float((moved - sent).abs().max()) <= limit


def test_the_mean_is_multiplied_by_the_root_of_the_islands() -> None:
    def work(transport: Transport) -> Any:
        island = Island(transport, warmup_steps=0, **DENSE)
        before = island.shared()
        island.train(1, 1)
        return island.shared().double() - before, island.progress

    ranks = run_ranks(4, work)
    mean = sum(progress for _, progress in ranks) / 4
    assert torch.equal(ranks[0][0], 2 * mean)


def test_no_residual_buffer_is_held() -> None:
    def work(transport: Transport) -> Any:
        island = Island(transport)
        island.train(1, 6)
        return island.session.residual_bytes, island.session.state_dict()["residuals"]

    assert run_ranks(2, work)[0] == (4 * NUMEL, {})


def test_an_interval_is_reported_as_one() -> None:
    trace = run_ranks(2, lambda t: Island(t, sync_every=4).train(1, 14))[0]
    reports = {report.step: report for _, _, _, report in trace}
    assert list(reports) == [1, 2, 6, 10, 14]
    # Both islands' losses, as they were handed over at the exchange.
    assert reports[6].loss == pytest.approx(4.0 / 6 + 0.5, rel=1e-6)
    # The clock moves at every look; three more steps are three more looks at both their ends.
    assert reports[10].compute_time_s == pytest.approx(reports[2].compute_time_s + 3 * 2.0**-10)
    assert [r.signals.timed_density for r in reports.values()] == [None] * 3 + [82 / 4096] * 2
    assert reports[6].decision.step == 10
    assert reports[10].dense_bytes == 4 * NUMEL
    assert reports[10].wire_bytes < reports[10].dense_bytes / 10


def test_the_ramp_counts_optimizer_steps_and_ends_at_initial() -> None:
    density = {"initial": 0.05, "min": 0.01, "max": 0.25}
    trace = run_ranks(
        2, lambda t: Island(t, sync_every=4, ramp_steps=10, density=density).train(1, 18)
    )[0]
    used = {report.step: report for _, _, _, report in trace}
    assert [report.cause for report in used.values()][:5] == [Cause.WARMUP] * 2 + [Cause.RAMP] * 3
    expected = [0.25 * 0.2 ** (position / 9) for position in (0, 7, 9)]
    assert used[6].density == pytest.approx(0.25 * 0.2 ** (3 / 9), abs=1 / 4096)
    assert used[10].density == pytest.approx(expected[1], abs=1 / 4096)
    assert used[14].density == pytest.approx(0.05, abs=1 / 4096)  # not what a 12th step would get


def test_a_budget_is_for_one_step_and_compared_with_the_interval() -> None:
    trace = run_ranks(2, lambda t: Island(t, sync_every=4, step_time_budget_s=0.25).train(1, 10))[0]
    assert trace[-1][3].decision.budget_s == 1.0


@pytest.mark.parametrize("options", [{}, DENSE], ids=["pruned", "dense"])
def test_a_sick_island_stops_all_before_the_shared_weights_move(options: dict[str, Any]) -> None:
    def work(transport: Transport) -> Any:
        island = Island(transport, **options)
        island.train(1, 5)
        before, own = island.shared(), island.flat()
        if transport.rank == 1:
            island.own[2][1, 7] = float("nan")
        with pytest.raises(NonFiniteError, match=r"island 1 hold inf or nan after step 6"):
            island.train(6, 6)
        update = island.numbers(6000 + transport.rank)
        same = transport.rank == 1 or torch.equal(island.flat(), own + update)
        return torch.equal(island.shared(), before), same

    assert run_ranks(2, work) == [(True, True)] * 2


class _Breaking(Transport):
    """Fails once, in the exchange of a given step."""

    def __init__(self, inner: Transport, step: int) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner, self._step, self._now = inner, step, 0

    def advance(self, step: int) -> None:
        self._now = step

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        self._inner.all_gather(payload, out)
        if self._now == self._step:
            self._step = -1
            raise TransportError("the link is down")

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._inner.all_reduce(tensor)

    def close(self) -> None:
        self._inner.close()


def test_a_failed_exchange_loses_nothing() -> None:
    def work(transport: Transport) -> Any:
        island = Island(_Breaking(transport, step=6))
        island.train(1, 5)
        shared, own = island.shared(), island.flat()
        with pytest.raises(TransportError, match="the link is down"):
            island.train(6, 6)
        assert torch.equal(island.shared(), shared)
        assert torch.equal(island.flat(), own + island.numbers(6000 + transport.rank))
        return True

    assert run_ranks(2, work) == [True, True]


@pytest.mark.parametrize("at", [1, 2, 7, 10])
def test_resume_in_the_middle_of_an_interval_continues_bit_for_bit(at: int) -> None:
    options = {
        "slow_momentum": 2.0,
        "sync_every": 4,
        "ramp_steps": 4,
        "step_time_budget_s": 0.01,
        "density": {"initial": 0.1, "min": 0.002, "max": 0.25},
    }
    saved: dict[int, Any] = {}

    def unbroken(transport: Transport) -> Any:
        island = Island(transport, slow=True, **options)
        island.train(1, at)
        own = [island.weights.own(b) for b in range(len(island.weights.shapes))]
        saved[transport.rank] = copy.deepcopy((island.session.state_dict(), own, island.shared()))
        return island.train(at + 1, 60)

    def resumed(transport: Transport) -> Any:
        island = Island(transport, slow=True, **options)
        state, own, shared = saved[transport.rank]
        sizes = [o.numel() for o in own]
        island.weights.set_own(list(shared.split(sizes)))
        island.weights.capture()
        island.weights.set_own(own)
        island.session.load_state_dict(state)
        return island.train(at + 1, 60)

    for one, other in zip(run_ranks(2, unbroken), run_ranks(2, resumed), strict=True):
        for (_, shared, own, report), again in zip(one, other, strict=True):
            assert torch.equal(shared, again[1])
            assert torch.equal(own, again[2])
            assert again[3] is None or report == again[3]  # None: no exchange since the resume
        assert one[-1][3] == other[-1][3]
        assert len({report.density for _, _, _, report in one}) > 2


def test_a_state_of_the_other_mode_is_refused() -> None:
    def work(transport: Transport) -> None:
        island = Island(transport)
        config = load_block({"gradient_pruning": {"prune": "gradient"}})
        state = PruningSession(config, transport).state_dict()
        island.session.load_state_dict(state)

    with pytest.raises(CheckpointError, match="prune must be 'update', got 'gradient'"):
        run_ranks(1, work)


def test_different_shared_weights_are_found_in_the_next_exchange() -> None:
    def work(transport: Transport) -> None:
        island = Island(transport)
        island.train(1, 4)
        if transport.rank:
            island.weights.shared(0)[0] += 1.0
        island.session.note_parameters(island.weights.crc())
        island.train(5, 5)

    with pytest.raises(Exception, match="no longer agree on their decisions or parameters"):
        run_ranks(2, work)
