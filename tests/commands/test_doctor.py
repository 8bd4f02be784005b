"""doctor: what it reads, what it prints, and the whole of it on one host."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ds_gradprune import cli
from ds_gradprune.commands import busy, doctor, doctor_page, loss_gap, shapes
from ds_gradprune.commands.diagnosis import Column, Exchange, diagnose, emulated
from ds_gradprune.commands.doctor_plan import Plan, decay_of, read_plan, settings_of
from ds_gradprune.commands.forecast import Job, Link, Setting
from ds_gradprune.commands.hostfile import HostLine
from ds_gradprune.commands.hosts import Hosts
from ds_gradprune.commands.pairs import Pair
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import ConfigError, DataError

# --- the plan -------------------------------------------------------------------------------------


def plan_of(tmp_path: Path, config: dict[str, Any], **more: Any) -> Plan:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return read_plan(str(path), **more)


def test_without_configuration() -> None:
    assert read_plan(None) == Plan(GradientPruningConfig())
    assert read_plan(None, batch=7).batch == 7


def test_configuration_is_read_as_deepspeed_would(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "gradient_pruning": {"value_bits": 2},
    }
    plan = plan_of(tmp_path, config)
    assert (plan.batch, plan.accumulation, plan.stage, plan.is_bf16) == (8, 2, 2, True)
    assert plan.block.value_bits == 2
    assert plan_of(tmp_path, config, batch=3).batch == 3


def test_auto_and_absent_keys_mean_defaults(tmp_path: Path) -> None:
    auto = {"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}
    assert plan_of(tmp_path, auto) == Plan(GradientPruningConfig())


def test_a_block_that_is_off_is_asked_about(tmp_path: Path) -> None:
    assert plan_of(tmp_path, {"gradient_pruning": {"enabled": False}}).block.enabled


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"gradient_accumulation_steps": "two"}, "gradient_accumulation_steps must be a whole"),
        ({"gradient_pruning": {"densty": {}}}, "densty"),
    ],
)
def test_faulty_configuration(tmp_path: Path, config: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        plan_of(tmp_path, config)


def test_absent_configuration() -> None:
    with pytest.raises(ConfigError, match="--config must be a file"):
        read_plan("nowhere.json")


def test_residual_follows_the_interval() -> None:
    block = GradientPruningConfig()
    assert decay_of(1, block) is None
    assert decay_of(5, block) == block.residual_decay
    assert decay_of(5, GradientPruningConfig(residual="used")) is None


def test_gradients_know_no_interval() -> None:
    block = GradientPruningConfig(prune="gradient")
    assert {s.interval for s in settings_of(block)} == {1}
    assert {s.interval for s in settings_of(GradientPruningConfig())} == {1, 5, 10}


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [3e5, 1e6, 1e7, 124e6, 1.3e9, 7e9])
def test_made_up_shapes_have_about_the_size(numel: float) -> None:
    layers, heads, width, vocabulary, context = shapes.made_up(numel)
    assert width % heads == 0
    assert 0.7 < (12 * layers * width**2 + (vocabulary + context) * width) / numel < 1.4


def test_models_by_name_number_and_folder(tmp_path: Path) -> None:
    config = shapes.config_of("nano")
    model = shapes.build(config, "meta")
    numels, pruned = shapes.sizes(model, 4096)
    assert sum(numels) == 1_071_872
    assert sum(n for n, is_pruned in zip(numels, pruned, strict=True) if not is_pruned) < 20_000
    config.save_pretrained(tmp_path)
    assert shapes.config_of(str(tmp_path)).n_embd == config.n_embd
    assert shapes.context_of(shapes.config_of("124M")) == 1024


@pytest.mark.parametrize("name", ["giant", "12", "0.001M", "nowhere/model"])
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="--model must"):
        shapes.config_of(name)


def test_a_sample_is_the_first_elements() -> None:
    assert shapes.share_of([10, 20, 30], [True, False, True], 25) == ([10, 15], [True, False])
    assert shapes.share_of([10], [True], 100) == ([10], [True])


# --- the page -------------------------------------------------------------------------------------


def findings(columns: list[Column], compute_s: float = 0.2) -> doctor_page.Findings:
    job = Job(1_000_000, 4, 4, compute_s)
    exchanges = {
        Setting(0.01): Exchange(0.01, 6e4),
        Setting(0.05): Exchange(0.02, 2e5),
        Setting(0.05, 5): Exchange(0.03, 2e5),
    }
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": None}
    facts = [
        {"host": f"host-{i}", "versions": dict(versions), "cores": 1, "load": 0.2} for i in range(2)
    ]
    facts[1]["versions"]["torch"] = "2.12.0"  # type: ignore[index]
    row = {
        "density": 0.01,
        "decay": None,
        "sample_bytes": 20_000,
        "emulated_s": [0.1] * len(columns),
    }
    return doctor_page.Findings(
        diagnosis=diagnose(job, columns, exchanges, 0.001),
        facts=facts,
        pairs=[Pair("host-0", "host-1", 0.0021, 95.1, 94.2, 93.3, 92.4)],
        local={
            "has_kernels": True,
            "step": {},
            "device": "cpu",
            "threads": 1,
            "exchanges": [row],
        },
        plan_text="nano, 1,000,000 parameters",
        warmup_steps=200,
        block_warmup_steps=200,
        notes=["torch differs between the hosts, so a run would be refused."],
    )


def test_page_of_a_link_that_is_worth_it() -> None:
    measured = Column("measured", 92.4, Link.ideal(0.0021, 4), is_measured=True)
    text = doctor_page.page(findings([measured, *emulated([10.0], 0.001, 4)]))
    assert "host-1 ............. [DIFFERS]" in text
    assert "host-0 - host-1  2.10 ms  95.1  94.2           93.3          92.4" in text
    assert "92.4 measured" in text
    assert "This link carries 92.4 Mbit/s: it pays" in text
    for setting in (Setting(0.01), Setting(0.05, 5)):
        assert loss_gap.expected(setting, 4, 1_000_000, 256).text in text
    assert "loss: a power law" in text
    assert '"initial": 0.05' in text
    assert "The first 200 steps are dense and take" in text
    assert max(len(line) for line in text.splitlines() if "  " not in line.strip()) <= 78


def test_page_of_a_link_that_is_not() -> None:
    measured = Column("measured", 40_000.0, Link(), is_measured=True)
    text = doctor_page.page(findings([measured, *emulated([10.0], 0.001, 4)]))
    assert "Do not use it here" in text
    assert '"enabled": false' in text
    assert "On 10 Mbit/s: it pays" in text


def test_times_of_a_busy_host_are_doubted() -> None:
    facts = [{"host": f"host-{i}", "cores": 2} for i in range(3)]
    calm = {"step": {"others": 0.1, "steps_s": [0.5, 0.5, 0.6, 0.6]}}
    local = [calm, {"step": {"others": 1.3, "steps_s": [0.5, 0.5, 0.9, 0.9]}}, {"step": None}]
    crowded, uneven = doctor.doubts_of(facts, local)
    assert crowded.startswith("host-1: other programs kept 1.3 of its 2 cores busy")
    assert uneven.startswith("host-1: a quarter of the measured steps took at most 0.5 s, another")
    column = Column("measured", 92.4, Link(), is_measured=True)
    found = dataclasses.replace(findings([column]), doubts=[crowded])
    assert "DOUBTFUL: host-1: other programs kept" in doctor_page.page(found)


def test_others_are_what_this_process_did_not_use(tmp_path: Path) -> None:
    def write(ticks: int) -> Path:
        stat = tmp_path / "stat"
        rows = [f"cpu{core} {ticks} 0 0 900 50 0 0 0 77 0" for core in os.sched_getaffinity(0)]
        stat.write_text("\n".join(["cpu 9 9 9 9 9 9 9 9", *rows, "intr 5"]) + "\n")
        return stat

    times, own = iter([100.0, 110.0]), iter([3.0, 5.0])
    others = busy.Others(lambda: next(times), lambda: next(own), write(1000))
    hertz = os.sysconf("SC_CLK_TCK")
    write(1000 + 6 * hertz)
    assert others.cores() == pytest.approx((6 * len(os.sched_getaffinity(0)) - 2) / 10)
    assert busy.Others(stat=tmp_path / "none").cores() is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (4.123, "4.12 s"), (0.1, "0.1 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert doctor_page.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "any"), (0.0, "none"), (801.4, "801"), (7512.0, "7,510")]
)
def test_rates(value: float | None, text: str) -> None:
    assert doctor_page.rate(value) == text


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_one_host(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--json", "--rates", "0.1", "--model", "0.2M", "--tokens", "8"]
    assert cli.main([*words, "--batch", "1"]) == doctor.PAYS
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == pytest.approx(2e5, rel=0.4)
    assert found["recommended"] in found["pruned_step_s"]
    assert found["pruned_step_s"][found["recommended"]] < found["dense_step_s"]
    assert found["link_is_measured"] is False


@pytest.mark.slow
def test_a_step_is_one_of_deepspeed_and_of_an_island() -> None:
    """Forecasts lacked DeepSpeed's own work, and an exchange that comes after a real step."""
    with Hosts([HostLine("localhost")], os.environ) as hosts:
        (found,) = hosts.together(
            "local",
            120.0,
            model="0.2M",
            batch=1,
            tokens=8,
            is_bf16=True,
            stage=2,
            min_numel=4096,
            densities=[0.01],
            decays=[None],
            islands=3,
            shards=1,
            value_bits=4,
            step_s=None,
            links=[],
        )
    step = found["step"]
    assert len(step["steps_s"]) >= 2
    assert step["micro_s"] + step["optimizer_s"] == pytest.approx(fmean(step["steps_s"]), rel=0.5)
    assert step["watch_s"] >= 0.0
    # The exchange of the engine, and the same on its own.
    assert step["codec_s"] > 0.0
    alone_s = found["exchanges"][0]["codec_s"]
    assert found["around_s"] == max(0.0, step["codec_s"] - alone_s)


@pytest.mark.parametrize(("rate_mbit", "code"), [(10.0, 0), (1e6, 3)])
def test_exit_codes(
    rate_mbit: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    column = Column("measured", rate_mbit, Link(), is_measured=True)
    monkeypatch.setattr(doctor, "examine", lambda *_: findings([column]))
    assert cli.main(["doctor"]) == code
    said = capsys.readouterr().out
    assert ("Do not use it here" in said) == (code == doctor.DOES_NOT_PAY)
    assert ("For ds_config.json, on this link:" in said) == (code == doctor.PAYS)


def test_faults_have_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--islands", "1"]) == 2
    assert "must be a whole number >= 2, got '1'" in capsys.readouterr().err
    assert cli.main(["doctor", "--rates", "fast"]) == 2
    assert "must be a number above 0, got 'fast'" in capsys.readouterr().err
