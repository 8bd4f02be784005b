"""What is written down of a run, and that no full disk, cut line or odd number ends it.

Longer than 300 lines: the log, the screen and the monitors are fed by one fake run.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_gradprune.config import load_block
from ds_gradprune.deepspeed import monitor
from ds_gradprune.deepspeed.monitor import DecisionLog, StepLog, read_log
from ds_gradprune.deepspeed.validation import write_validation
from ds_gradprune.law.decision import Cause, Decision
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.verdict import Verdict
from ds_gradprune.train.report import StepReport


def report(step: int = 7, **changed: Any) -> StepReport:
    """An exchange of four steps that took 0.4 s each; `decision_*` changes the decision."""
    decision: dict[str, Any] = {
        "step": step + 4, "density": 0.05, "cause": Cause.HOLD, "reason": "as it was",
        "performance": 0.5, "budget_s": 0.5, "network_changed": False, "predicted_step_s": 0.4,
        "rate_bytes_per_s": 12.5e6,
    }  # fmt: skip
    fields: dict[str, Any] = {
        "step": step, "steps": 4, "loss": 3.25, "performance": 0.5, "density": 0.05,
        "cause": Cause.RAMP, "step_time_s": 1.6, "compute_time_s": 1.2, "codec_time_s": 0.1,
        "comm_time_s": 0.3, "hidden_time_s": 0.2, "wire_bytes": 2_500_000,
        "dense_bytes": 50_000_000, "nonfinite": False, "signals": signals(step), "senders": 2,
    }  # fmt: skip
    for name, value in changed.items():
        chosen = decision if name.startswith("decision_") else fields
        chosen[name.removeprefix("decision_")] = value
    return StepReport(**fields, decision=Decision(**decision))


def signals(step: int) -> StepSignals:
    values = dict.fromkeys((field.name for field in dataclasses.fields(StepSignals)), 0)
    return StepSignals(**values | {"step": step})


def steps_of(path: Path) -> list[int]:
    return [int(step["step"]) for step in read_log(str(path))]


@pytest.fixture
def make_log() -> Iterator[Callable[..., StepLog]]:
    """Makes logs, and closes them."""
    made: list[StepLog] = []

    def make(*args: Any, **options: Any) -> StepLog:
        made.append(StepLog(*args, **options))
        return made[-1]

    yield make
    for log in made:
        log.close()


# --- the log --------------------------------------------------------------------------------------


def test_every_step_is_a_line_of_json(tmp_path: Path, make_log: Callable[..., StepLog]) -> None:
    path = tmp_path / "new" / "log.jsonl"
    log = make_log(str(path))
    log.write(report(1))
    log.write(report(5, decision_cause=Cause.OVER_BUDGET))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["step"], first["cause"], first["decision"]["reason"]) == (1, "ramp", "as it was")
    assert second["decision"]["cause"] == "over_budget"
    assert first["signals"]["step"] == 1
    log.close()
    log.close()


def test_no_number_of_the_log_is_inf_or_nan(
    tmp_path: Path, make_log: Callable[..., StepLog]
) -> None:
    log = make_log(str(tmp_path / "log"))
    log.write(report(loss=float("nan"), wire_bytes=float("inf")))
    line = json.loads((tmp_path / "log").read_text(), parse_constant=lambda name: 1 / 0)
    assert line["loss"] is None
    assert line["wire_bytes"] is None


def test_parts_that_are_dicts_and_lists_are_written(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Later:
        step: int
        parts: dict[str, Any]

    later: Any = Later(3, {"codec": float("nan"), "wire": [1.0, Cause.HOLD]})
    assert monitor.as_json(later) == {"step": 3, "parts": {"codec": None, "wire": [1.0, "hold"]}}


def test_no_path_is_no_log(tmp_path: Path, make_log: Callable[..., StepLog]) -> None:
    log = make_log(None)
    log.write(report())
    log.rewind(3)
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file/log", ".", "x" * 300, "a\0b"])
def test_a_log_that_cannot_be_opened_is_warned_of_once(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, make_log: Callable[..., StepLog]
) -> None:
    (tmp_path / "file").write_text("")
    log = make_log(str(tmp_path / path))
    log.write(report())
    log.rewind(1)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "cannot be written (" in message
    assert "Training goes on." in message


class Full:
    """A file on a disk that is full."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_full_disk_ends_the_log_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_log: Callable[..., StepLog]
) -> None:
    log = make_log(str(tmp_path / "log"))
    log.write(report(1))
    whole = log._file
    log._file = Full(whole)  # type: ignore[assignment]
    for step in (2, 3, 4):
        log.write(report(step))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert steps_of(tmp_path / "log")[0] == 1


