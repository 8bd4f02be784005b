"""One training run: a method, a seed, its loss and what it received."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.convergence_lab.adamw import learning_rate
from benchmarks.convergence_lab.base import (
    Accumulated,
    DenseSimulation,
    DenseSlowSimulation,
    Setting,
    Simulation,
)
from benchmarks.convergence_lab.gpt import validation_loss
from benchmarks.convergence_lab.gradient import GradientSimulation
from benchmarks.convergence_lab.peers import OneBitAdamSimulation, PowerSgdSimulation
from benchmarks.convergence_lab.text import Text
from benchmarks.convergence_lab.update import UpdateSimulation

_CURVE_SEQUENCES = 128
_CURVE_POINTS = 8
AVERAGED_PART = 0.05
"""Of the run, its end: the steps whose shared weights are averaged."""


def simulation_of(setting: Setting, method: Any) -> Simulation:
    """The simulation that a grid's method asks for."""
    if method.accumulate > 1:
        return Accumulated(setting, method.accumulate, lambda own: _plain(own, method))
    return _plain(setting, method)


def _plain(setting: Setting, method: Any) -> Simulation:
    if method.kind == "dense":
        return DenseSimulation(setting)
    if method.kind == "dense_slow":
        return DenseSlowSimulation(setting, method)
    if method.kind == "gradient":
        return GradientSimulation(setting, method)
    if method.kind == "update":
        return UpdateSimulation(setting, method)
    if method.kind == "onebit_adam":
        return OneBitAdamSimulation(setting)
    return PowerSgdSimulation(setting, method)


def run_trial(
    setting: Setting,
    method: Any,
    text: Text,
    *,
    reference: list[list[float]] | None = None,
    give_up_pct: float | None = None,
) -> dict[str, Any]:
    """Train once.

    Args:
        setting: everything but the method.
        method: of the grid.
        text: to train and validate on.
        reference: dense's curve, for `give_up_pct`.
        give_up_pct: see `grid.Grid`.

    Returns:
        Figures for the record: bits_per_param (received per parameter and step after warm-up),
        val_loss of the shared weights, val_loss_flushed of the weights after a last exact
        exchange, val_loss_averaged of the shared weights' mean over the last AVERAGED_PART of the
        steps, curve, stopped_at (None: it ran to its end), run_s and cpu_s, notes.
    """
    simulation = simulation_of(setting, method)
    few = text.validation(_CURVE_SEQUENCES)
    every = max(1, setting.steps // _CURVE_POINTS)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    curve: list[list[float]] = []
    stopped_at = None
    averaged = torch.zeros_like(simulation.shared[0])
    averaged_from = setting.steps - max(1, round(AVERAGED_PART * setting.steps))
    for step in range(setting.steps):
        tokens = text.batch(setting.seed, step, setting.workers, setting.train.batch)
        simulation.step(step, tokens, learning_rate(setting.train, step, setting.steps))
        if step >= averaged_from:
            averaged += (simulation.shared[0] - averaged) / (step + 1 - averaged_from)
        if (step + 1) % every == 0:
            curve.append([step + 1, validation_loss(setting.gpt, simulation.shared[0], few)])
            if _is_hopeless(curve, reference, give_up_pct):
                stopped_at = step + 1
                break
    every_sequence = text.validation()
    pruned_steps = (stopped_at or setting.steps) - setting.train.warmup_steps
    return {
        "bits_per_param": simulation.received_bits / setting.gpt.numel / max(1, pruned_steps),
        "val_loss": validation_loss(setting.gpt, simulation.shared[0], every_sequence),
        "val_loss_flushed": validation_loss(setting.gpt, simulation.flushed(), every_sequence),
        "val_loss_averaged": None
        if stopped_at is not None
        else validation_loss(setting.gpt, averaged, every_sequence),
        "curve": curve,
        "stopped_at": stopped_at,
        "run_s": time.perf_counter() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "notes": simulation.notes(),
    }


def _is_hopeless(
    curve: list[list[float]], reference: list[list[float]] | None, give_up_pct: float | None
) -> bool:
    """Too far behind dense at the same step, at the half or at three quarters; or not a number."""
    if not curve[-1][1] < float("inf"):
        return True
    if reference is None or give_up_pct is None or len(curve) not in (4, 6):
        return False
    return curve[-1][1] > reference[len(curve) - 1][1] * (1 + give_up_pct / 100)
