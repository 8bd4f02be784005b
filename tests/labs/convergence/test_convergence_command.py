"""The laboratory's command: grids, the store of finished runs, tables and the contract.

Longer than 300 lines: one command, from its grids to its page.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import ConfigError, DataError
from labs.convergence import command, plot
from labs.convergence.grid import Grid, read_grid
from labs.convergence.store import Store, keys_of, run_key
from labs.convergence.table import by_bits, cells, comparable, markdown_table, rows_of

ROOT = Path(__file__).resolve().parents[3]
GRIDS = sorted((ROOT / "labs" / "convergence" / "grids").glob("*.json"))
ON_CPUS = [path for path in GRIDS if not path.stem.startswith(("gpu", "short"))]
"""Their dense runs were made by the first laboratory, with 200 dense steps."""
TEXT_DIGEST = "86c4e6aa9db7c042"  # of the Shakespeare that all stored runs were made on
SMALL: dict[str, Any] = {
    "question": "Does it run?",
    "model": {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 8},
    "train": {"batch": 1, "warmup_steps": 2, "lr_warmup_steps": 1},
    "methods": [
        {"kind": "gradient", "name": "gradient", "value_bits": 16},
        {"kind": "update", "name": "update", "train": {"lr": 0.001}},
    ],
}
CONTRACT = {"method", "bits_per_param", "val_loss", "gap_pct", "gap_std", "gap_error", "seeds"}


def record(method: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    base = {"kind": "update", "train": {"lr": 1.0}, "bits_per_param": 0.5, "stopped_at": None}
    return (
        {"method": method, "seed": seed, "val_loss": loss, "val_loss_flushed": loss} | base | more
    )


def test_a_grid_gets_the_dense_runs_it_needs() -> None:
    grid = Grid.model_validate(SMALL)
    assert [m.name for m in grid.with_dense()] == ["dense", "dense lr=0.001", "gradient", "update"]
    more: dict[str, Any] = {"kind": "dense", "name": "baseline"}
    named = copy.deepcopy({**SMALL, "methods": [*SMALL["methods"], more]})
    named["methods"][0]["train"] = {"warmup_steps": 3}  # which a dense run does not have
    names = [m.name for m in Grid.model_validate(named).with_dense()]
    assert names == ["baseline", "dense lr=0.001", "gradient", "update"]
    more["accumulate"] = 2  # it has every hyper-parameter of a baseline, and is none
    grid = Grid.model_validate({**SMALL, "methods": [*SMALL["methods"], more]})
    names = [m.name for m in grid.with_dense()]
    assert names == ["dense", "dense lr=0.001", "gradient", "update", "baseline"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps: Extra inputs are not permitted, got 3"),
        ({"methods": [{"kind": "update", "name": "a", "density": 0}]}, r"density: .*, got 0"),
        ({"methods": [{"kind": "dense", "name": "a", "density": 1}]}, "density: Extra inputs"),
        ({"methods": [{"kind": "lossy", "name": "a"}]}, "kind"),
        ({"methods": [{"kind": "dense", "name": "a"}] * 2}, r"must be unique, got \['a'\] twice"),
        ({"methods": [{"kind": "dense", "name": "a", "train": {"lrate": 1}}]}, "lrate: Extra"),
        ({"methods": [{"kind": "update", "name": "a", "keep": 0.5}]}, "keep: Extra inputs"),
        (
            {"methods": [{"kind": "update", "name": "a", "residual_decay": 0.5}]},
            r"methods\[\].name 'a': .*residual_decay must be 0.95 where the residual is \"used\"",
        ),
    ],
)
def test_faulty_grids_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(ConfigError, match=message):
        read_grid(path)


def test_an_absent_grid_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.json must be a readable JSON file"):
        read_grid(tmp_path / "absent.json")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_load(path: Path) -> None:
    assert read_grid(path).with_dense()[0].kind == "dense"


def test_a_run_cut_short_is_made_anew_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    store = Store(path)
    store.add({"key": "a", "val_loss": 1.0})
    store.add({"key": "b", "val_loss": 2.0})
    path.write_text(path.read_text() + '{"key": "c", "val')
    again = Store(path)
    assert again.get("b") == {"key": "b", "val_loss": 2.0}
    assert again.get("c") is None
    again.add({"key": "c", "val_loss": 3.0})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    path.write_text("damage\n" + path.read_text())
    with pytest.raises(DataError, match="line 1, must be a finished run, but is damaged"):
        Store(path)


def test_a_runs_key_is_what_decides_its_outcome() -> None:
    assert run_key(seed=1, method={"a": 1}) == run_key(method={"a": 1}, seed=1)
    assert run_key(seed=1, method={"a": 1}) != run_key(seed=2, method={"a": 1})


def test_gaps_are_paired_by_seed_and_settings() -> None:
    runs = [
        record("dense", 0, 2.0, kind="dense"),
        record("dense", 1, 4.0, kind="dense"),
        record("slow", 0, 8.0, kind="dense", train={"lr": 0.5}),
        record("a", 0, 2.02),
        record("a", 1, 4.12, val_loss_flushed=4.0),
        record("b", 0, 7.6, train={"lr": 0.5}, stopped_at=30),
    ]
    dense, slow, a, b = rows_of(runs)
    assert dense["gap_pct"] == 0.0
    assert a["gap_pct"] == pytest.approx(2.0)  # 1 % and 3 %
    assert a["gap_std"] == pytest.approx(2.0**0.5)
    assert a["gap_flushed_pct"] == pytest.approx(0.5)
    assert a["gap_best_pct"] == pytest.approx(100 * (3.07 / 3.0 - 1))
    assert b["gap_pct"] == pytest.approx(-5.0)
    assert b["gap_std"] is None
    assert slow["gap_best_pct"] == pytest.approx(100 * (8 / 3 - 1))
    assert cells(b)[-1] == "1, ended at step 30"
    assert a["gap_error"] == pytest.approx(1.0)
    assert "| a | 0.5 | 3.0700 | +2.00 | 1.41 | 1.00 |" in markdown_table([dense, a])
    assert cells({**a, "first_lab": True})[1] == "0.5*"
    assert by_bits([a, dense])[0] is dense


def test_averaged_weights_are_compared_with_averaged_weights() -> None:
    runs = [
        record("dense", 0, 2.0, kind="dense", val_loss_averaged=1.9),
        record("a", 0, 2.2, val_loss_averaged=1.938),
        record("old", 0, 2.2),  # made before averages were measured
    ]
    _, a, old = rows_of(runs)
    assert a["gap_averaged_pct"] == pytest.approx(2.0)
    assert old["gap_averaged_pct"] is None
    assert (cells(a)[-2], cells(old)[-2]) == ("+2.00", "")


def test_the_frontier_leaves_out_what_is_beaten() -> None:
    def row(name: str, bits: float, gap: float, **more: Any) -> dict[str, Any]:
        base = {"kind": "update", "stopped_at": None}
        return {"method": name, "bits_per_param": bits, "gap_pct": gap} | base | more

    rows = [
        row("few", 0.1, 3.0),
        row("beaten", 0.2, 3.5),
        row("some", 0.5, 1.0),
        row("many", 2.0, 0.1),
        row("ended", 0.05, 0.0, stopped_at=4),
        row("dense", 48.0, 0.0, kind="dense"),
    ]
    assert [r["method"] for r in plot.frontier(rows)] == ["many", "some", "few"]


def test_runs_without_their_dense_run_wait() -> None:
    dense, early = record("dense", 0, 2.0, kind="dense"), record("a", 1, 2.0)
    assert comparable([dense, record("a", 0, 2.0), early]) == [dense, record("a", 0, 2.0)]
    assert comparable([early]) == []


@pytest.mark.parametrize("path", ON_CPUS, ids=lambda path: path.stem)
def test_stored_runs_stay_readable(path: Path) -> None:
    """Dense and peers keep their keys; runs of the first laboratory are found beside them."""
    stored = {
        line["key"]: line
        for line in map(json.loads, (ROOT / "results" / command.RUNS).read_text().splitlines())
    }
    grid = read_grid(path)
    first = set()
    for method in grid.with_dense():
        key, first_key = keys_of(grid, method, steps=3000, workers=4, seed=0, text=TEXT_DIGEST)
        if method.label in ("dense", "onebit_adam", "powersgd"):
            assert stored[key]["kind"] == method.label
        elif first_key in stored:
            assert stored[first_key]["kind"] == method.label
            assert key != first_key
            first.add(method.name)
    if path.stem == "frontier":
        assert {"update 1 %", "update 10 %", "update 1 %, slow", "gradient 10 %"} <= first


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Grid, text and --out."""
    grid, text = tmp_path / "grid.json", tmp_path / "text"
    grid.write_text(json.dumps(SMALL))
    text.write_bytes(bytes(i * i % 61 for i in range(3000)))
    return grid, text, tmp_path / "out" / "result.json"