def test_a_log_that_is_removed_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_log: Callable[..., StepLog]
) -> None:
    """Its disk was unmounted: the steps that came later were written to nowhere."""
    path = tmp_path / "run" / "log"
    log = make_log(str(path))
    log.write(report(1))
    (tmp_path / "run").rename(tmp_path / "moved")
    for step in (2, 3):
        log.write(report(step))
    assert steps_of(path) == [2, 3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "was removed, or its disk was unmounted" in caplog.text


# --- rewinding ------------------------------------------------------------------------------------


def test_a_resumed_run_writes_the_steps_after_its_checkpoint_again(
    tmp_path: Path, make_log: Callable[..., StepLog]
) -> None:
    path = tmp_path / "log"
    log = make_log(str(path))
    for step in range(1, 7):
        log.write(report(step))
    log.rewind(3)
    log.write(report(4, loss=9.0))
    assert steps_of(path) == [1, 2, 3, 4]
    assert [step["loss"] for step in read_log(str(path))][-1] == 9.0


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe not UTF-8\n", b'{"step": 2, "lo\n', b"[1]\n", b'{"step": "2"}\n', b"\n",
        b'{"other": 1}\n', b"[" * 100_000 + b"\n",
    ],
)  # fmt: skip
def test_lines_that_are_cut_or_foreign_are_dropped(
    line: bytes, tmp_path: Path, make_log: Callable[..., StepLog]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\r\n' + line + b'{"step": 2}')
    log = make_log(str(path))
    log.rewind(2)
    log.write(report(3))
    assert steps_of(path) == [1, 2, 3]
    assert path.read_bytes().startswith(b'{"step": 1}\n{"step": 2}\n{"step": 3,')
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


# --- rotation -------------------------------------------------------------------------------------


def test_a_log_is_bounded_and_the_oldest_steps_go_first(
    tmp_path: Path, make_log: Callable[..., StepLog]
) -> None:
    path = tmp_path / "log"
    length = len(json.dumps(monitor.as_json(report(10)))) + 1
    log = make_log(str(path), max_bytes=3 * length + 10, keep=2)
    for step in range(10, 24):
        log.write(report(step))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(file.stat().st_size <= 3 * length + 10 for file in tmp_path.iterdir())
    assert steps_of(path) == [*range(16, 24)]


def test_a_rewind_reaches_into_closed_files(
    tmp_path: Path, make_log: Callable[..., StepLog]
) -> None:
    path = tmp_path / "log"
    length = len(json.dumps(monitor.as_json(report(10)))) + 1
    log = make_log(str(path), max_bytes=2 * length + 10)
    for step in range(10, 16):
        log.write(report(step))
    log.rewind(12)
    assert steps_of(path) == [10, 11, 12]
    log.write(report(13))
    assert steps_of(path) == [10, 11, 12, 13]


def test_a_log_that_keeps_no_closed_files(tmp_path: Path, make_log: Callable[..., StepLog]) -> None:
    log = make_log(str(tmp_path / "log"), max_bytes=10, keep=0)
    for step in range(10, 13):
        log.write(report(step))
    assert [step["step"] for step in read_log(str(tmp_path / "log"), keep=0)] == [12]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="log"):
        list(read_log(str(tmp_path / "log")))


# --- DeepSpeed's monitor --------------------------------------------------------------------------


