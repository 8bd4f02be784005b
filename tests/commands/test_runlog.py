"""A run as its log tells it, and what it decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_gradprune.commands.decided import decisions, why
from ds_gradprune.commands.report import rows_of
from ds_gradprune.commands.runlog import means, read_run, sums
from ds_gradprune.errors import DataError
from tests.helpers.fake_runs import BUSY, RAMP_END, SLOW, WARMUP, write_dense_run, write_run


def words(folder: Path, **story: object) -> dict[int, str]:
    """Step -> why, of a run's decisions."""
    run = read_run(write_run(folder, **story))  # type: ignore[arg-type]
    return {run.entries[number].step: why(run, number) for number in decisions(run)}


# --- reading --------------------------------------------------------------------------------------


def test_series(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "first"))
    assert (run.name, run.mode, len(run.entries)) == ("first", "update", 200)
    first, last = run.entries[0], run.entries[-1]
    assert (first.density, first.link_mbit, last.link_mbit) == (1.0, None, 2.0)
    assert last.seconds == pytest.approx(sum(entry.step_s for entry in run.entries))
    assert run.seconds_at(0) == 0.0
    assert run.seconds_at(200) == last.seconds
    assert run.validation[0][0] == 0


def test_times_are_per_step(tmp_path: Path) -> None:
    each = read_run(write_run(tmp_path / "each"))
    fifth = read_run(write_run(tmp_path / "fifth", every=5))
    assert {entry.interval for entry in fifth.entries} == {1, 5}
    assert fifth.entries[-1].step == each.entries[-1].step
    assert fifth.entries[-1].compute_s == each.entries[-1].compute_s
    assert fifth.entries[-1].codec_s == pytest.approx(each.entries[-1].codec_s / 5)


def test_names_of_losses(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "a")).loss_name == "own training loss"
    assert read_run(write_run(tmp_path / "b", prune="gradient")).loss_name == "training loss"
    assert read_run(write_dense_run(tmp_path / "c")).loss_name == "training loss"


def test_a_run_that_goes_on_has_its_validations(tmp_path: Path) -> None:
    """Points appeared when the run had ended."""
    folder = write_run(tmp_path / "first")
    (folder / "result.json").unlink()
    assert read_run(folder).validation == ()
    (folder / "validation.json").write_text('{"val_losses": [[0, 7.5], [50, 6.0]]}')
    assert read_run(folder).validation == ((0, 7.5), (50, 6.0))


def test_a_log_alone_will_do(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first")
    run = read_run(folder / "log.jsonl")
    assert (run.name, run.mode, run.validation) == ("log", None, ())


def test_rotated_files_come_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", steps=60)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl.1").write_text("".join(lines[:30]))
    (folder / "log.jsonl").write_text("".join(lines[30:]) + '{"step": 61, "lo')
    assert [entry.step for entry in read_run(folder).entries] == list(range(1, 61))


def test_runs_of_deepspeed_alone_are_not_divided(tmp_path: Path) -> None:
    run = read_run(write_dense_run(tmp_path / "dense", steps=10))
    total = sums(run)
    assert run.mode == "dense"
    assert total.whole_s == pytest.approx(5.5)
    assert total.compute_s == 0.0
    assert total.seconds == pytest.approx(5.5)


def test_unknown_numbers_are_left_out(tmp_path: Path) -> None:
    line = {"step": 1, "density": 0.1, "loss": None, "step_time_s": None, "decision": None}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "config.json").write_text("[1]")
    run = read_run(tmp_path)
    assert run.entries[0].compute_s is None
    assert sums(run).last_loss is None
    assert decisions(run) == [0]


def test_no_log_and_no_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'cannot be read: .*"log_path"'):
        read_run(tmp_path / "nowhere")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(DataError, match="must hold at least one step"):
        read_run(tmp_path)


def test_sums(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "first", every=5))
    total = sums(run)
    assert total.steps == 200
    parts = total.compute_s + total.codec_s + total.wire_s
    assert parts == pytest.approx(total.seconds)
    assert 0 < total.wire_bytes < total.dense_bytes
    assert total.last_loss == pytest.approx(2.2, abs=0.1)