def call(monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path, Path], *more: str) -> int:
    grid, text, out = files
    words = ["--grid", str(grid), "--text", str(text), "--out", str(out), "--workers", "2", *more]
    monkeypatch.setattr(sys, "argv", ["convergence", *words])
    return command.main("what")


def test_a_grid_is_made_once_and_widened(
    monkeypatch: pytest.MonkeyPatch, files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out: Path = files[2]
    assert call(monkeypatch, files, "--steps", "8") == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    runs = out.with_name(command.RUNS).read_text().splitlines()
    assert len(runs) == 4
    assert [row["method"] for row in first["rows"]] == [
        "dense",
        "dense lr=0.001",
        "gradient",
        "update",
    ]
    assert set(first["rows"][0]) >= CONTRACT
    assert first["rows"][0]["bits_per_param"] == 32.0  # a ring of two: 2 * 1/2 * 32
    assert out.with_suffix(".png").stat().st_size > 0
    page = out.with_suffix(".md")
    assert "# Does it run?" in page.read_text()
    page.write_text(page.read_text() + "Kept.\n")

    assert call(monkeypatch, files, "--steps", "8", "--seeds", "2") == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out.with_name(command.RUNS).read_text().splitlines()[:4] == runs
    assert len(out.with_name(command.RUNS).read_text().splitlines()) == 8
    assert [row["seeds"] for row in second["rows"]] == [2, 2, 2, 2]
    assert page.read_text().endswith("## Remarks\nKept.\n")


def test_a_stopped_grid_has_a_page(monkeypatch: pytest.MonkeyPatch, files: Any) -> None:
    made = command.run_trial

    def stop_at_third(setting: Any, method: Any, text: Any) -> Any:
        if method.kind == "gradient":
            raise KeyboardInterrupt
        return made(setting, method, text)

    monkeypatch.setattr(command, "run_trial", stop_at_third)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        call(monkeypatch, files, "--steps", "8", "--no-plot")
    page: str = files[2].with_suffix(".md").read_text()
    assert "Not finished: 2 runs are missing." in page
    assert "| dense lr=0.001 |" in page
    monkeypatch.setattr(command, "run_trial", made)
    assert call(monkeypatch, files, "--steps", "8", "--no-plot") == 0
    assert "Not finished" not in files[2].with_suffix(".md").read_text()


def test_equal_runs_give_equal_figures(monkeypatch: pytest.MonkeyPatch, files: Any) -> None:
    losses = []
    for _ in range(2):
        assert call(monkeypatch, files, "--steps", "8", "--no-plot") == 0
        store: Path = files[2].with_name(command.RUNS)
        losses.append([json.loads(line)["val_loss"] for line in store.read_text().splitlines()])
        store.unlink()
    assert losses[0] == losses[1]


def test_wrong_flags_are_one_message(
    monkeypatch: pytest.MonkeyPatch, files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, files, "--steps", "2", "--seeds", "0") == 2
    told = capsys.readouterr().err
    assert "--steps must be at least 8, got 2" in told
    assert "--seeds must be at least 1, got 0" in told


def test_a_process_of_its_own_gives_the_same_figures(
    monkeypatch: pytest.MonkeyPatch, files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, store = [], files[2].with_name(command.RUNS)
    for jobs in ("1", "2"):
        assert call(monkeypatch, files, "--steps", "8", "--no-plot", "--jobs", jobs) == 0
        rows.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])
        runs = store.read_text().splitlines(keepends=True)
        store.write_text("".join(runs[:3]))  # islands are to be made anew
    assert rows[0] == rows[1]


