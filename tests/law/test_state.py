"""States as plain types and back: equal after JSON, and a damaged one is named by its path."""

import dataclasses
import json
import math

import pytest

from ds_gradprune import law
from ds_gradprune.errors import CheckpointError
from ds_gradprune.law.decision import Cause, Decision
from ds_gradprune.law.state import from_plain, to_plain
from tests.helpers.simulated_law import MBIT, Run, make_config

RATE = 20 * MBIT


def settled(controller):
    return Run(make_config(controller=controller), noise=0.05).steps(120, RATE)


@pytest.mark.parametrize("controller", ["predictive", "stepwise"])
def test_state_is_equal_after_json(controller) -> None:
    run = settled(controller)
    data = json.loads(json.dumps(law.to_plain(run.state)))
    assert data["law"] == controller
    restored = law.restore(run.config, data)
    assert restored == run.state
    assert type(restored) is type(run.state)


@pytest.mark.parametrize("controller", ["predictive", "stepwise"])
def test_state_of_the_other_law_is_refused(controller) -> None:
    run = settled(controller)
    other = "stepwise" if controller == "predictive" else "predictive"
    message = f'gradient_pruning.controller must be "{controller}", the law that'
    with pytest.raises(CheckpointError, match=message):
        law.restore(make_config(controller=other), law.to_plain(run.state))


@pytest.mark.parametrize("data", [None, [], {}, {"law": "seed"}, {"law": ["predictive"]}])
def test_what_is_no_state_is_refused(data) -> None:
    with pytest.raises(CheckpointError, match=r'law\.law must be "predictive" or "stepwise", got'):
        law.restore(make_config(), data)


def damaged(data, path, value):
    """The data with another value at a path such as "network.alarm.samples.0"; ...: removed."""
    data = json.loads(json.dumps(data))
    *way, last = path.split(".")
    place = data
    for name in way:
        place = place[int(name) if isinstance(place, list) else name]
    key = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("density", 2.0, r"law\.density must be between 0.000244141 and 1, got 2\.0"),
        ("density", "x", r"law\.density must be a number, got x"),
        ("density", True, r"law\.density must be a number, got True"),
        ("density", math.nan, r"law\.density must be finite, got nan"),
        ("plan", ..., r"law\.plan must be there"),
        ("plan.k", 0, r"law\.plan\.k must be between 1 and 4096, got 0"),
        ("plan.k", 41.0, r"law\.plan\.k must be a whole number, got 41\.0"),
        ("plan.is_refined", 1, r"law\.plan\.is_refined must be true or false, got 1"),
        ("window", 3, r"law\.window must be a JSON object, got 3"),
        ("window.losses", {}, r"law\.window\.losses must be a list, got \{\}"),
        ("window.losses.3", math.inf, r"law\.window\.losses\[3\] must be finite, got inf"),
        ("window.losses.3", None, r"law\.window\.losses\[3\] must be a number, got None"),
        ("compute_times_s.0", -1.0, r"law\.compute_times_s\[0\] must be between 1e-09 and 1e\+09"),
        ("network.alarm.samples.0", [1], r"network\.alarm\.samples\[0\] must have 2 entries"),
        ("network.alarm.samples.0.0", 0, r"alarm\.samples\[0\]\[0\] must be between 1 and"),
        ("network.alarm.seen", ..., r"law\.network\.alarm\.seen must be there"),
        ("network.codec.other", [1, "x"], r"law\.network\.codec\.other\[1\] must be a number"),
        ("network.magic", 1, r"law\.network must have the fields alarm, .* alone, got magic"),
    ],
)
def test_damaged_state_is_refused_by_its_path(path, value, message) -> None:
    run = settled("predictive")
    data = damaged(law.to_plain(run.state), path, value)
    with pytest.raises(CheckpointError, match=message):
        law.restore(run.config, data)


def test_whole_number_serves_as_a_number() -> None:
    run = settled("predictive")
    data = damaged(law.to_plain(run.state), "density", 1)
    restored = law.restore(run.config, data)
    assert restored.density == 1.0
    assert type(restored.density) is float


def test_dataclasses_and_enums_are_read_too() -> None:
    decision = settled("predictive").decisions[-1]
    data = json.loads(json.dumps(to_plain(decision)))
    assert data["cause"] == "hold"
    assert from_plain(Decision, data) == decision
    assert from_plain(Decision, data).cause is Cause.HOLD
    with pytest.raises(CheckpointError, match=r"Decision\.cause must be one of 'warmup', .* got x"):
        from_plain(Decision, data | {"cause": "x"})


@dataclasses.dataclass(frozen=True, slots=True)
class Sums:
    steps: int
    least: float | None = None


def test_optional_fields_and_names_of_the_whole() -> None:
    assert from_plain(Sums, {"steps": 3, "least": None}) == Sums(3)
    assert from_plain(Sums, {"steps": 3, "least": 2}) == Sums(3, 2.0)
    with pytest.raises(CheckpointError, match=r"totals\.steps must be a whole number, got None"):
        from_plain(Sums, {"steps": None, "least": None}, "totals")
    with pytest.raises(CheckpointError, match=r"Resume from another checkpoint"):
        from_plain(Sums, [])
