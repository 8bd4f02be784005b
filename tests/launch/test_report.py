"""What the quickstart prints of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import report

SCHEDULE = [{"step": 0, "rate_mbit": 20}, {"step": 60, "rate_mbit": 5}]


def entry(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "density": 1.0 if step <= 10 else 0.05,
        "cause": "warmup" if step <= 10 else "over_budget",
        "wire_bytes": 4_300_000,
        "comm_time_s": 1.72,
        "step_time_s": 1.9,
        "performance": None,
        "decision": {"rate_bytes_per_s": None if step <= 10 else 2.5e6},
    } | fields


LOG = [entry(step) for step in range(1, 101)]


def run_folder(folder: Path, log: list[dict[str, Any]]) -> Path:
    config = {"gradient_pruning": {"throttle": {"schedule": SCHEDULE}}}
    result = {key: 1 for key in report.RESULT_KEYS} | {"parameters": 7}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_table_shows_the_steps_around_each_change() -> None:
    log = [*LOG[:80], *(entry(step, density=0.02) for step in range(81, 101))]
    shown = [int(row[0]) for row in report.rows_of(log, SCHEDULE)]
    assert shown == [1, 10, 11, 59, 60, 80, 81, 100]


def test_a_ramp_is_shown_by_its_ends() -> None:
    ramp = [entry(step, density=0.5 - 0.01 * step, cause="ramp") for step in range(11, 31)]
    rows = report.rows_of([*LOG[:10], *ramp, *LOG[30:]], [])
    assert [int(row[0]) for row in rows] == [1, 10, 11, 30, 31, 100]


def test_row_says_which_link_it_had_and_which_was_measured() -> None:
    links = {int(row[0]): row[1:3] for row in report.rows_of(LOG, SCHEDULE)}
    assert (links[1], links[59], links[60]) == (["20", "-"], ["20", "20"], ["5", "20"])


def test_on_a_real_link_nothing_is_emulated() -> None:
    """The only link that was told was the emulated one: a real one had a dash."""
    heads, first, *_ = report.table(LOG[10:], []).splitlines()
    assert heads.split()[:3] == ["step", "link", "Mbit/s"]
    assert first.split()[:2] == ["11", "20"]


def test_warmup_is_shown_as_dense() -> None:
    rows = {int(row[0]): row for row in report.rows_of(LOG, SCHEDULE)}
    assert rows[10][3:] == ["dense", "4300", "1.720", "1.900", "-", "warmup"]
    assert rows[11][3] == "5.00 %"
    assert rows[11][-1] == "over budget"


def test_unknown_times_are_a_dash() -> None:
    (row,) = report.rows_of([entry(1, step_time_s=None)], [])
    assert row[1] == "-"
    assert row[6] == "-"


def test_columns_are_aligned() -> None:
    lines = report.table(LOG, SCHEDULE).splitlines()
    column = lines[0].index("because")
    assert {line[column - 1] for line in lines} == {" "}
    assert all(line[column] != " " for line in lines)


def test_last_line_is_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, LOG)
    reply = tmp_path / "reply.txt"
    reply.write_text("The for statement is used\n")
    assert report.main([str(folder), "--replies", str(reply), str(reply)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(document) == [*report.RESULT_KEYS, "replies"]
    assert document["replies"] == ["The for statement is used"] * 2


def test_run_without_pruning_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, [{"step": 1, "loss": 7.0, "step_time_s": 0.1}])
    assert report.main([str(folder)]) == 0
    assert "idle" in capsys.readouterr().out


def test_unfinished_run_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "must be a finished run of launch/train.py" in capsys.readouterr().err
