"""The arithmetic of the race on made-up runs: curves, rows, break-even, pictures."""

from __future__ import annotations

import pytest

from labs.race import breakeven, command, page, plots
from labs.race.breakeven import Cost, break_even_mbit
from labs.race.campaign import Run
from labs.race.crew import Stretch, merge
from labs.race.figures import CONTRACT, first_below, hidden_fraction
from tests.helpers.race import NONE, dense_runs, figures, stretch, topk_runs


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
    assert dense.throughput_vs_unshaped == pytest.approx(0.05 / 1.0)
    assert found["dense_fp32", None].throughput_vs_unshaped == 1.0
    assert found["dense_fp32", None].hidden_fraction is None
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


@pytest.mark.parametrize(
    ("rate_mbit", "wire_bytes", "exposed_s", "hidden"),
    [
        (8.0, 1e6, 1.0, 0.0),  # a second on the wire, and the step waits all of it
        (8.0, 1e6, 0.25, 0.75),
        (8.0, 1e6, 3.0, 0.0),  # peers and software are waited for as well
        (8.0, 1e6, 0.0, 1.0),
        (None, 1e6, 1.0, None),
        (8.0, None, 1.0, None),
    ],
)
def test_hidden_is_what_the_wire_needs_and_no_step_waits_for(
    rate_mbit, wire_bytes, exposed_s, hidden
) -> None:
    assert hidden_fraction(rate_mbit, wire_bytes, exposed_s) == hidden


def test_a_step_of_several_ranks_per_host_is_told_by_hosts() -> None:
    def row(comm_s, payload_bytes):
        times = {"wall_s": 1.0, "compute_s": 0.5, "codec_s": 0.1, "comm_s": comm_s}
        more = {"step": 3, "loss": 2.0, "density": 0.05, "kind": "usual"}
        return times | more | {"payload_bytes": payload_bytes}

    rows = [row(0.0, 10), row(0.4, 20), row(0.3, 15), row(0.2, 25)]
    step = merge(rows, num_hosts=2)
    assert step.comm_s == 0.3  # the second host's slowest rank: the first host waited for it
    assert step.payload_bytes == 40
    assert merge([row(0.4, None), row(0.3, None)], num_hosts=2).payload_bytes is None


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
