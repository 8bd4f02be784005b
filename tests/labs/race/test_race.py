"""The Ethernet benchmark: its arithmetic on made-up runs, and small real runs of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_gradprune.errors import ConfigError
from labs.race import breakeven, campaign, command, page, plots
from labs.race.breakeven import Cost, break_even_mbit
from labs.race.campaign import Run
from labs.race.crew import Step, Stretch
from labs.race.engines import ds_config
from labs.race.figures import CONTRACT, Figures, first_below
from labs.race.job import Job, Recipe
from labs.race.methods import DEFAULT, parse_method, parse_methods
from labs.race.record import Record
from tools.netbed import requirements

ROOT = Path(__file__).resolve().parents[3]

RECIPE = Recipe("nano", 4, 2e-3, 0.99, 0.1, 1.0, 4, 10, 100, 0, None, None)

# ---- made-up runs: a dense step takes 1 s, a pruned one 0.1 s; unshaped all take 0.05 s --------


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


def test_combined_curve_takes_losses_from_one_run_and_times_from_the_other() -> None:
    curve = figures(dense_runs(), topk_runs()).curve("topk_0.05", "20mbit", 0)
    # two dense steps of 1 s, then 0.1 s each
    assert [time_s for time_s, _ in curve] == pytest.approx([0.0, 2.3, 2.8, 3.3])
    assert [loss for _, loss in curve] == [6.0, 4.5, 3.5, 2.5]


def test_measured_curve_adds_up_the_steps_of_its_own_run() -> None:
    warm = stretch(1, 2, 1.0, [(0, 6.0)], kind="dense")
    ours = Run("ours", "20mbit", 0, 7, warm, stretch(3, 8, 0.25, [(5, 5.0), (10, 4.0)]))
    curve = figures(dense_runs(), [ours]).curve("ours", "20mbit", 0)
    assert curve == [(0.0, 6.0), (pytest.approx(2.75), 5.0), (pytest.approx(4.0), 4.0)]


def test_time_to_dense_loss_lies_between_two_validations() -> None:
    made = figures(dense_runs(), topk_runs())
    # 3.0 lies halfway between 3.5 at 2.8 s and 2.5 at 3.3 s
    assert made.time_to_dense_loss_s("topk_0.05", "20mbit") == pytest.approx(3.05)
    assert made.time_to_dense_loss_s("dense_fp32", "20mbit") == pytest.approx(10.0)


def test_most_rounds_decide_whether_dense_loss_is_reached() -> None:
    never = ((5, 4.5), (10, 3.5), (15, 3.4))
    rounds = [[*dense_runs(n), *topk_runs(n, never)] for n in (1, 2)]
    assert figures(dense_runs(), topk_runs(), *rounds).time_to_dense_loss_s(
        "topk_0.05", "20mbit"
    ) is (None)
    one = [*dense_runs(1), *topk_runs(1, never)]
    two = [*dense_runs(2), *topk_runs(2)]
    made = figures(dense_runs(), topk_runs(), one, two)
    assert made.time_to_dense_loss_s("topk_0.05", "20mbit") == pytest.approx(3.05)


def test_first_below_a_loss_that_the_curve_starts_with_is_its_start() -> None:
    assert first_below([(0.0, 2.0), (1.0, 1.0)], 2.5) == 0.0
    assert first_below([(0.0, 2.0), (1.0, 1.0)], 0.5) is None


def test_rows_carry_medians_over_rounds_and_mark_combined_ones() -> None:
    rows = figures(dense_runs(), topk_runs(), dense_runs(1, 3.2), topk_runs(1)).rows()
    found = {(row.method, row.rate_mbit): row for row in rows}
    assert len(rows) == 4
    dense = found["dense_fp32", 20.0]
    assert (dense.val_loss, dense.val_loss_spread) == pytest.approx((3.1, 0.2))
    assert (dense.step_time_s, dense.tokens_per_s, dense.wire_bytes) == (1.0, 64.0, 1000.0)
    assert dense.is_combined
    assert not found["dense_fp32", None].is_combined
    assert found["topk_0.05", 20.0].wire_bytes == 100.0
    assert tuple(dense.contract()) == CONTRACT
    assert "20 Mbit/s*" in page.text_table(rows)
    assert page.markdown_table(rows).count("\n") == 5


def test_a_method_with_silent_steps_is_told_by_its_mix_of_steps() -> None:
    silent = [stretch(n, 1, 0.05, kind="silent").steps[0] for n in (5, 7, 9)]
    usual = [stretch(n, 1, 0.06).steps[0] for n in (3, 4, 6, 8, 10)]
    losses = [(5, 4.0), (10, 3.5)]
    rest = Stretch(sorted(silent + usual, key=lambda step: step.step), losses, 60.0)
    opening = stretch(1, 2, 0.05, [(0, 6.0)], kind="dense")
    timed = [*stretch(11, 7, 0.05, kind="silent").steps, *stretch(18, 1, 0.4).steps]
    made = figures(
        dense_runs(),
        [
            Run("zeroone_adam", None, 0, 7, opening, rest),
            Run("zeroone_adam", "20mbit", 0, 7, NONE, Stretch(timed, [], 12.0)),
        ],
    )
    (row,) = (row for row in made.rows() if (row.method, row.rate_mbit) == ("zeroone_adam", 20.0))
    # Of eight steps three are silent: not the seven of eight of the short stretch.
    assert row.step_time_s == pytest.approx((3 * 0.05 + 5 * 0.4) / 8)
    assert row.wire_bytes == 60.0
    # Two dense steps of 1 s; then two exchanges and a silent step; then three and two.
    curve = made.curve("zeroone_adam", "20mbit", 0)
    assert [time_s for time_s, _ in curve] == pytest.approx([0.0, 2.85, 4.15])
    assert row.is_simulated
    assert "| zeroone_adam (simulated) | 20 Mbit/s* |" in page.markdown_table(made.rows())
    assert "zeroone_adam (simulated)  20 Mbit/s*" in page.text_table(made.rows())


# ---- break-even --------------------------------------------------------------------------------


def test_break_even_is_where_the_wire_saves_what_the_codec_costs() -> None:
    # Dense: 0.1 s + 8 Mbit / r. Pruned: 0.12 s + 0.008 s, as long as its wire time is below 8 ms.
    # Equal where 8 / r = 0.028 s, so at 285.7 Mbit/s; there the pruned 0.08 Mbit take 0.3 ms.
    dense, pruned = Cost(0.1, 0.004, 1e6), Cost(0.12, 0.008, 1e4)
    assert break_even_mbit(dense, pruned) == pytest.approx(8 / 0.028, rel=1e-4)
    assert dense.step_time_s(100.0) == pytest.approx(0.18)
    assert dense.step_time_s(None) == pytest.approx(0.104)


@pytest.mark.parametrize(
    "pruned",
    [
        pytest.param(Cost(0.05, 0.001, 1e4), id="wins_at_every_rate"),
        pytest.param(Cost(0.12, 0.001, 2e6), id="sends_more_than_dense"),
    ],
)
def test_no_break_even_where_the_winner_never_changes(pruned) -> None:
    assert break_even_mbit(Cost(0.1, 0.004, 1e6), pruned) is None


def test_check_sets_predictions_beside_what_was_measured() -> None:
    rows = figures(dense_runs(), topk_runs()).rows()
    (one,) = breakeven.check(rows, "dense_fp32", "topk_0.05")
    assert one["rate_mbit"] == 20.0
    assert one["speedup_measured"] == pytest.approx(10.0)
    # 0.05 s local and 8000 bit over 20 Mbit/s
    assert one["dense_predicted_s"] == pytest.approx(0.0504)
    lines = page.break_even_lines("topk_0.05", 12.0, [one])
    assert "below 12 Mbit/s" in lines[0]
    assert "10.00 measured: wins as predicted" in lines[1]


def test_summary_without_dense_or_topk_has_no_break_even() -> None:
    summary = command.summarize(figures(dense_runs()).rows())
    assert (summary["break_even_method"], summary["break_even_mbit"]) == (None, None)
    assert "not computed" in page.break_even_lines(None, None, [])[0]


# ---- methods and flags -------------------------------------------------------------------------


def test_methods_are_read_from_their_names() -> None:
    names = (
        "dense_fp32,dense_bf16,ddp_fp32,fp16_hook,bf16_hook,powersgd_4,topk_0.01,onebit_adam,"
        "zeroone_adam,islands_0.02,ours,ours_update"
    )
    methods = {method.name: method for method in parse_methods(names)}
    assert methods["powersgd_4"].rank == 4
    assert methods["topk_0.01"].density == 0.01
    assert methods["ours"].adaptive
    assert {name for name, one in methods.items() if one.begins_dense} == {
        "powersgd_4",
        "topk_0.01",
        "onebit_adam",
        "zeroone_adam",
        "islands_0.02",
        "ours",
        "ours_update",
    }
    assert (methods["islands_0.02"].density, methods["islands_0.02"].adaptive) == (0.02, False)
    assert {name for name, one in methods.items() if one.prune == "update"} == {
        "islands_0.02",
        "ours_update",
    }
    assert methods["zeroone_adam"].interval == 1
    assert parse_method("zeroone_adam_4").interval == 4
    assert methods["onebit_adam"].label == "onebit_adam (simulated)"
    assert methods["ours"].label == "ours"


def test_every_default_method_is_known() -> None:
    assert [method.name for method in parse_methods(plan_defaults())] == list(DEFAULT)
    assert {"onebit_adam", "zeroone_adam", "powersgd_16", "fp16_hook"} < set(DEFAULT)


@pytest.mark.parametrize(
    "name",
    [
        *("dense", "topk_0", "topk_1.5", "islands_1", "powersgd_1.5", "powersgd_0"),
        *("zeroone_adam_0", "onebit_adam_2", ""),
    ],
)
def test_unknown_methods_are_refused_with_the_known_ones(name) -> None:
    with pytest.raises(ConfigError, match=r"--methods must name some of dense_fp32, .* got"):
        parse_method(name)


def test_a_method_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="each method once"):
        parse_methods("ours,ours")


def test_a_static_density_leaves_the_controller_no_room() -> None:
    block = ds_config(parse_method("topk_0.01"), RECIPE)["gradient_pruning"]
    assert block["density"] == {"initial": 0.01, "min": 0.01, "max": 0.01}
    assert block["warmup_steps"] == 10
    islands = ds_config(parse_method("islands_0.01"), RECIPE)["gradient_pruning"]
    assert islands == block | {"prune": "update"}
    assert ds_config(parse_method("dense_bf16"), RECIPE)["communication_data_type"] == "bf16"
    assert ds_config(parse_method("dense_fp32"), RECIPE)["gradient_pruning"] == {"enabled": False}


def test_a_job_survives_its_command_line() -> None:
    job = Job("ours", RECIPE, "data", "store", 3, 1, 2)
    assert Job.from_json(job.to_json()) == job


def plan_defaults() -> str:
    return command.parser().parse_args([]).methods


def plan(*words):
    return command.make_plan(command.parser().parse_args(words))


def test_unshaped_is_always_measured_and_only_it_without_a_bed() -> None:
    assert list(plan("--rates", "20mbit,none,1gbit").rates) == ["20mbit", "1gbit", None]
    assert list(plan("--bed", "none").rates) == [None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hosts", "1"], "--hosts must be at least 2, got 1"),
        (["--zero-stage", "1"], "--zero-stage must be 0 unless"),
        (["--zero-stage", "1", "--methods", "onebit_adam"], "--zero-stage must be 0 unless"),
        (["--eval-sequences", "0"], "--eval-sequences must be at least 1, got 0"),
        (["--steps", "100", "--eval-every", "30"], "multiple of --eval-every"),
        (["--steps", "10", "--dense-steps", "9"], "--dense-steps must be 2 to 8, got 9"),
        (["--extend", "0.5"], "--extend must be at least 1"),
        (["--rates", "fast"], "rate must be none, or a number"),
        (["--methods", "magic"], "--methods must name"),
    ],
)
def test_wrong_flags_are_told_before_anything_starts(words, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*words)


def test_schedules_of_the_simulated_peers_are_told() -> None:
    lines = command.schedules(plan("--steps", "300", "--methods", "ours,onebit_adam,zeroone_adam"))
    assert lines[0] == "- onebit_adam: dense for 45 steps"
    assert "frozen after step 30" in lines[1]
    assert command.schedules(plan("--steps", "300", "--methods", "ours")) == []


def test_without_root_one_sentence_and_exit_code_2(monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert command.main(["--steps", "10"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: The test bed needs root")


# ---- interruptions ------------------------------------------------------------------------------


def test_a_record_gives_back_what_was_measured(tmp_path) -> None:
    asked, out = plan("--steps", "10"), tmp_path / "runs" / "out.json"
    record = Record(out, asked, resume=False)
    record.add(dense_runs())
    record.add(topk_runs())
    part = tmp_path / "runs" / "out.part.jsonl"
    with part.open("a") as file:
        file.write('[{"method": "ou')  # killed while writing
    again = Record(out, asked, resume=True)
    assert again.visits == [dense_runs(), topk_runs()]
    again.add(dense_runs(1))
    assert Record(out, asked, resume=True).visits == [dense_runs(), topk_runs(), dense_runs(1)]
    again.finish()
    assert not part.exists()


def test_a_record_is_not_overwritten_and_not_mixed(tmp_path) -> None:
    out = tmp_path / "out.json"
    Record(out, plan("--steps", "10"), resume=False)
    with pytest.raises(ConfigError, match="holds an unfinished campaign"):
        Record(out, plan("--steps", "10"), resume=False)
    with pytest.raises(ConfigError, match="--resume must be given the flags that"):
        Record(out, plan("--steps", "20"), resume=True)


def test_a_resumed_campaign_makes_only_what_is_missing(tmp_path, monkeypatch) -> None:
    made = []

    @contextlib.contextmanager
    def note_the_start(place, method, recipe, data, seed):
        made.append((method, seed))
        yield SimpleNamespace(
            set_rate=lambda rate: None,
            num_parameters=7,
            train=lambda steps, eval_every=None: stretch(1, steps, 0.1, [(0, 1.0)]),
        )

    monkeypatch.setattr(campaign, "crew", note_the_start)
    asked = plan("--steps", "10", "--methods", "dense_fp32,ours", "--repeats", "2")
    visits = list(campaign.execute(asked, None, tmp_path, lambda line: None))
    # ours runs at three rates and unshaped; the second round begins with the other method
    assert made == [("dense_fp32", 0), *[("ours", 0)] * 4, *[("ours", 1)] * 4, ("dense_fp32", 1)]
    made.clear()
    rest = list(campaign.execute(asked, None, tmp_path, lambda line: None, visits[:-2]))
    assert made == [("ours", 1), ("dense_fp32", 1)]
    assert rest == visits[-2:]


# ---- pictures ----------------------------------------------------------------------------------


def test_a_picture_per_question(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    ours = [
        Run("ours", rate, 0, 7, stretch(1, 2, 1.0, [(0, 6.0)]), stretch(3, 8, 0.2, [(10, 3.0)]))
        for rate in ("20mbit", None)
    ]
    made = figures(dense_runs(), topk_runs(), ours)
    paths = plots.write_all(made, made.rows(), tmp_path / "out")
    assert [path.name for path in paths] == ["out_loss.png", "out_rate.png", "out_density.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


# ---- small real runs ---------------------------------------------------------------------------


def ethernet(out: Path, *words: str) -> tuple[dict, dict]:
    """The last line of a run, and its file."""
    sizes = ["--steps", "4", "--timing-steps", "3", "--repeats", "1", "--batch", "2"]
    text = ["--text", str(ROOT / "README.md"), "--out", str(out), "--no-plots"]
    done = subprocess.run(
        [sys.executable, "benchmarks/ethernet.py", *sizes, *text, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "peers",
    [
        pytest.param(["dense_fp32", "dense_bf16", "topk_0.05", "ours"], id="deepspeed"),
        pytest.param(["dense_fp32", "islands_0.05", "ours_update"], id="islands"),
        pytest.param(["dense_fp32", "ddp_fp32", "fp16_hook", "bf16_hook", "powersgd_1"], id="ddp"),
        pytest.param(["dense_fp32", "onebit_adam", "zeroone_adam_4"], id="simulated"),
    ],
)
def test_peers_train_alike_on_loopback(tmp_path, peers) -> None:
    out = tmp_path / "a.json"
    words = ["--extend", "1", "--eval-sequences", "6", "--methods", ",".join(peers)]
    last, full = ethernet(out, "--bed", "none", *words)
    assert last["break_even_mbit"] is None
    rows = {row["method"]: row for row in last["results"]}
    assert list(rows) == peers
    for row in rows.values():
        assert tuple(row) == CONTRACT
        assert (row["rate_mbit"], row["wire_bytes"], row["hosts"]) == (None, None, 2)
        assert row["step_time_s"] > 0
    # Same weights, same tokens: the loss before the first step is the same to the last bit.
    assert len({tuple(run["validations"][0]) for run in full["runs"]}) == 1
    # One step that is dense everywhere later, what bf16 rounds off a gradient, 2^-9, is left of the
    # change that the step made, and 1e-4 for sums in another order.
    first, *_ = (run["loss"] for run in full["runs"] if run["method"] == "dense_fp32")
    for run in full["runs"]:
        assert run["loss"][0] == pytest.approx(first[0], rel=1e-5)
        assert run["loss"][1] == pytest.approx(first[1], abs=abs(first[0] - first[1]) / 2**9 + 1e-4)
    assert out.with_suffix(".md").read_text().startswith("# Ethernet: 2 hosts, nano")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.netns
@pytest.mark.timeout(300)
@pytest.mark.skipif(requirements.missing() is not None, reason=requirements.missing() or "")
def test_bytes_at_the_interface_agree_with_our_own_count(tmp_path) -> None:
    names = ["topk_0.05", "onebit_adam", "zeroone_adam_4"]
    last, full = ethernet(
        tmp_path / "b.json", "--rates", "20mbit", "--methods", ",".join(["dense_fp32", *names])
    )
    rows = {(row["method"], row["rate_mbit"]): row for row in full["results"]}
    assert len(last["results"]) == 8
    for name, rate in itertools.product(names, (20.0, None)):
        pruned = rows[name, rate]
        # 66 bytes of headers on 1448 of payload, as much again at most for acknowledgements of what
        # is received, and 5 % for everything else.
        overhead = 1.05 + 2 * 66 / 1448
        assert 1.0 <= pruned["wire_bytes"] / pruned["payload_bytes"] <= overhead
        # a fifth of what dense sends is far more than 5 % of the values with their places
        assert pruned["wire_bytes"] < 0.2 * rows["dense_fp32", rate]["wire_bytes"]
    # A shaper lets nothing through early but its bucket, 64 KiB at each end of the link.
    # However busy the machine is, it cannot be faster than that.
    dense = rows["dense_fp32", 20.0]
    assert dense["exposed_comm_s"] > 8 * (dense["wire_bytes"] - 2 * 65536) / 20e6 * 0.9
    assert full["break_even_method"] == "topk_0.05"
    (checked,) = full["break_even_checks"]
    assert checked["dense_measured_s"] == dense["step_time_s"]