def test_a_run_of_the_first_laboratory_is_marked(
    monkeypatch: pytest.MonkeyPatch, files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, files, "--steps", "8", "--no-plot") == 0
    grid, out = read_grid(files[0]), files[2]
    store = out.with_name(command.RUNS)
    runs = [json.loads(line) for line in store.read_text().splitlines()]
    digest = json.loads(out.read_text())["text"]["digest"]
    for run in runs:
        method = next(m for m in grid.with_dense() if m.name == run["method"])
        _, first_key = keys_of(grid, method, steps=8, workers=2, seed=0, text=digest)
        run["key"] = first_key or run["key"]
    store.write_text("".join(json.dumps(run) + "\n" for run in runs))
    capsys.readouterr()
    assert call(monkeypatch, files, "--steps", "8", "--no-plot") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["first_lab"] for row in rows] == [False, False, True, True]
    assert len(store.read_text().splitlines()) == 4  # nothing was made anew
    assert "*: made when the laboratory still simulated" in out.with_suffix(".md").read_text()


def test_words_of_the_first_laboratory() -> None:
    def keys(**fields: Any) -> tuple[str, str | None]:
        method = {"kind": "update", "name": "a", **fields}
        grid = Grid.model_validate({**SMALL, "methods": [method]})
        return keys_of(grid, grid.methods[0], steps=9, workers=2, seed=0, text="t")

    assert keys(sync_every=5)[1] is None  # reset, which it did not know
    assert keys(residual="reset")[1] is None
    assert keys(residual="used", sync_every=4, slow_momentum=1.0)[1] is None  # another memory
    assert keys(residual="used")[1] == keys()[1] != keys(local_lr=0.5)[1]
    assert len({keys(**f)[0] for f in ({}, {"residual": "reset"}, {"update_scale": 2.0})}) == 3


def test_hidden_runs_of_before_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**fields: Any) -> str:
        method = {"kind": "update", "name": "a", **fields}
        grid = Grid.model_validate({**SMALL, "methods": [method]})
        return keys_of(grid, grid.methods[0], steps=9, workers=2, seed=0, text="t")[0]

    blocks: list[dict[str, Any]] = [
        {"overlap": "auto"},
        {"overlap": "auto", "sync_every": 8, "residual": "used"},
        {"overlap": "auto", "sync_every": 8},
        {},
    ]
    now = [key(**block) for block in blocks]
    monkeypatch.setattr("labs.convergence.store._goes_ahead", lambda _: False)
    same = [before == after for before, after in zip(now, (key(**b) for b in blocks), strict=True)]
    assert same == [False, False, True, True]
