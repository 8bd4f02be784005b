"""Runs of the Hugging Face Trainer on two ranks: starting them costs more than the training."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fork_ranks import ENGINES, run_forked

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")

TRAINERS = (*ENGINES, "accelerate", "transformers.trainer", "tests.helpers.trainer_main")
"""What the ranks' first process imports."""
SAVING = {"save_strategy": "steps", "save_steps": 4}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 4}
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the first checkpoint is the best one: it is not the last
}


def two_ranks(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[Any]]:
    """Name -> what both ranks returned, or the text of what went wrong there."""
    ranks = run_forked(
        2,
        "tests.helpers.trainer_main",
        "run_all",
        {"cases": cases},
        timeout_s=280,
        # DeepSpeed's own launcher does not set it, and accelerate then takes it for 1.
        env={"LOCAL_WORLD_SIZE": "2"},
        warm=TRAINERS,
    )
    return {name: [rank.get(name, "an earlier case failed") for rank in ranks] for name in cases}


def result(results: dict[str, list[Any]], name: str) -> list[Any]:
    """Both ranks' results of one case."""
    texts = [rank for rank in results[name] if isinstance(rank, str)]
    assert not texts, texts[0]
    return results[name]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Every way in, at ZeRO stage 0."""
    home = tmp_path_factory.mktemp("trainer")
    own = {f"{name}_own": str(home / f"{name}{{rank}}") for name in ("follow", "register", "node")}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "disks": (
            "train",
            {"folder": own["follow_own"], "block": {}, "save_total_limit": 1} | SAVING,
        ),
        "registered": (
            "registered_only",
            {"folder": own["register_own"], "save_total_limit": 1} | SAVING,
        ),
        "no_limit": ("train", {"folder": str(home / "n{rank}"), "block": {}} | SAVING),
        "each_node": ("each_node", {"folder": own["node_own"], "save_total_limit": 1} | SAVING),
        "nodes": ("each_node", {"folder": str(home / "nodes{rank}")} | SAVING),
        "nodes again": (
            "each_node",
            {"folder": str(home / "nodes{rank}"), "resume": "checkpoint-4"} | SAVING,
        ),
        "gradient": (
            "train",
            {"folder": str(home / "gradient"), "block": {"prune": "gradient"}}
            | {"save_total_limit": 1, "logging_steps": 2}
            | SAVING
            | EVALUATING
            | BEST,
        ),
        "best": (
            "train",
            {"folder": str(home / "best"), "block": {}, "save_total_limit": 2}
            | SAVING
            | EVALUATING
            | BEST,
        ),
        "alone": ("callback_alone", {"folder": str(home / "alone")}),
        "integration": ("follow_with_integration", {"folder": str(home / "integration")}),
        "by_hand": ("saved_by_hand", {"folder": str(home / "hand")}),
        "miscounted": ("accelerate_miscounts", {}),
        "accelerate": ("accelerate_loop", {"folder": str(home / "accelerate")}),
        "preference_0": ("preference", {"stage": 0}),
        "preference_3": ("preference", {"stage": 3}),
        "mistakes": ("mistakes", {"folder": str(home / "mistakes")}),
    }
    for mean in (True, False):
        cases[f"short_{mean}"] = (
            "train",
            {"folder": str(home / "short"), "block": {}, "num_rows": 12, "max_steps": 6}
            | {"gradient_accumulation_steps": 2, "average_tokens_across_devices": mean},
        )
    return two_ranks(cases)
