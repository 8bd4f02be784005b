"""Properties of the law "predictive" over whole runs: range, purity, resume, poison, consensus."""

import json
import math
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gradprune import law
from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import DensityConfig
from ds_gradprune.law.consensus import aggregate
from ds_gradprune.law.signals import RankSignals, StepSignals
from tests.helpers.simulated_law import MBIT, Run, make_config

times = st.one_of(st.none(), st.floats(1e-6, 1e3), st.just(math.nan), st.just(math.inf))
observations = st.tuples(
    st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.inf), st.just(math.nan)),  # loss
    st.booleans(),  # nonfinite
    times,  # compute
    times,  # step
    st.one_of(st.floats(0.0, 1e3), st.just(math.inf)),  # comm
    st.integers(0, 10**9),  # wire bytes
    st.integers(0, 10**9),  # dense bytes
)
configs = st.builds(
    lambda densities, budget_s, warmup, ramp, target: make_config(
        density=DensityConfig(min=densities[0], initial=densities[1], max=densities[2]),
        step_time_budget_s=budget_s,
        warmup_steps=warmup,
        ramp_steps=ramp,
        window_size=8,
        performance_target=target,
    ),
    st.tuples(*[st.floats(1e-5, 1.0)] * 3).map(sorted),
    st.one_of(st.none(), st.floats(1e-4, 5.0)),
    st.integers(0, 5),
    st.integers(0, 5),
    st.floats(-2.0, 2.0),
)


def replay(config, state, decision, history, first_step=1):
    """Every (state before, signals, state, decision) of a run; times ride one step late."""
    previous = None
    for step, (loss, bad, compute_s, step_s, comm_s, wire, dense) in enumerate(history, first_step):
        signals = StepSignals(
            step=step,
            loss=loss,
            nonfinite=bad,
            timed_density=previous,
            compute_time_s=compute_s,
            codec_time_s=0.01,
            comm_time_s=comm_s,
            step_time_s=step_s,
            wire_bytes=wire,
            dense_bytes=dense,
        )
        previous = decision.density
        before = state
        state, decision = law.update(config, state, signals)
        yield before, signals, state, decision


@settings(deadline=None, max_examples=100)
@given(configs, st.lists(observations, max_size=60))
def test_density_is_always_in_range_or_dense(config, history) -> None:
    k_min, k_max = kept_per_chunk(config.density.min), kept_per_chunk(config.density.max)
    for _, _, state, decision in replay(config, *law.start(config), history):
        k = decision.density * CHUNK_NUMEL
        assert k == int(k)
        assert decision.density == state.density
        assert k_min <= k <= k_max or k == CHUNK_NUMEL
        if decision.step > config.warmup_steps + max(1, config.ramp_steps) and k_min == k_max:
            assert k == k_min
        assert decision.reason
        assert "\n" not in decision.reason


@settings(deadline=None, max_examples=60)
@given(configs, st.lists(observations, min_size=1, max_size=60), st.integers(0, 59))
def test_pure_and_goes_on_alike_after_json(config, history, cut) -> None:
    cut = min(cut, len(history) - 1)
    once = list(replay(config, *law.start(config), history))
    before, signals, state, decision = once[cut]
    snapshot = law.to_plain(before)
    assert law.update(config, before, signals) == (state, decision)
    assert law.to_plain(before) == snapshot
    restored = law.restore(config, json.loads(json.dumps(law.to_plain(state))))
    assert restored == state
    for _, signals, expected_state, expected_decision in once[cut + 1 :]:
        restored, decision = law.update(config, restored, signals)
        assert (restored, decision) == (expected_state, expected_decision)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["comm_time_s", "compute_time_s", "codec_time_s", "wire_bytes", "loss"]),
    st.sampled_from([1e-9, 1e-3, 1e3, 1e9]),
    st.integers(0, 2**16),
)
def test_one_poisoned_measurement_does_no_harm(name, factor, seed) -> None:
    run = Run(seed=seed, noise=0.03).steps(120, 20 * MBIT)
    before = run.k
    clean = run.step(20 * MBIT)
    value = getattr(clean, name) * factor
    run.step(20 * MBIT, **{name: int(value) if name == "wire_bytes" else value})
    run.steps(30, 20 * MBIT)
    assert run.k == pytest.approx(before, rel=0.12)
    assert all(0.5 < d.density * CHUNK_NUMEL / before < 1.3 for d in run.decisions[122:])


def test_resume_in_the_middle_of_everything() -> None:
    # A slower link, a rising loss, a dense stretch: cut anywhere, the rest is the same.
    def play(run, first, last):
        for step in range(first, last):
            mbit = 20 if step < 150 else 4 if step < 200 else 1500 if step < 260 else 20
            loss = 2.0 + 0.02 * max(0, step - 120) + 0.05 * math.sin(7.0 * step)
            run.step(mbit * MBIT, loss)

    whole = Run(noise=0.0)
    play(whole, 1, 320)
    for cut in (30, 130, 153, 160, 203, 215, 262):
        run = Run(noise=0.0)
        play(run, 1, cut)
        state = json.loads(json.dumps(law.to_plain(run.state)))
        run.state = law.restore(run.config, state)
        play(run, cut, 320)
        assert run.decisions == whole.decisions, cut
    assert {1.0} < {d.density for d in whole.decisions[210:]}


# ---- consensus -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_every_rank_computes_the_same_sequence_from_the_same_headers(hosts) -> None:
    # Headers with holes: a rank without a loss, without times, with nan, late by seconds.
    rng = random.Random(hosts)
    config = make_config(step_time_budget_s=0.3)
    laws = [law.start(config) for _ in range(hosts)]
    hashes = [0] * hosts
    timed = None
    for step in range(1, 400):
        ranks = [
            RankSignals(
                loss=None if rng.random() < 0.03 else 4.0 / step + rng.random(),
                nonfinite=rng.random() < 0.01,
                compute_time_s=None if timed is None or rng.random() < 0.03 else 0.2 + rng.random(),
                codec_time_s=0.01 * rng.random(),
                comm_time_s=0.0 if timed is None else 0.05 * rng.random() + 3.0 * (step % 31 == 0),
                wire_bytes=0 if timed is None else rng.randrange(1, 10**6),
                agreement=0,
            )
            for _ in range(hosts)
        ]
        for rank in range(hosts):
            state, _ = laws[rank]
            signals = aggregate(step, list(ranks), timed, 4_000_000)
            state, decision = law.update(config, state, signals)
            laws[rank] = (state, decision)
            hashes[rank] = zlib.crc32(repr(decision).encode(), hashes[rank])
        assert len(set(hashes)) == 1
        timed = laws[0][1].density
    assert all(state == laws[0][0] for state, _ in laws)
