"""Bugs that were found, each told as the story of who met it. Two ranks on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.config import BLOCK
from ds_gradprune.config.model import GradientPruningConfig
from tests.helpers.fork_ranks import run_forked
from tests.helpers.ranks import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
MODES = ["gradient", "update"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its results on both ranks."""
    folder = tmp_path_factory.mktemp("regressions")
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "clamp-documented": ("clamp", {"how": "documented"}),
        "longer": ("longer_warmup", {"folder": str(folder / "longer"), "verify": 2}),
        "longer-unverified": ("longer_warmup", {"folder": str(folder / "blind"), "verify": None}),
        "stale": ("stale_state", {"folder": str(folder / "stale")}),
        "reference": ("reference_model", {}),
        "strided": ("strided", {}),
    }
    for mode in MODES:
        for name in ("rollback", "set_alike", "swapped_layers", "two_backwards"):
            cases[f"{name}-{mode}"] = (name, {"prune": mode})
    cases["clamp-bare"] = ("clamp", {"how": "bare"})  # last: it ends in an error
    ranks = run_forked(2, "tests.helpers.regression_cases", "run", {"cases": cases}, timeout_s=250)

    def of(name: str) -> list[Any]:
        for rank, done in enumerate(ranks):
            assert name in done, f"an earlier case failed on rank {rank}: {list(done.values())[-1]}"
            assert not isinstance(done[name], str) or "Traceback" not in done[name], done[name]
        return [done[name] for done in ranks]

    return of


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_loaded_back_hold(two: Any, mode: str) -> None:
    """Rolled back to the best weights, islands went on from those they had before."""
    for answers in two(f"rollback-{mode}"):
        kept, late, back, after, again = answers["losses"]
        assert late < kept - 0.3
        assert back == kept
        assert again == kept
        assert abs(after - kept) < 0.3 * (kept - late)
        assert len(set(answers["crcs"])) == 1


@pytest.mark.parametrize("mode", MODES)
def test_what_all_ranks_set_alike_holds_in_own_and_shared_weights(two: Any, mode: str) -> None:
    """A bias set to 3 was 0 in evaluation and 4.2 four steps later."""
    for answers in two(f"set_alike-{mode}"):
        assert answers["seen"]
        assert answers["moved"] < 0.1  # 4 steps of AdamW at 2e-3, scaled by root 2
        assert len(set(answers["crcs"])) == 1


def test_a_clamp_has_a_documented_way(two: Any) -> None:
    """Evaluation saw 0.106 where 0.1 was the limit."""
    for answers in two("clamp-documented"):
        assert answers["told"] == "accepted"
        assert answers["most"] <= 0.05 + 1e-9  # 0.05 as fp32


def test_weights_written_differently_on_the_islands_are_never_undone_in_silence(two: Any) -> None:
    for answers in two("clamp-bare"):
        assert answers["told"].startswith("RankMismatchError: weights were written outside")
        assert "up.weight" in answers["told"]
        assert "weight_sets()" in answers["told"]


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_is_known_by_itself_not_by_its_place(two: Any, mode: str) -> None:
    """A layer was frozen and another of its shape thawed: the debt of one moved the other."""
    assert two(f"swapped_layers-{mode}") == [{"b": 0.0, "a": 0.0}] * 2


@pytest.mark.parametrize("name", ["longer", "longer-unverified"])
def test_parted_islands_stay_islands_whatever_the_warm_up_says(two: Any, name: str) -> None:
    """Resumed with a longer warm-up, islands averaged gradients on different weights."""
    for answers in two(name):
        assert len(set(answers["losses"])) == 1
        assert len(set(answers["crcs"])) == 1


def test_a_dense_runs_checkpoint_leaves_nothing_of_the_run_before(two: Any) -> None:
    assert two("stale") == [{"owed": True, "owes": 0.0, "step": 0}] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_two_backwards_reports_the_sum_of_its_losses(two: Any, mode: str) -> None:
    """Only the last backward's loss was told, and bytes of one exchange against two."""
    for rows in two(f"two_backwards-{mode}"):
        for wanted, loss, _, _ in rows:
            assert loss == pytest.approx(wanted, rel=1e-6)
        _, _, wire_bytes, dense_bytes = rows[0]  # a dense step of two reductions
        assert wire_bytes == pytest.approx(dense_bytes, rel=0.01)


def test_an_engine_without_an_optimizer_is_left_alone(two: Any) -> None:
    """A preference trainer could not make its reference model after register()."""
    assert two("reference") == [[False, True]] * 2


def test_strided_weights_are_refused_by_name_at_attach(two: Any) -> None:
    """They passed attach and failed at the end of the warm-up, with a bare torch error."""
    for told in two("strided"):
        assert told.startswith("UnsupportedError")
        assert "up.weight" in told


def test_every_key_of_the_block_is_read_by_somebody() -> None:
    """`exchange` and `two_level` were accepted, and did nothing."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "ds_gradprune").rglob("*.py"))
        if path.parent.name != "config" or path.name == "model.py"
    ]
    model = Path(ROOT / "ds_gradprune/config/model.py").read_text(encoding="utf-8")
    for key in GradientPruningConfig.model_fields:
        used = sum(source.count(f"config.{key}") for source in sources)
        assert used or f"self.{key}" in model, f"{BLOCK}.{key} is read by nobody"
