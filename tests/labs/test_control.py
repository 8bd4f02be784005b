"""The simulator of control laws: traces, plant, laws, scores, and the whole script."""

import json
import math
import statistics
from dataclasses import asdict
from functools import partial

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.errors import ConfigError
from labs.control import losses, replay, traces
from labs.control.campaign import run_all
from labs.control.command import main
from labs.control.laws import NAMES, Oracle, best_density, make_law
from labs.control.plant import BUDGET_S, COMPUTE_S, Plant, draw, wire_bytes
from labs.control.score import Course, changes, in_budget, percentile_95, run_law, settles
from labs.control.traces import MBIT, Trace
from labs.race.job import Recipe

STEPS = 400


def course_of(name, trace, *, hosts=4, seed=0, kind="healthy"):
    made = losses.make_losses(kind, seed, len(trace.rates))
    chance = draw(trace, hosts, seed)
    make = partial(make_law, name, trace, hosts)
    return run_law(name, make, trace, (kind, made), (hosts, seed), chance)


@pytest.mark.parametrize("kind", list(traces.KINDS))
def test_trace_is_of_its_seed_alone(kind) -> None:
    one, again = traces.make_trace(kind, 3, STEPS), traces.make_trace(kind, 3, STEPS)
    assert one == again
    assert one != traces.make_trace(kind, 4, STEPS)
    assert len(one.rates) == STEPS
    assert all(rate > 0.0 for rate in one.rates)
    assert len(set(one.rates[: traces.BEGIN_STEPS])) == 1


def test_changes_are_those_by_2_to_20() -> None:
    trace = Trace("x", (8.0, 8.0, 4.0, 4.0, 6.0, 120.0, 4000.0), settles=True)
    assert trace.changes() == [(2, 0.5), (5, 20.0)]
    assert Trace("x", trace.rates).changes() == []
    found = [
        factor
        for seed in range(5)
        for _, factor in traces.make_trace("steps", seed, 2000).changes()
    ]
    assert min(found) < 0.2
    assert max(found) > 5.0


def test_losses_have_their_shapes() -> None:
    made = {kind: losses.make_losses(kind, 1, 1000) for kind in losses.KINDS}
    assert statistics.fmean(made["healthy"][:200]) > statistics.fmean(made["healthy"][-200:])
    rise = statistics.fmean(made["rise"][-50:]) - statistics.fmean(made["rise"][:500])
    # 500 steps at 8 sigma per 128: 1.56, less half of the last 50.
    assert rise == pytest.approx(475 * 8 * 0.05 / 128, abs=0.03)
    assert max(made["spike"]) > 3.5
    assert sum(math.isnan(loss) for loss in made["nan"]) >= 15


def test_times_ride_one_step_late_and_waiting_is_not_wire() -> None:
    trace = Trace("x", (100 * MBIT,) * 3, noise=0.0, outliers=0.0, stragglers=1.0)
    plant = Plant(trace, [1.0, 2.0, 3.0], 4, draw(trace, 4, 0))
    first, took_s = plant.run_step(0, 41 / CHUNK_NUMEL)
    assert first.timed_density is None
    second, _ = plant.run_step(1, 0.1)
    assert second.loss == 2.0
    assert second.timed_density == 41 / CHUNK_NUMEL
    assert second.step_time_s == pytest.approx(took_s, rel=1e-9)
    assert second.wire_bytes == wire_bytes(41, 4)
    wire_s = 0.010 + wire_bytes(41, 4) * 8.0 / (100 * MBIT)
    assert second.comm_time_s == pytest.approx(wire_s, rel=1e-9)
    assert second.skew_time_s is not None
    assert second.skew_time_s > 0.2 * COMPUTE_S


@pytest.mark.parametrize("rate", [50 * MBIT, 500 * MBIT, 90_000 * MBIT])
@pytest.mark.parametrize("hosts", [4, 8])
def test_oracle_fills_the_budget_and_no_more(rate, hosts) -> None:
    trace = Trace("x", (rate,) * 2, noise=0.0, outliers=0.0)
    plant = Plant(trace, [1.0, 1.0], hosts, draw(trace, hosts, 0))
    k = round(Oracle(trace, hosts).density * CHUNK_NUMEL)
    spread_s = 0.03 * COMPUTE_S  # the computation's own noise
    assert plant.step_s(0, k) <= BUDGET_S + spread_s
    if k < CHUNK_NUMEL // 4:
        assert plant.step_s(0, k + 1) >= BUDGET_S - spread_s
    assert best_density(rate, hosts, 0.1) <= best_density(rate, hosts, 0.0)


