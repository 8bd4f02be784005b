"""What the flags of the race ask for, and how an interrupted campaign goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from types import SimpleNamespace

import pytest

from ds_gradprune.errors import ConfigError
from labs.race import campaign, command, files
from labs.race.engines import ds_config
from labs.race.job import Job
from labs.race.methods import DEFAULT, parse_method, parse_methods
from labs.race.record import Record
from tests.helpers.race import RECIPE, dense_runs, plan, stretch, topk_runs


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
        *("zeroone_adam_0", "onebit_adam_2", "rounds_0", "rounds_2_0.0", ""),
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
    assert islands == block | {"prune": "update", "island": {"ranks": 1}}
    assert ds_config(parse_method("dense_bf16"), RECIPE)["communication_data_type"] == "bf16"
    assert ds_config(parse_method("dense_fp32"), RECIPE)["gradient_pruning"] == {"enabled": False}


def test_rounds_begin_unpruned_and_run_at_every_rate() -> None:
    rounds = parse_method("rounds_5")
    block = ds_config(rounds, RECIPE)["gradient_pruning"]
    assert (block["sync_every"], block["warmup"], block["overlap"]) == (5, "unpruned", "auto")
    assert block["density"] == {"initial": 0.03125, "min": 0.03125, "max": 0.03125}
    assert rounds.runs_at_rates
    assert parse_method("rounds_2_0.25").density == 0.25
    assert not parse_method("islands_0.01").runs_at_rates


def test_stage_ranks_and_block_reach_deepspeeds_configuration() -> None:
    asked = plan(
        *("--zero-stage", "3", "--ranks-per-host", "2", "--methods", "dense_fp32,ours_update"),
        *("--block", '{"sync_every": 5, "overlap": "auto"}'),
    )
    config = ds_config(parse_method("ours_update"), asked.recipe)
    assert config["zero_optimization"] == {"stage": 3}
    block = config["gradient_pruning"]
    assert (block["island"], block["sync_every"], block["overlap"]) == ({"ranks": 2}, 5, "auto")
    dense = ds_config(parse_method("dense_fp32"), asked.recipe)
    assert dense["zero_optimization"] == {"stage": 3}
    assert dense["gradient_pruning"] == {"enabled": False}


def test_interval_and_hiding_are_in_the_names_of_ours() -> None:
    recipe = plan("--block", '{"sync_every": 5, "value_bits": 4}').recipe
    blocks = {
        name: ds_config(parse_method(name), recipe)["gradient_pruning"]
        for name in ("ours_update_hidden", "ours_update_auto", "ours_update_auto_hidden")
    }
    assert [(b["sync_every"], b.get("overlap"), b["value_bits"]) for b in blocks.values()] == [
        (5, "auto", 4),
        ("auto", None, 4),
        ("auto", "auto", 4),
    ]
    assert all(parse_method(name).runs_at_rates for name in blocks)


def test_the_real_model_is_trained_on_short_sequences() -> None:
    assert plan("--model", "smollm2").recipe.seq_len == 128
    assert plan("--model", "micro").recipe.seq_len == 256


def test_a_job_survives_its_command_line() -> None:
    job = Job("ours", RECIPE, "data", "store", 3, 1, 2)
    assert Job.from_json(job.to_json()) == job


def plan_defaults() -> str:
    return command.parser().parse_args([]).methods


def test_unshaped_is_always_measured_and_only_it_without_a_bed() -> None:
    assert list(plan("--rates", "20mbit,none,1gbit").rates) == ["20mbit", "1gbit", None]
    assert list(plan("--bed", "none").rates) == [None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hosts", "1"], "--hosts must be at least 2, got 1"),
        (["--ranks-per-host", "0"], "--ranks-per-host must be at least 1, got 0"),
        (["--zero-stage", "1"], r"do not run in DeepSpeed \(ddp_fp32, fp16_hook"),
        (["--zero-stage", "3", "--methods", "onebit_adam"], r"\(onebit_adam\), got 3"),
        (["--block", "{"], "--block must be a JSON object, got {"),
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
    lines = files.schedules(plan("--steps", "300", "--methods", "ours,onebit_adam,zeroone_adam"))
    assert lines[0] == "- onebit_adam: dense for 45 steps"
    assert "frozen after step 30" in lines[1]
    assert files.schedules(plan("--steps", "300", "--methods", "ours")) == []


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
    made, rates = [], []

    @contextlib.contextmanager
    def note_the_start(place, method, recipe, data, seed, rate):
        made.append((method, seed))
        rates.append(rate)
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
    # a connection is made at the rate of its run
    assert rates[:5] == [None, "20mbit", "100mbit", "1gbit", None]
    made.clear()
    rest = list(campaign.execute(asked, None, tmp_path, lambda line: None, visits[:-2]))
    assert made == [("ours", 1), ("dense_fp32", 1)]
    assert rest == visits[-2:]
