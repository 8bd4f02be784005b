"""Rounds over a transport that holds up: equal bits on all islands, and a resume changes none."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.config import DensityConfig, GradientPruningConfig
from ds_gradprune.errors import TransportError
from ds_gradprune.wire.loopback import LoopbackTransport
from tests.helpers.ranks import run_ranks
from tests.helpers.rounds_bench import COMPUTE_S, Bench

STEPS = 1000
SAVED = (137, 500, 861)
BUDGET_S = 1.3 * COMPUTE_S

MODES: dict[str, dict[str, Any]] = {
    "every step, used": {"sync_every": 1},
    "every step, reset": {"sync_every": 1, "residual": "reset"},
    "every 4, used": {"sync_every": 4, "residual": "used"},
    "every 4, reset, slow momentum": {"sync_every": 4, "slow_momentum": 1.0},
    "every 10, 2 bits": {"sync_every": 10, "value_bits": 2},
    "auto": {"sync_every": "auto"},
    "auto, slow momentum": {"sync_every": "auto", "slow_momentum": 1.0, "value_bits": 2},
    "auto, unpruned warm-up": {"sync_every": "auto", "warmup_steps": 40, "warmup": "unpruned"},
    "auto, waited for": {"sync_every": "auto", "overlap": False},
    "every step, warm-up goes on unpruned": {"warmup_steps": 60, "warmup": "auto"},
}


def config_of(mode: str) -> GradientPruningConfig:
    base: dict[str, Any] = {
        "overlap": "auto",
        "warmup_steps": 0,
        "ramp_steps": 8,
        "step_time_budget_s": BUDGET_S,
        "density": DensityConfig(initial=0.05, min=0.001, max=0.25),
        "window_size": 32,
    }
    return GradientPruningConfig(**(base | MODES[mode]))


def whole_s(step: int) -> float:
    """Seconds of an exchange that sends everything: the link slows, recovers, and slows again."""
    return (3.0, 60.0, 3.0, 25.0)[step * 4 // (STEPS + 1)]


def rate_of(step: int) -> float:
    return 0.01 * (1.0 - 0.0007 * step)


def train(bench: Bench, first: int, saved: dict[int, Any]) -> list[int]:
    crcs = []
    for step in range(first, STEPS + 1):
        bench.step()
        crcs.append(bench.islands.weights.crc())
        if step in SAVED:
            saved[step] = bench.save()
    bench.rounds.land()
    return [*crcs, bench.islands.weights.crc(), bench.islands.weights.own_crc()]


def held_up(seed: int) -> Callable[[str, int, int], None]:
    turn, pause = random.Random(seed), threading.Event()

    def hold_up(_operation: str, _rank: int, _call: int) -> None:
        if turn.random() < 0.2:
            pause.wait(turn.random() * 1e-3)

    return hold_up


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(120)
def test_equal_bits_under_random_delays_and_after_a_resume(mode: str) -> None:
    config = config_of(mode)
    saved: list[dict[int, Any]] = [{}, {}]

    def whole(transport: LoopbackTransport) -> tuple[list[int], list[int]]:
        bench = Bench(transport, config, whole_s, rate_of)
        return train(bench, 1, saved[transport.rank]), bench.intervals

    def resumed(transport: LoopbackTransport) -> list[int]:
        at = SAVED[1]
        bench = Bench(transport, config, whole_s, rate_of)
        bench.load(saved[transport.rank][at])
        return train(bench, at + 1, {})

    (one, intervals), (other, others) = run_ranks(2, whole, delay=held_up(1))
    assert one[:-1] == other[:-1]  # the own weights, the last, are each island's
    assert intervals == others
    assert len(set(one)) > STEPS // 40
    again = run_ranks(2, resumed, delay=held_up(2))
    assert again[0] == one[SAVED[1] :]
    assert again[1] == other[SAVED[1] :]
    if config.sync_every == "auto":
        assert {4, 8, 16} <= set(intervals)
        steps = [a / b for a, b in zip(intervals[1:], intervals[:-1], strict=True)]
        assert set(steps) <= {0.5, 1.0, 2.0}


@pytest.mark.parametrize("mode", ["every step, used", "every 4, used", "every 10, 2 bits"])
def test_the_model_trains_with_the_own_weights_as_they_are(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 and at ZeRO stages 1 to 3 it holds copies. Own weights also move when one begins."""
    config = config_of(mode)

    def main(transport: LoopbackTransport) -> None:
        bench = Bench(transport, config, whole_s, rate_of)
        model: dict[str, torch.Tensor] = {}

        def publish() -> None:
            model.update({name: own.clone() for name, own in bench.shards.tensors.items()})

        monkeypatch.setattr(bench.shards, "publish", publish)
        for _ in range(24):
            bench.step()
            assert all(torch.equal(model[n], own) for n, own in bench.shards.tensors.items())

    run_ranks(2, main)


def test_what_went_ahead_of_an_exchange_that_fails_leaves_the_model_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies in bf16 kept what the own weights had taken back until the next step."""

    def main(transport: LoopbackTransport) -> None:
        bench = Bench(transport, config_of("every 4, used"), whole_s, rate_of)
        model: dict[str, torch.Tensor] = {}

        def publish() -> None:
            model.update({name: own.clone() for name, own in bench.shards.tensors.items()})

        def fail(_begun: Any) -> Any:
            raise TransportError("island 1 is gone")

        monkeypatch.setattr(bench.shards, "publish", publish)
        while bench.rounds._begun is None or not bench.rounds._begun.goes_ahead:
            bench.step()
        ahead = {name: weight.clone() for name, weight in model.items()}
        monkeypatch.setattr(bench.rounds, "_deliver", fail)
        with pytest.raises(TransportError, match="island 1 is gone"):
            bench.rounds.land()
        assert all(torch.equal(model[n], own) for n, own in bench.shards.tensors.items())
        assert any(not torch.equal(model[name], weight) for name, weight in ahead.items())
        assert bench.weights.notes == 1

    run_ranks(2, main)
