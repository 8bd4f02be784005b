"""One training run: a method, a seed, its loss and what it received."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from labs.convergence.base import Accumulated, DenseSimulation, Setting, Simulation
from labs.convergence.gpt import validation_loss
from labs.convergence.gradient import GradientSimulation
from labs.convergence.grid import Dense, DiLoCo, Gradient, Method, OneBitAdam, PowerSgd, Update
from labs.convergence.islands import DiLoCoSimulation, IslandSimulation, UpdateSimulation
from labs.convergence.peers import OneBitAdamSimulation, PowerSgdSimulation
from labs.convergence.stack import Alone, Stack, Together
from labs.convergence.steered import SteeredSimulation
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
        kind = UpdateSimulation if method.steered is None else SteeredSimulation
        return kind(setting, method)
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
        return _run(Alone(simulation), text)[0]
    finally:
        simulation.close()


def can_stack(method: Method) -> bool:
    """Whether runs of a method can be made side by side, see `run_stack`."""
    if isinstance(method, Update) and (method.warmup != "dense" or method.steered is not None):
        return False  # its islands part at another step, or exchange at steps of their own
    return method.accumulate == 1 and isinstance(method, (Dense, Update, DiLoCo))


def run_stack(
    settings: Sequence[Setting],
    methods: Sequence[Method],
    text: Text,
    *,
    tell: Callable[[int, int, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Train several times side by side.

    Args:
        settings: of every run, all of one model, number of workers and steps, and of
            hyper-parameters that differ in the learning rate alone.
        methods: of every run; all dense, or none.
        text: to train and validate on.
        tell: is told of every point of a curve: number of the run, step, loss.

    Returns:
        What `run_trial` returns, of every run; times are each run's share.
    """
    simulations: list[DenseSimulation | IslandSimulation] = []
    try:
        for setting, method in zip(settings, methods, strict=True):
            simulation = simulation_of(setting, method)
            assert isinstance(simulation, (DenseSimulation, IslandSimulation))
            simulations.append(simulation)
        return _run(Stack(simulations), text, tell)
    finally:
        for simulation in simulations:
            simulation.close()


class _Track:
    """What is written down of one run while it goes on."""

    def __init__(self, simulation: Simulation) -> None:
        self.curve: list[list[float]] = []
        self.averaged = torch.zeros_like(simulation.shared[0])


def _run(
    together: Together, text: Text, tell: Callable[[int, int, float], None] | None = None
) -> list[dict[str, Any]]:
    setting = together.simulations[0].setting
    few, every = text.validation(_CURVE_SEQUENCES), max(1, setting.steps // _CURVE_POINTS)
    few = few.to(setting.device)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    averaged_from = setting.steps - max(1, round(AVERAGED_PART * setting.steps))
    tracks = [_Track(simulation) for simulation in together.simulations]
    seeds = [simulation.setting.seed for simulation in together.simulations]
    batches = text.batches(seeds, setting.steps, setting.workers, setting.train.batch)
    batches = batches.to(setting.device)
    for step in range(setting.steps):
        together.step(step, batches.of(step))
        for number, (track, simulation) in enumerate(
            zip(tracks, together.simulations, strict=True)
        ):
            if together.stopped_at[number] is not None:
                continue
            if step >= averaged_from:
                track.averaged += (simulation.shared[0] - track.averaged) / (
                    step + 1 - averaged_from
                )
            if (step + 1) % every == 0:
                loss = validation_loss(setting.gpt, simulation.shared[0], few)
                track.curve.append([step + 1, loss])
                if tell is not None:
                    tell(number, step + 1, loss)
                if not loss < float("inf"):
                    together.stopped_at[number] = step + 1
        if None not in together.stopped_at:
            break
    every_sequence = text.validation().to(setting.device)
    figures = [
        _figures(simulation, track, stopped_at, every_sequence)
        for simulation, track, stopped_at in zip(
            together.simulations, tracks, together.stopped_at, strict=True
        )
    ]
    run_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    for own in figures:
        own["run_s"], own["cpu_s"] = run_s / len(figures), cpu_s / len(figures)
    return figures


def _figures(
    simulation: Simulation, track: _Track, stopped_at: int | None, sequences: torch.Tensor
) -> dict[str, Any]:
    """The record of a run, but for its times."""
    setting = simulation.setting
    pruned_steps = (stopped_at or setting.steps) - setting.train.warmup_steps
    return {
        "bits_per_param": simulation.received_bits / setting.gpt.numel / max(1, pruned_steps),
        "val_loss": validation_loss(setting.gpt, simulation.shared[0], sequences),
        "val_loss_flushed": validation_loss(setting.gpt, simulation.flushed(), sequences),
        "val_loss_averaged": None
        if stopped_at is not None
        else validation_loss(setting.gpt, track.averaged, sequences),
        "curve": track.curve,
        "stopped_at": stopped_at,
        "run_s": 0.0,
        "cpu_s": 0.0,
        "notes": simulation.notes() if stopped_at is None else {},
    }
