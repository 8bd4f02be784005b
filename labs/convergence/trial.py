"""One training run: a method, a seed, its loss and what it received."""

from __future__ import annotations

import time
from typing import Any

import torch

from ds_gradprune.errors import NonFiniteError
from labs.convergence.adamw import learning_rate
from labs.convergence.base import Accumulated, DenseSimulation, Setting, Simulation
from labs.convergence.gpt import validation_loss
from labs.convergence.gradient import GradientSimulation
from labs.convergence.grid import DiLoCo, Gradient, Method, OneBitAdam, PowerSgd, Update
from labs.convergence.islands import DiLoCoSimulation, UpdateSimulation
from labs.convergence.peers import OneBitAdamSimulation, PowerSgdSimulation
from labs.convergence.text import Text

_CURVE_SEQUENCES = 128
_CURVE_POINTS = 8
AVERAGED_PART = 0.05
"""Of the run, its end: the steps whose shared weights are averaged."""


def simulation_of(setting: Setting, method: Method) -> Simulation:
    """The simulation that a grid's method asks for."""
    if method.accumulate > 1:
        return Accumulated(setting, method.accumulate, lambda own: _plain(own, method))
    return _plain(setting, method)


def _plain(setting: Setting, method: Method) -> Simulation:
    if isinstance(method, Gradient):
        return GradientSimulation(setting, method)
    if isinstance(method, Update):
        return UpdateSimulation(setting, method)
    if isinstance(method, DiLoCo):
        return DiLoCoSimulation(setting, method)
    if isinstance(method, OneBitAdam):
        return OneBitAdamSimulation(setting)
    if isinstance(method, PowerSgd):
        return PowerSgdSimulation(setting, method)
    return DenseSimulation(setting)


def run_trial(setting: Setting, method: Method, text: Text) -> dict[str, Any]:
    """Train once.

    Args:
        setting: everything but the method.
        method: of the grid.
        text: to train and validate on.

    Returns:
        Figures for the record: bits_per_param (received per parameter and step after warm-up),
        val_loss of the shared weights, val_loss_flushed of the weights after a last exact
        exchange, val_loss_averaged of the shared weights' mean over the last AVERAGED_PART of the
        steps, curve, stopped_at (a step after which the weights were not finite; None: it ran to
        its end), run_s and cpu_s, notes.
    """
    simulation = simulation_of(setting, method)
    try:
        return _run(setting, simulation, text)
    finally:
        simulation.close()


def _run(setting: Setting, simulation: Simulation, text: Text) -> dict[str, Any]:
    few, every = text.validation(_CURVE_SEQUENCES), max(1, setting.steps // _CURVE_POINTS)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    curve: list[list[float]] = []
    stopped_at = None
    averaged = torch.zeros_like(simulation.shared[0])
    averaged_from = setting.steps - max(1, round(AVERAGED_PART * setting.steps))
    for step in range(setting.steps):
        tokens = text.batch(setting.seed, step, setting.workers, setting.train.batch)
        try:
            simulation.step(step, tokens, learning_rate(setting.train, step, setting.steps))
        except NonFiniteError:
            stopped_at = step + 1
            break
        if step >= averaged_from:
            averaged += (simulation.shared[0] - averaged) / (step + 1 - averaged_from)
        if (step + 1) % every == 0:
            curve.append([step + 1, validation_loss(setting.gpt, simulation.shared[0], few)])
            if not curve[-1][1] < float("inf"):
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
        "notes": simulation.notes() if stopped_at is None else {},
    }
