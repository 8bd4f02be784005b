"""The step loop without DeepSpeed: measured, agreed, decided, resumed."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch

from ds_gradprune.config import load_block
from ds_gradprune.errors import CheckpointError, RankMismatchError, UnsupportedError
from ds_gradprune.records import Cause
from ds_gradprune.session import PruningSession
from ds_gradprune.transport.base import Transport
from ds_gradprune.transport.throttle import RatePoint, ThrottledTransport
from tests.helpers.ranks import VirtualClock, run_ranks

SHAPES = [torch.Size((128, 128)), torch.Size((128,)), torch.Size((5000, 2))]
NUMEL = sum(shape.numel() for shape in SHAPES)
BLOCK = {
    "prune": "gradient",
    "value_bits": 16,  # the link below is slow for these
    "warmup_steps": 3,
    "ramp_steps": 2,
    "window_size": 4,
    "step_time_budget_s": 0.03,
    "density": {"initial": 0.05, "min": 0.002, "max": 0.25},
    "throttle": {"schedule": [{"step": 0, "rate_mbit": 1.0}]},
}


def make(transport: Transport, block: dict[str, Any] | None = None, slow: bool = True) -> Any:
    config = load_block({"gradient_pruning": block or BLOCK})
    clock = VirtualClock()
    if slow:
        points = [RatePoint(0, 1e6 / 8), RatePoint(20, 1e7 / 8)]
        transport = ThrottledTransport(transport, points, sleep=clock.sleep)
    return PruningSession(config, transport, clock.now_s)


def loss_at(step: int, rank: int) -> float:
    return 4.0 / step + 0.01 * rank


def run(session: PruningSession, rank: int, first: int, last: int) -> list[Any]:
    trace = []
    for step in range(first, last + 1):
        session.begin_step()
        session.begin_reduction(loss_at(step, rank), nonfinite=False)
        vector = torch.randn(NUMEL, generator=torch.Generator().manual_seed(10 * step + rank))
        session.reduce_bucket(vector, SHAPES)
        session.end_reduction()
        report = session.end_step()
        trace.append((vector, report))
    return trace


def test_every_rank_makes_the_same_decisions_and_sums() -> None:
    traces = run_ranks(3, lambda t: run(make(t), t.rank, 1, 40))
    decisions = [[report.decision for _, report in trace] for trace in traces]
    assert decisions[0] == decisions[1] == decisions[2]
    for step in zip(*traces, strict=True):
        assert all(torch.equal(vector, step[0][0]) for vector, _ in step)


@pytest.mark.parametrize("controller", ["predictive", "stepwise"])
def test_missing_and_damaged_signals_split_no_ranks(controller: str) -> None:
    def holey(transport: Transport) -> list[Any]:
        session, rank, made = (
            make(transport, BLOCK | {"controller": controller}),
            transport.rank,
            [],
        )
        for step in range(1, 60):
            if (step + rank) % 7:  # now and then one rank does not see its step begin
                session.begin_step()
            loss: float | None = loss_at(step, rank)
            if step % 11 == rank:
                loss = None
            if step % 17 == rank:
                loss = math.nan
            session.begin_reduction(loss, nonfinite=step % 13 == rank)
            vector = torch.randn(NUMEL, generator=torch.Generator().manual_seed(10 * step + rank))
            session.reduce_bucket(vector, SHAPES)
            session.end_reduction()
            made.append(session.end_step().decision)
        return [*made, session.state_dict()["agreement"], session.state_dict()["controller"]]

    ranks = run_ranks(3, holey)
    assert ranks[0] == ranks[1] == ranks[2]
    assert len({decision.density for decision in ranks[0][:-2]}) > 3


def test_a_decision_holds_for_the_very_next_step() -> None:
    trace = run_ranks(2, lambda t: run(make(t), t.rank, 1, 30))[0]
    for (_, before), (_, after) in itertools.pairwise(trace):
        assert before.decision.step == after.step
        assert before.decision.density == after.density
        assert before.decision.cause is after.cause
    assert {report.density for _, report in trace} > {1.0}


def test_warmup_is_the_plain_sum_and_then_bytes_fall() -> None:
    trace = run_ranks(2, lambda t: run(make(t), t.rank, 1, 12))[0]
    for step, (vector, report) in enumerate(trace, start=1):
        plain = sum(
            torch.randn(NUMEL, generator=torch.Generator().manual_seed(10 * step + rank))
            for rank in range(2)
        )
        assert torch.equal(vector, plain) == (step <= 3)
        assert (report.cause is Cause.WARMUP) == (step <= 3)
        if step <= 3:
            assert report.wire_bytes == report.dense_bytes + 64  # the headers of two ranks
        else:
            assert report.wire_bytes < report.dense_bytes / 3


def test_the_loss_is_the_mean_over_ranks() -> None:
    trace = run_ranks(4, lambda t: run(make(t), t.rank, 1, 2))[0]
    # Losses travel as float32: half an ulp of a number below 8 each.
    assert trace[0][1].loss == pytest.approx(4.0 + 0.015, abs=2.0**-21)


def test_times_are_those_of_the_virtual_link() -> None:
    trace = run_ranks(2, lambda t: run(make(t), t.rank, 1, 2))[0]
    report = trace[1][1]
    wire_s = (64 + NUMEL * 4) / (1e6 / 8)  # 1 Mbit/s; two ranks: a ring sends the vector once
    ticks_s = 0.02  # a handful of looks at a clock that moves 2^-10 s each
    assert report.comm_time_s == pytest.approx(wire_s, abs=ticks_s)
    assert report.step_time_s == pytest.approx(wire_s, abs=2 * ticks_s)
    # The agreed times lag one step: they are the first step's.
    assert report.signals.comm_time_s == pytest.approx(trace[0][1].comm_time_s, rel=1e-6)
    assert report.signals.wire_bytes == pytest.approx(trace[0][1].wire_bytes, rel=1e-6)
    assert trace[0][1].signals.timed_density is None


def test_density_falls_on_a_slow_link_to_its_budget() -> None:
    trace = run_ranks(2, lambda t: run(make(t), t.rank, 1, 60))[0]
    densities = [report.density for _, report in trace]
    assert min(densities[5:19]) < 0.05
    causes = {report.cause for _, report in trace}
    assert Cause.OVER_BUDGET in causes


def test_resume_continues_bit_for_bit() -> None:
    saved: dict[int, Any] = {}

    def unbroken(transport: Transport) -> Any:
        session = make(transport)
        run(session, transport.rank, 1, 13)
        saved[transport.rank] = copy.deepcopy(session.state_dict())
        return run(session, transport.rank, 14, 30), session.totals

    def resumed(transport: Transport) -> Any:
        session = make(transport)
        session.load_state_dict(saved[transport.rank])
        return run(session, transport.rank, 14, 30), session.totals

    one, other = run_ranks(2, unbroken), run_ranks(2, resumed)
    for (trace, totals), (again, totals_again) in zip(one, other, strict=True):
        assert totals == totals_again
        for (vector, report), (vector_again, report_again) in zip(trace, again, strict=True):
            assert torch.equal(vector, vector_again)
            assert report.decision == report_again.decision
            assert report.signals == report_again.signals


def test_state_holds_only_plain_types_and_tensors(tmp_path: Any) -> None:
    def work(transport: Transport) -> Any:
        session = make(transport)
        run(session, transport.rank, 1, 6)
        return session.state_dict()

    state = run_ranks(2, work)[0]
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    residuals = again.pop("residuals")
    assert torch.equal(residuals["0"]["buffer"], state.pop("residuals")["0"]["buffer"])
    assert json.dumps(again) == json.dumps(state)


@pytest.mark.parametrize(("key", "value"), [("world_size", 3), ("rank", 1), ("format", 99)])
def test_a_foreign_state_is_refused(key: str, value: int) -> None:
    def work(transport: Transport) -> None:
        session = make(transport)
        session.load_state_dict(session.state_dict() | {key: value})

    with pytest.raises(CheckpointError, match=f"{key} must be"):
        run_ranks(1, work)


def test_different_parameters_are_found_in_the_next_step() -> None:
    def work(transport: Transport) -> None:
        session = make(transport)
        run(session, transport.rank, 1, 4)
        session.note_parameters(1234 + transport.rank)
        run(session, transport.rank, 5, 5)

    with pytest.raises(RankMismatchError, match="no longer agree"):
        run_ranks(2, work)


def test_a_bad_rank_holds_the_density_and_enters_no_window() -> None:
    def work(transport: Transport) -> Any:
        session = make(transport)
        run(session, transport.rank, 1, 8)
        session.begin_step()
        session.begin_reduction(float("nan") if transport.rank else 1.0, nonfinite=False)
        session.reduce_bucket(torch.ones(NUMEL), SHAPES)
        session.end_reduction()
        return session.end_step()

    for report in run_ranks(2, work):
        assert report.loss is None
        assert report.nonfinite
        assert report.decision.density == report.density
        assert report.decision.cause is Cause.HOLD


def test_a_changed_set_of_parameters_is_refused() -> None:
    def work(transport: Transport) -> None:
        session = make(transport)
        run(session, transport.rank, 1, 1)
        session.begin_reduction(1.0, nonfinite=False)
        session.reduce_bucket(torch.ones(NUMEL - 128), [SHAPES[0], SHAPES[2]])

    with pytest.raises(UnsupportedError, match="bucket 0 held 3 tensors and now holds 2"):
        run_ranks(1, work)


def test_a_step_without_gradients_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="step 1 ended without reducing any gradient"):
        run_ranks(1, lambda t: make(t).end_step())


def test_several_buckets_share_one_step() -> None:
    def work(transport: Transport) -> Any:
        session = make(transport, slow=False)
        sums = []
        for step in range(1, 9):
            session.begin_step()
            session.begin_reduction(1.0 / step, nonfinite=False)
            for bucket, shape in enumerate([(100, 100), (64, 200)]):
                seed = 100 * step + 10 * bucket + transport.rank
                vector = torch.randn(
                    torch.Size(shape).numel(), generator=torch.Generator().manual_seed(seed)
                )
                session.reduce_bucket(vector, [torch.Size(shape)])
                sums.append(vector)
            session.end_reduction()
            session.end_step()
        return sums, session.residual_bytes

    one, other = run_ranks(2, work)
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1] == 4 * (100 * 100 + 64 * 200)
