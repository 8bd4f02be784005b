"""States, signals and configurations for the tests of the law "stepwise"."""

from __future__ import annotations

import math

from ds_gradprune.config import DensityConfig, GradientPruningConfig
from ds_gradprune.controller.stepwise import StepwiseState
from ds_gradprune.link import LinkState, observe
from ds_gradprune.performance import PerformanceState
from ds_gradprune.records import CHUNK_NUMEL, StepSignals

K = 205  # density 0.05
DENSITY = K / CHUNK_NUMEL
UP = math.ceil(K / 0.7)
DOWN = math.ceil(K * 0.7)
WINDOW = 4
FALLING = (3.0, 2.9, 2.8, 2.7, 2.6)  # P after one more loss of 2.5: held
RISING = (2.0, 2.1, 2.2, 2.3, 2.4)  # P after one more loss of 2.5: missed


def make_config(**fields):
    base = {
        "prune": "gradient",
        "controller": "stepwise",
        "warmup_steps": 0,
        "ramp_steps": 0,
        "window_size": WINDOW,
        "step_time_budget_s": 0.3,
        "density": DensityConfig(initial=0.05, min=0.001, max=0.25),
    }
    return GradientPruningConfig(**(base | fields))


def make_state(k=K, *, losses=FALLING, step_times_s=(0.2, 0.2), **fields):
    return StepwiseState(
        density=k / CHUNK_NUMEL,
        performance=PerformanceState(losses),
        step_times_s=step_times_s,
        **fields,
    )


def make_signals(k=K, **fields):
    base = {
        "step": 10,
        "loss": 2.5,
        "nonfinite": False,
        "timed_density": k / CHUNK_NUMEL,
        "compute_time_s": 0.15,
        "codec_time_s": 0.01,
        "comm_time_s": 0.04,
        "step_time_s": 0.2,
        "wire_bytes": 100_000,
        "dense_bytes": 2_000_000,
    }
    return StepSignals(**(base | fields))


def alarmed(comm_time_s, wire_bytes=100_000, *, last, alike):
    """A link state in which one more exchange of `last` seconds raises the alarm."""
    state = LinkState()
    for time_s in [comm_time_s] * 12 + [last] * alike:
        state, estimate = observe(state, time_s, wire_bytes)
        assert estimate.changed is None
    assert observe(state, last, wire_bytes)[1].changed is not None
    return state


SLOWER = alarmed(0.04, last=0.4, alike=1)
FASTER = alarmed(0.04, last=0.004, alike=1)