def test_settle_counts_from_the_first_step_at_the_new_rate() -> None:
    trace = Trace("x", (10.0,) * 50 + (2.0,) * 50, settles=True)
    oracle = Course("oracle", "x", "y", 4, 0, [0.5] * 100, [0.8] * 100, [], None, 0.0)
    late = [0.8] * 50 + [1.2] * 4 + [0.8] * 46
    course = Course("law", "x", "y", 4, 0, [0.5] * 100, late, [], None, 0.0)
    # Late for four steps; from the third on, three of five are within.
    assert settles(course, oracle, trace) == [(0.2, 2, 4)]
    timid = Course("law", "x", "y", 4, 0, [0.5] * 53 + [0.2] * 47, [0.8] * 100, [], None, 0.0)
    assert settles(timid, oracle, trace) == [(0.2, 0, 0)]
    never = Course("law", "x", "y", 4, 0, [0.5] * 100, [1.2] * 100, [], None, 0.0)
    assert settles(never, oracle, trace) == [(0.2, 50, 20)]


def test_steps_that_the_oracle_misses_do_not_count() -> None:
    steps = 110
    oracle = Course("oracle", "x", "y", 4, 0, [0.5] * steps, [0.8] * 105 + [1.2] * 5, [], None, 0.0)
    course = Course("law", "x", "y", 4, 0, [0.5] * steps, [0.8] * 104 + [1.2] * 6, [], None, 0.0)
    assert in_budget(course, oracle) == (4, 5)


def test_percentiles_and_changes() -> None:
    assert percentile_95([]) is None
    assert percentile_95(range(1, 101)) == 95
    densities = [0.1] * 250 + [0.2] * 10 + [0.1] * 40
    course = Course("law", "x", "y", 4, 0, densities, [0.8] * 300, [], None, 0.0)
    assert changes(course) == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_law_stays_in_bounds_on_every_link(name) -> None:
    for kind in ("steps", "outages", "fast"):
        course = course_of(name, traces.make_trace(kind, 0, STEPS))
        allowed = (1 / CHUNK_NUMEL, 0.25)
        assert all(allowed[0] <= d <= allowed[1] or d == 1.0 for d in course.densities)


def test_ours_beats_the_literal_rule_where_the_rate_jumps() -> None:
    trace = traces.make_trace("steps", 1, 1000)
    oracle = course_of("oracle", trace)
    met = {
        name: in_budget(course_of(name, trace), oracle)[0] for name in ("predictive", "seed_0.9")
    }
    assert met["predictive"] > met["seed_0.9"]
    settled = [steps for _, steps, _ in settles(course_of("predictive", trace), oracle, trace)]
    assert settled
    assert max(settled) <= 6


def test_figures_have_the_promised_keys() -> None:
    laws = run_all(["predictive", "kimad"], 1, 300, lambda text: None)
    assert set(laws["predictive"]["links"]) == set(traces.KINDS)
    assert set(laws["predictive"]["losses"]) == set(losses.KINDS)
    assert laws["kimad"]["false_miss"] is None
    for kind in losses.RISING:
        assert laws["predictive"]["losses"][kind]["unanswered"] == 0
    assert laws["predictive"]["losses"]["cut"]["miss_share"] == 0.0
    assert laws["predictive"]["in_budget"] > laws["kimad"]["in_budget"]