def events(of: StepReport, **options: Any) -> dict[str, Any]:
    written: list[tuple[str, Any, int]] = []
    writer = SimpleNamespace(enabled=True, write_events=written.extend)
    monitor.write_events(SimpleNamespace(monitor=writer, global_samples=640), of, **options)
    assert {samples for _, _, samples in written} <= {640}
    return {name.removeprefix("Train/Samples/gradient_pruning_"): v for name, v, _ in written}


def test_the_monitor_gets_every_number() -> None:
    values = events(report(), target=0.25, residual_norm=1.5)
    assert values == {
        "loss": 3.25, "performance": 0.5, "target": 0.25, "density": 0.05, "interval": 4,
        "senders": 2,
        "wire_mb": 2.5, "compression_rate": 20.0, "step_time_s": 1.6, "compute_time_s": 1.2,
        "codec_time_s": 0.1, "comm_time_s": 0.3, "hidden_time_s": 0.2, "link_mbit": 100.0,
        "residual_norm": 1.5, "cause": 7,
    }  # fmt: skip


def test_what_is_unknown_or_no_number_is_left_out() -> None:
    values = events(
        report(loss=None, performance=None, wire_bytes=0, decision_rate_bytes_per_s=None,
               step_time_s=None, compute_time_s=float("inf"))
    )  # fmt: skip
    assert values.keys() == {
        "density", "interval", "senders", "wire_mb", "codec_time_s", "comm_time_s",
        "hidden_time_s", "cause",
    }  # fmt: skip


def test_a_validation_comes_with_its_distance_from_the_own_weights() -> None:
    written: list[tuple[str, Any, int]] = []
    writer = SimpleNamespace(enabled=True, write_events=written.extend)
    engine = SimpleNamespace(monitor=writer, global_samples=640)
    write_validation(engine, 5.0, 4.75)
    write_validation(engine, 4.5)
    write_validation(SimpleNamespace(monitor=SimpleNamespace(enabled=False)), 4.0)
    found = [(name.removeprefix(monitor.PREFIX), value) for name, value, _ in written]
    assert found == [
        ("validation_loss", 5.0),
        ("own_validation_loss", 4.75),
        ("validation_gap", -0.25),
        ("validation_loss", 4.5),
    ]


def test_a_monitor_that_is_off_gets_nothing() -> None:
    writer = SimpleNamespace(enabled=False)
    monitor.write_events(SimpleNamespace(monitor=writer), report())


# --- the logger -----------------------------------------------------------------------------------


def told(config: dict[str, Any], *reports: StepReport) -> list[tuple[str, str]]:
    """Level and text of what is logged."""
    records: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(  # type: ignore[method-assign]
        (record.levelname, record.getMessage())
    )
    monitor.decisions_logger.addHandler(handler)
    before = monitor.decisions_logger.level
    monitor.decisions_logger.setLevel(logging.INFO)
    try:
        log = DecisionLog(load_block({"gradient_pruning": config}))
        for one in reports:
            log.tell(one)
    finally:
        monitor.decisions_logger.setLevel(before)
        monitor.decisions_logger.removeHandler(handler)
    return records


def test_a_change_of_density_is_told_with_its_reason() -> None:
    changed = report(
        decision_density=0.1, decision_cause=Cause.BUDGET_ROOM, decision_reason="there is room"
    )
    assert told({}, report(), changed) == [("INFO", "step 11: there is room")]


def test_a_ramp_is_told_once() -> None:
    """Fifty steps of a ramp were fifty lines."""
    ramp = {"decision_cause": Cause.RAMP, "decision_reason": "ramp"}
    begins = report(cause=Cause.WARMUP, density=1.0, decision_density=0.25, **ramp)
    goes_on = [report(density=0.25 / n, decision_density=0.2 / n, **ramp) for n in (1, 2, 3)]
    assert told({}, begins, *goes_on) == [("INFO", "step 11: ramp")]