def test_means() -> None:
    assert means([1.0, 3.0, 5.0], 2) == [2.0, 5.0]
    assert means([1.0, 3.0], 5) == [1.0, 3.0]


# --- decisions ------------------------------------------------------------------------------------


def test_rows_are_where_something_was_decided(tmp_path: Path) -> None:
    found = words(tmp_path / "first")
    assert list(found) == [1, WARMUP, RAMP_END, SLOW - 1, 109, BUSY - 1, 200]
    assert (found[WARMUP], found[RAMP_END]) == ("ramp begins", "ramp ends")


def test_the_end_of_dense_steps_in_a_warm_up_is_a_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line["decision"]["unpruned"] = 2 <= line["step"] < WARMUP
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    found = {run.entries[number].step: why(run, number) for number in decisions(run)}
    assert list(found)[:3] == [1, 2, WARMUP]
    assert (found[1], found[2]) == ("dense warm-up", "unpruned warm-up")
    # What is sent unpruned, in 4 bits and by islands, used to be called dense as well.
    assert [row[1] for row in rows_of(run)[0][:3]] == ["100.00 %"] * 3


def test_a_slow_link_is_named_and_busy_hosts_are_not_one(tmp_path: Path) -> None:
    found = words(tmp_path / "first")
    assert found[SLOW - 1] == "exchanges became slower: 2 Mbit/s"
    longer = "computation takes 2.3 times as long, and so do exchanges: the hosts are busy"
    assert found[BUSY - 1] == longer
    assert "Mbit/s" not in found[BUSY - 1]


def test_a_change_goes_the_way_of_the_rate(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", steps=60)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for step, mbit in ((45, 8.0), (50, 15.0)):
        lines[step - 1]["decision"] |= {"network_changed": True, "rate_bytes_per_s": mbit * 125e3}
        for line in lines[step - 3 : step]:
            line["signals"]["comm_time_s"] *= 10.0 / mbit
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    found = {run.entries[n].step: why(run, n) for n in decisions(run)}
    assert found[45] == "exchanges became slower: 8 Mbit/s"
    assert found[50] == "exchanges became faster: 15 Mbit/s"


def test_a_budget_is_named_only_where_one_was_given(tmp_path: Path) -> None:
    assert words(tmp_path / "without")[109] == "more can be sent"
    assert words(tmp_path / "with", budget_s=0.5)[109] == "room in the budget"
    for name, budget_s, text in (
        ("a", None, "a step takes longer than it pays: sends less"),
        ("b", 0.5, "over the budget of 0.5 s a step"),
    ):
        folder = write_run(tmp_path / name, budget_s=budget_s, steps=60)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        lines[49]["decision"] |= {"cause": "over_budget", "density": 0.01}
        lines[54]["decision"] |= {"cause": "over_budget", "network_changed": True, "density": 0.01}
        for line in lines[52:55]:
            line["signals"]["comm_time_s"] *= 2.0
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = read_run(folder)
        assert why(run, 49) == text
        changed = "exchanges became slower: 10 Mbit/s"
        assert why(run, 54) == (changed if budget_s is None else f"{text}, {changed}")


def test_a_change_by_less_than_noise_is_no_row(tmp_path: Path) -> None:
    """A quickstart's report had "exchanges became slower: 20.5 Mbit/s" after 20.9."""
    folder = write_run(tmp_path / "first", steps=60)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines[49]["decision"] |= {"network_changed": True, "rate_bytes_per_s": 9.8 * 125e3}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert 50 not in [run.entries[number].step for number in decisions(run)]


def test_computation_that_misses_a_budget_is_called_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", budget_s=0.5, steps=60)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines[49]["decision"] |= {"cause": "over_budget", "density": 0.01}
    for line in lines[47:50]:
        line["signals"]["compute_time_s"] *= 3.0
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    busy = "computation takes 3.0 times as long: the hosts are busy"
    assert why(read_run(folder), 49) == f"over the budget of 0.5 s a step, {busy}"


def test_an_interval_that_changes_is_a_decision(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", steps=60)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines[50:]:
        line["steps"] = 2
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert 51 in [run.entries[number].step for number in decisions(run)]
