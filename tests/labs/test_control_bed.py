"""The benchmark on a changing link, without links and ranks: which rate when, what came of it."""

import json
from typing import ClassVar

import pytest

from ds_gradprune.errors import ConfigError
from labs.control.bed import Route, Trip, common_loss, drive, summarize, wall_to_loss
from labs.control.bed_command import draw, make_route, parser, rows_of
from labs.race.command import make_recipe
from labs.race.crew import Step, Stretch


def step(number, *, wall_s=1.0, comm_s=0.1, density=0.05):
    return Step(number, 2.0, wall_s, 0.8, 0.0, comm_s, 1000, density, "usual")


class Ranks:
    """Trains by counting; a step takes longer on a slower link."""

    WALL_S: ClassVar = {"1gbit": 0.5, "200mbit": 1.0, "50mbit": 4.0, None: 0.1}

    def __init__(self) -> None:
        self.rate, self.done = None, 0
        self.calls: list[tuple[int, str | None]] = []

    def set_rate(self, rate):
        self.rate = rate
        self.calls.append((self.done, rate))

    def train(self, steps, eval_every=None):
        numbers = range(self.done + 1, self.done + steps + 1)
        self.done += steps
        validations = [(n, 5.0 - 0.01 * n) for n in numbers if n % eval_every == 0]
        rows = [step(n, wall_s=self.WALL_S[self.rate]) for n in numbers]
        return Stretch(rows, validations, None)


def test_by_steps_each_rate_has_its_share() -> None:
    ranks = Ranks()
    trip = drive("ours", 0, Route(("1gbit", "200mbit", "50mbit"), 100), ranks, 10)
    assert ranks.calls == [(0, "1gbit"), (34, "200mbit"), (67, "50mbit")]
    assert [one.step for one in trip.steps] == list(range(1, 101))
    assert [trip.rates.count(rate) for rate in ("1gbit", "200mbit", "50mbit")] == [34, 33, 33]
    assert [number for number, _ in trip.validations] == list(range(10, 101, 10))


def test_by_time_the_rate_follows_the_training_clock() -> None:
    ranks = Ranks()
    route = Route(("1gbit", "50mbit"), 60, by="time", each_s=10.0)
    trip = drive("ours", 0, route, ranks, 10)
    # 20 steps of 0.5 s make 10 s; 5 of 4 s make 20 s, and the clock stands at 30: the second again.
    assert ranks.calls[0] == (0, "1gbit")
    assert ranks.calls[1] == (20, "50mbit")
    assert len(trip.steps) == 60
    clock_s = 0.0
    for number, (one, rate) in enumerate(zip(trip.steps, trip.rates, strict=True)):
        if number % 5 == 0:
            expected = route.rates[int(clock_s / 10.0) % 2]
        assert rate == expected
        clock_s += one.wall_s


def trip_of(method, losses, *, wall_s=1.0, seed=0, comm_s=0.05, densities=(0.05,)):
    steps = [
        step(n, wall_s=wall_s, comm_s=comm_s, density=densities[n % len(densities)])
        for n in range(1, 10 * len(losses) + 1)
    ]
    validations = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    return Trip(method, seed, [None] * len(steps), steps, validations)


def test_time_to_the_loss_is_that_of_its_first_validation() -> None:
    trip = trip_of("ours", [3.0, 2.5, 2.0, 1.5], wall_s=0.5)
    assert wall_to_loss(trip, 2.2) == pytest.approx(15.0, rel=1e-9)
    assert wall_to_loss(trip, 1.0) is None


def test_all_are_timed_to_what_ours_and_the_best_static_one_reach() -> None:
    ours, good, bad = (
        trip_of("ours", [3.0, 2.1]),
        trip_of("topk_0.05", [3.0, 2.0]),
        trip_of("topk_0.002", [3.0, 2.8]),
    )
    assert common_loss([ours, good, bad], "ours") == 2.1
    document = summarize([ours, good, bad], "ours", None)
    assert document["methods"]["topk_0.002"]["wall_s_to_loss"] is None
    assert document["speedup"] == pytest.approx(1.0, rel=1e-9)


def test_speedup_is_over_the_best_static_density() -> None:
    trips = [
        trip_of("ours", [3.0, 2.0], wall_s=0.5),
        trip_of("topk_0.05", [3.0, 2.0], wall_s=1.0),
        trip_of("topk_0.2", [3.0, 2.0], wall_s=3.0),
    ]
    document = summarize(trips, "ours", None)
    assert document["speedup"] == pytest.approx(2.0, rel=1e-9)
    rows = rows_of(document["methods"])
    assert rows[0][0] == "method"
    assert rows[1][:3] == ["ours", "10", "10"]


def test_budget_counts_pruned_steps_only() -> None:
    within = trip_of("ours", [2.0], comm_s=0.08)
    over = trip_of("topk_0.2", [2.0], comm_s=0.09)
    methods = summarize([within, over], "ours", 0.885)["methods"]
    assert methods["ours"]["in_budget"] == 1.0
    assert methods["topk_0.2"]["in_budget"] == 0.0
    assert summarize([within, over], "ours", 0.9)["methods"]["topk_0.2"]["in_budget"] == 1.0
    assert summarize([within, over], "ours", None)["methods"]["ours"]["in_budget"] is None


def test_loss_that_one_round_does_not_reach_is_not_reached() -> None:
    trips = [
        trip_of("ours", [2.0], seed=0),
        trip_of("topk_0.05", [2.0], seed=0),
        trip_of("ours", [2.0], seed=1),
        trip_of("topk_0.05", [2.0], seed=1),
        trip_of("topk_0.2", [2.0], seed=0),
        trip_of("topk_0.2", [9.0], seed=1),
    ]
    assert summarize(trips, "ours", None)["methods"]["topk_0.2"]["wall_s_to_loss"] is None


def test_record_can_be_read_as_json() -> None:
    trip = drive("ours", 3, Route(("1gbit",), 20), Ranks(), 10)
    data = json.loads(json.dumps(trip.to_json()))
    assert data["steps"][0]["rate"] == "1gbit"
    assert data["steps"][0]["payload_bytes"] == 1000
    assert len(data["validations"]) == 2


def test_route_from_flags_and_all_faults_at_once() -> None:
    flags = parser().parse_args(["--steps", "40", "--dense-steps", "4"])
    assert make_route(flags).rates == ("1gbit", "200mbit", "50mbit", "500mbit")
    assert make_route(parser().parse_args(["--bed", "none"])).rates == (None,)
    flags = parser().parse_args(
        ["--hosts", "1", "--steps", "50", "--dense-steps", "90", "--each-s", "0"]
    )
    with pytest.raises(ConfigError, match=r"(?s)--hosts must.*--dense-steps must.*--each-s must"):
        make_route(flags)


def test_picture_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    trip = drive("ours", 0, Route(("1gbit", "50mbit"), 20), Ranks(), 10)
    path = tmp_path / "trip.png"
    draw(trip, path)
    assert path.stat().st_size > 1000


def test_recipe_is_the_one_of_the_peers() -> None:
    recipe = make_recipe(parser().parse_args(["--steps", "90", "--budget-s", "0.2"]), 9)
    assert (recipe.steps, recipe.dense_steps, recipe.budget_s) == (90, 9, 0.2)
    assert recipe.zero_stage == 0