def test_a_change_of_the_interval_is_told_where_the_law_makes_it() -> None:
    every = [report(decision_interval=4), report(decision_interval=8), report(decision_interval=8)]
    for one in every:
        object.__setattr__(one, "density", one.decision.density)
    assert [level for level, _ in told({"sync_every": "auto"}, *every)] == ["INFO"]
    assert told({"step_time_budget_s": 0.2, "sync_every": "auto"}, hopeless())[-1][1].endswith(
        "Raise step_time_budget_s or lower density.min."
    )


def test_a_warm_up_that_goes_on_unpruned_is_told_once() -> None:
    warm = {"cause": Cause.WARMUP, "density": 1.0, "decision_density": 1.0}
    warm |= {"decision_cause": Cause.WARMUP, "decision_reason": "unpruned"}
    goes_on = [report(decision_unpruned=unpruned, **warm) for unpruned in (False, True, True)]
    assert told({}, *goes_on) == [("INFO", "step 11: unpruned")]
    assert told({"warmup": "unpruned"}, *goes_on[1:]) == []


LEAST = 5 / 4096
"""The kernel's step above density.min = 0.001."""


def hopeless(**changed: Any) -> StepReport:
    return report(
        density=LEAST, decision_density=LEAST, **{"decision_predicted_step_s": 0.5, **changed}
    )


def test_a_budget_that_cannot_be_met_is_warned_of_once() -> None:
    records = told({"step_time_budget_s": 0.2}, *[hopeless()] * 3)
    assert records == [
        (
            "WARNING",
            "step 11: the budget of 0.2 s per step cannot be met: at the lowest density, "
            "0.0012207, a step takes 0.5 s, 0.3 s of them for computation. Raise "
            "step_time_budget_s, raise sync_every, or lower density.min.",
        )
    ]


def test_computation_of_one_slow_step_is_not_told_as_part_of_a_typical_one() -> None:
    [(_, text)] = told({"step_time_budget_s": 0.2}, hopeless(compute_time_s=4.0))
    assert "a step takes 0.5 s. Raise " in text


def test_it_is_warned_of_again_after_there_was_room() -> None:
    room = report(density=0.05, decision_density=0.05)
    records = told({"step_time_budget_s": 0.2}, hopeless(), room, hopeless())
    assert [level for level, _ in records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(
    ("config", "of"),
    [
        ({}, hopeless()),
        ({"step_time_budget_s": 0.49}, hopeless()),
        ({"step_time_budget_s": 0.2}, hopeless(decision_predicted_step_s=None, step_time_s=None)),
        ({"step_time_budget_s": 0.5}, hopeless(decision_predicted_step_s=None)),
    ],
)
def test_a_budget_that_is_met_or_unknown_is_not_warned_of(
    config: dict[str, Any], of: StepReport
) -> None:
    assert told(config, of) == []


@pytest.mark.parametrize(
    ("pruned_s", "level", "heard", "is_printed"),
    [
        (1.0, logging.INFO, ["INFO"], False),
        (1.0, logging.WARNING, [], True),  # DeepSpeed's own logger would not show it either
        (1.0, logging.ERROR, [], False),  # somebody wants silence
        (3.0, logging.WARNING, ["WARNING"], False),
    ],
)
def test_a_verdict_is_always_heard(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    pruned_s: float,
    level: int,
    heard: list[str],
    is_printed: bool,
) -> None:
    verdict = Verdict(2.0, pruned_s, 0.05, 1, 80.0)
    caplog.set_level(level, monitor.decisions_logger.name)
    monitor.say_verdict(verdict)
    found = [(record.name, record.levelname) for record in caplog.records]
    assert found == [("ds_gradprune.decisions", name) for name in heard]
    assert capsys.readouterr().err == (f"gradient pruning: {verdict.text}\n" * is_printed)


def test_without_a_prediction_the_measured_time_of_a_step_counts() -> None:
    of = hopeless(decision_predicted_step_s=None, compute_time_s=None)
    ((level, text),) = told({"step_time_budget_s": 0.3}, of)
    assert level == "WARNING"
    assert "a step takes 0.4 s. Raise" in text
