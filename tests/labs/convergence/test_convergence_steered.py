"""Islands whose density the law chooses on a simulated link, while a small model trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from labs.convergence.grid import Steering, Update
from labs.convergence.steered import SteeredSimulation, trace_of
from labs.convergence.store import _in_first_lab
from labs.convergence.table import markdown_table, rows_of
from labs.convergence.trial import can_stack, simulation_of
from tests.labs.convergence.cases import SETTING, tokens, train, update

TURNS: dict[str, Any] = {"rates_mbit": (100.0, 20.0), "hold_steps": 60}


def method(**steered: Any) -> Update:
    own = Steering.model_validate(TURNS | steered)
    return Update(kind="update", name="s", density=0.05, steered=own)


def test_rates_of_the_link_come_in_turn() -> None:
    rates = trace_of(Steering(rates_mbit=(100.0, 20.0), hold_steps=2), 5).rates
    assert rates == (1e8, 1e8, 2e7, 2e7, 1e8)


def test_a_pinned_density_trains_as_without_a_link() -> None:
    steered = simulation_of(SETTING, method())
    assert isinstance(steered, SteeredSimulation)
    plain = update(density=0.05)
    assert torch.equal(train(steered), train(plain))
    assert steered.received_bits == plain.received_bits
    notes = steered.notes()
    assert notes["share_at_100"] == pytest.approx(0.05, rel=0.01)
    assert notes["link_s"] > 6 * 0.6  # six steps after the warm-up, of 0.6 s of computation
    steered.close()
    plain.close()


@pytest.mark.parametrize("moves_interval", [False, True])
def test_the_law_sends_less_where_the_link_is_slow(moves_interval: bool) -> None:
    setting = replace(SETTING, workers=2, steps=120)
    law = method(density_min=0.001, density_max=0.25, budget_s=0.9, moves_interval=moves_interval)
    simulation = SteeredSimulation(setting, law)
    train_two(simulation, 120)
    notes = simulation.notes()
    assert notes["share_at_20"] < 0.7 * notes["share_at_100"]
    # In budget, but for the few steps in which the law cannot know of the slower link yet.
    assert notes["link_s"] < 0.9 * 118 + 5 * 1.5
    simulation.close()


def train_two(simulation: SteeredSimulation, steps: int) -> None:
    for step in range(steps):
        simulation.step(step, tokens(step, workers=2), 1e-3)


def test_runs_of_a_link_are_made_alone_and_are_new() -> None:
    assert not can_stack(method())
    assert can_stack(Update(kind="update", name="u"))
    assert _in_first_lab(method()) is None


def test_a_page_has_the_seconds_only_where_there_is_a_link() -> None:
    def run(name: str, kind: str, notes: dict[str, float]) -> dict[str, Any]:
        return {
            "method": name,
            "kind": kind,
            "seed": 0,
            "train": {"lr": 1.0},
            "bits_per_param": 1.0,
            "val_loss": 2.0,
            "val_loss_flushed": 2.0,
            "stopped_at": None,
            "notes": notes,
        }

    dense, law = run("dense", "dense", {}), run("law", "update", {"link_s": 99.6})
    lines = markdown_table(rows_of([dense, law])).splitlines()
    assert lines[0].endswith("| seeds | s on the link |")
    assert lines[2].endswith("| 1 |  |")
    assert lines[3].endswith("| 1 | 100 |")
    assert markdown_table(rows_of([dense])).splitlines()[0].endswith("| seeds |")
