"""Made-up runs of the race: dense steps of 1 s, pruned ones of 0.1 s; unshaped all of 0.05 s."""

from __future__ import annotations

from labs.race import command
from labs.race.campaign import Run
from labs.race.crew import Step, Stretch
from labs.race.figures import Figures
from labs.race.job import Recipe

RECIPE = Recipe("nano", 4, 2e-3, 0.99, 0.1, 1.0, 4, 10, 100, 0, None, None)


def stretch(
    first, count, wall_s, losses=(), wire_bytes=1000.0, comm_s=0.0, density=None, kind="usual"
):
    steps = [
        Step(n, 5.0, wall_s, wall_s - comm_s, 0.0, comm_s, None, density, kind)
        for n in range(first, first + count)
    ]
    return Stretch(steps, list(losses), wire_bytes)


NONE = Stretch([], [], None)


def dense_runs(number=0, final=3.0):
    whole = stretch(1, 10, 0.05, [(0, 6.0), (5, 4.0), (10, final)])
    return [
        Run("dense_fp32", None, number, 7, NONE, whole),
        Run("dense_fp32", "20mbit", number, 7, NONE, stretch(11, 4, 1.0)),
    ]


def topk_runs(number=0, losses=((5, 4.5), (10, 3.5), (15, 2.5))):
    warm = stretch(1, 2, 0.05, [(0, 6.0)], kind="dense")
    rest = stretch(3, 13, 0.05, losses, 100.0)
    return [
        Run("topk_0.05", None, number, 7, warm, rest),
        Run("topk_0.05", "20mbit", number, 7, NONE, stretch(16, 4, 0.1, (), 100.0)),
    ]


def figures(*runs):
    return Figures([run for group in runs for run in group], hosts=2, steps=10, tokens_per_step=64)


def plan(*words):
    return command.make_plan(command.parser().parse_args(words))