def test_script_prints_json_last_and_writes_its_page(tmp_path, capsys) -> None:
    out = tmp_path / "control.json"
    flags = ["--seeds", "1", "--steps", "300", "--laws", "predictive", "--no-plots"]
    assert main([*flags, "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    promised = {
        "settle_down_p95",
        "settle_up_p95",
        "in_budget",
        "density_vs_oracle",
        "stationary_changes",
        "false_miss",
        "update_us",
    }
    assert promised <= set(document["laws"]["predictive"])
    page = out.with_suffix(".md").read_text()
    assert "| predictive |" in page
    assert json.loads(out.read_text())["laws"]["predictive"]["in_budget"] > 0.5


RECIPE = Recipe("nano", 4, 3e-3, 0.99, 0.1, 1.0, 4, 10, 400, 0, 0.13, None)
RATES = ["200mbit", "20mbit", None]


def bed_record(path, *, bytes_per_density=3_000_000.0, comm_factor=1.0, count=130):
    """A file as `python -m labs.control bed` writes it: each rate for `count` steps, 0.1 s of work.

    The density that is recorded does not matter to the law that replays it: 0.02 or 0.1.
    """
    steps = []
    for number in range(1, count * len(RATES) + 1):
        rate = RATES[(number - 1) // count]
        density = 1.0 if number <= RECIPE.dense_steps else (0.02, 0.1)[number % 2]
        sent = 4_000_000 if density == 1.0 else round(bytes_per_density * density)
        bps = 1e9 if rate is None else 1e6 * int(rate.removesuffix("mbit"))
        steps.append(
            {
                "density": density,
                "payload_bytes": sent,
                "compute_s": 0.1,
                "codec_s": 0.0 if density == 1.0 else 0.005 + 0.01 * density,
                "comm_s": comm_factor * (0.002 + replay.FRAMES * 8 * sent / bps),
                "loss": 5.0 - 0.005 * number,
                "rate": rate,
            }
        )
    document = {"setting": {"recipe": asdict(RECIPE)}, "runs": [{"method": "ours", "steps": steps}]}
    path.write_text(json.dumps(document))
    return replay.read(path)


def test_recorded_link_becomes_a_kind(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(traces, "KINDS", dict(traces.KINDS))
    traces.add_recorded("bed", [8e7, 4e7])
    trace = traces.make_trace("bed", 0, 300)
    assert trace.rates[100:104] == (8e7, 4e7, 8e7, 4e7)
    assert len(trace.rates) == 300
    recording = bed_record(tmp_path / "bed.json")
    assert len(replay.measured_rates(recording)) == 390


def test_replay_models_what_it_read(tmp_path) -> None:
    model = replay.Model(bed_record(tmp_path / "bed.json"))
    assert model.overhead_s == pytest.approx(0.002, rel=1e-6)
    assert model.codec_s(0.05) == pytest.approx(0.0055, rel=1e-6)
    assert model.payload_bytes(0.05) == pytest.approx(150_000, rel=1e-6)
    assert model.payload_bytes(0.2) == pytest.approx(600_000, rel=1e-6)  # beyond what was seen
    assert model.payload_bytes(1.0) == 4_000_000
    assert model.codec_s(1.0) == 0.0


def test_replayed_law_fills_the_budget_on_the_recorded_link(tmp_path) -> None:
    recording = bed_record(tmp_path / "bed.json")
    agreement = replay.compare(recording, replay.simulate(recording))
    fast, slow, unshaped = agreement["stretches"]
    assert [part["link"] for part in agreement["stretches"]] == ["200mbit", "20mbit", "unshaped"]
    assert fast["simulated"]["answered"] is None
    # 0.13 - 0.1 - codec - overhead is left, at 3 MB per unit of density.
    best = (0.13 - 0.107) * 200e6 / 8 / replay.FRAMES / 3e6
    assert 0.7 * best < fast["simulated"]["density"] < best
    assert slow["simulated"]["density"] == pytest.approx(fast["simulated"]["density"] / 10, rel=0.3)
    assert slow["simulated"]["answered"] <= 4
    assert unshaped["simulated"]["density"] > 0.2  # density.max is 0.25
    for part in agreement["stretches"]:
        assert part["simulated"]["step_s"] <= 0.13
    table = replay.rows_of(agreement)
    assert [row[0] for row in table] == ["link", "200mbit", "20mbit", "unshaped"]


def test_replay_of_its_own_simulation_agrees(tmp_path) -> None:
    recording = bed_record(tmp_path / "bed.json")
    simulated = replay.simulate(recording)
    again = replay.Recording(recording.config, simulated)
    agreement = replay.compare(again, replay.simulate(again))
    assert agreement["density_ratio"] == pytest.approx(1.0, rel=0.05)
    assert agreement["time_ratio"] == pytest.approx(1.0, rel=0.02)
    other = replay.compare(recording, simulated)  # whose densities were made up
    assert not 0.8 < other["density_ratio"] < 1.25


@pytest.mark.parametrize("text", ["", "{}", '{"runs": []}', '{"runs": [{"steps": []}]}'])
def test_file_that_holds_no_record_is_refused(tmp_path, text) -> None:
    path = tmp_path / "bed.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--replay must be a file that"):
        replay.read(path)


def test_record_without_pruned_steps_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--replay must hold pruned steps"):
        bed_record(tmp_path / "bed.json", count=5)


def test_wrong_flags_are_told_all_at_once(capsys) -> None:
    assert main(["--seeds", "0", "--steps", "10", "--laws", "magic"]) == 2
    told = capsys.readouterr().err
    assert "--seeds must be at least 1, got 0." in told
    assert "--steps must be at least 300, got 10." in told
    assert "--laws must be of predictive," in told
