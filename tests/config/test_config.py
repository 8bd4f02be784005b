"""The `gradient_pruning` block: ranges, types, the two modes, and every fault in one message.

Longer than 300 lines: every key of the block, with its limits and its message.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.config import (
    BLOCK,
    INTERVALS,
    GradientPruningConfig,
    LinkPoint,
    load_block,
)
from ds_gradprune.errors import ConfigError


def load(block: Any, total_steps: int | None = None) -> GradientPruningConfig:
    return load_block({BLOCK: block, "train_batch_size": 8}, total_steps)


def faults_of(block: Any, total_steps: int | None = None) -> list[str]:
    """The sentences of the error, each without the block's name in front."""
    with pytest.raises(ConfigError, match=BLOCK) as caught:
        load(block, total_steps)
    return [fault.removeprefix(f"{BLOCK}.") for fault in caught.value.faults]


def point(**fields: Any) -> dict[str, Any]:
    return {"throttle": {"schedule": [fields]}}


# --- what is accepted -----------------------------------------------------------------------------


def test_empty_block_gives_the_documented_defaults() -> None:
    config = load({})
    assert (config.enabled, config.prune, config.controller) == (True, "update", "predictive")
    assert (config.warmup_steps, config.ramp_steps, config.window_size) == (200, 100, 128)
    assert (config.density.initial, config.density.min, config.density.max) == (0.05, 0.001, 0.25)
    assert config.step_time_budget_s is None
    assert config.throttle is None


def test_every_default_passes_its_own_check() -> None:
    assert load(load({}).model_dump()) == load({})


def test_full_block_is_read() -> None:
    config = load(
        {
            "warmup_steps": 0,
            "window_size": 4,
            "performance_form": "literal",
            "step_time_budget_s": 0.5,
            "density": {"initial": 1.0, "min": 0.01, "max": 1.0},
            "value_bits": 32,
            "verify_every_steps": None,
            "log_path": "log.jsonl",
            "throttle": {
                "schedule": [{"rate_mbit": 20}, {"step": 9, "rate_mbit": 5, "latency_s": 0.01}]
            },
        }
    )
    assert config.throttle is not None
    assert config.throttle.schedule[1] == LinkPoint(step=9, rate_mbit=5.0, latency_s=0.01)
    assert config.density.max == 1.0


@pytest.mark.parametrize(
    "name", sorted({*GradientPruningConfig.model_fields} - {"overlap", "sync_every"})
)
def test_auto_means_the_default(name: str) -> None:
    assert getattr(load({name: "auto"}), name) == getattr(load({}), name)


def test_true_stands_for_auto_where_auto_is_a_value() -> None:
    """Accelerate 1.15.0 raises at an "auto" in a block that it does not know."""
    config = load({"overlap": True, "sync_every": 8})
    assert (config.overlap, config.delay_steps) == ("auto", 2)


def test_auto_is_a_value_of_overlap() -> None:
    assert (load({}).overlap, load({"overlap": "auto"}).overlap) == (False, "auto")


def test_auto_lets_the_law_choose_the_interval() -> None:
    config = load({"sync_every": "auto", "overlap": "auto"})
    assert (config.sync_every, config.first_interval, config.residual_form) == ("auto", 4, "reset")
    assert [config.delay_of(every) for every in INTERVALS] == [1, 1, 1, 2, 4, 8]
    assert [config.delay_of(every, unpruned=True) for every in INTERVALS] == [1, 1, 2, 4, 8, 16]
    assert load({"sync_every": 5}).first_interval == 5


def test_two_bits_suffice_where_all_values_are_sent() -> None:
    bits = {bits: load({"value_bits": bits}).unpruned_bits for bits in (2, 4, 16, 32)}
    assert bits == {2: 2, 4: 2, 16: 16, 32: 32}


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ({"sync_every": True}, 'sync_every must be a whole number or "auto", got true.'),
        ({"sync_every": "4"}, 'sync_every must be a whole number or "auto", got "4".'),
        ({"sync_every": None}, 'sync_every must be a whole number or "auto", got null.'),
        ({"sync_every": 1.5}, "sync_every must be a whole number, got 1.5."),
        ({"sync_every": 10**7}, "sync_every must be at most 1000000, got 10000000."),
        (
            {"sync_every": "auto", "residual": "used"},
            'residual must be "reset" or null with sync_every = "auto", got "used". One form must '
            "serve all intervals. Leave it out, or set sync_every to a number.",
        ),
        (
            {"sync_every": "auto", "controller": "stepwise"},
            'controller must be "predictive" with sync_every = "auto", got "stepwise". Leave it '
            "out, or set sync_every to a number.",
        ),
        (
            {"sync_every": "auto", "prune": "gradient"},
            'sync_every must be 1 with prune = "gradient", got "auto". Leave it out, or set prune '
            'to "update".',
        ),
    ],
)
def test_interval_is_a_number_or_auto(block: dict[str, Any], fault: str) -> None:
    assert faults_of(block) == [fault]


def test_auto_inside_a_block_means_the_default() -> None:
    assert load({"density": {"max": "auto"}}).density.max == 0.25


def test_whole_float_is_a_whole_number() -> None:
    assert load({"warmup_steps": 3.0}).warmup_steps == 3


def test_config_cannot_be_changed_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load({}).warmup_steps = 1


@given(low=st.floats(1e-6, 1.0), middle=st.floats(1e-6, 1.0), high=st.floats(1e-6, 1.0))
def test_density_is_accepted_exactly_when_ordered(low: float, middle: float, high: float) -> None:
    block = {"density": {"min": low, "initial": middle, "max": high}}
    if low <= middle <= high:
        assert load(block).density.initial == middle
    else:
        with pytest.raises(ConfigError, match=r"density\.(min|initial) must"):
            load(block)


# --- ranges and types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1."),
        ({"ramp_steps": -1}, "ramp_steps must be at least 0, got -1."),
        ({"window_size": 3}, "window_size must be at least 4, got 3."),
        ({"step_time_budget_s": 0}, "step_time_budget_s must be greater than 0, got 0."),
        ({"timeout_s": 0.0004}, "timeout_s must be at least 0.1, got 0.0004."),
        ({"timeout_s": 1e10}, "timeout_s must be at most 86400, got 10000000000.0."),
        ({"update_scale": 1e308}, "update_scale must be at most 1000, got 1e+308."),
        ({"slow_momentum": 1e30}, "slow_momentum must be at most 100, got 1e+30."),
        ({"performance_target": 11}, "performance_target must be at most 10, got 11."),
        ({"min_numel": 10**18}, f"min_numel must be at most {2**40}, got {10**18}."),
        ({"warmup_steps": 10**10}, "warmup_steps must be at most 1000000000, got 10000000000."),
        (
            {"warmup_steps": 10**5000},
            "warmup_steps must be at most 1000000000, got a whole number of 16610 bits.",
        ),
        ({"residual_decay": 0}, "residual_decay must be greater than 0, got 0."),
        ({"residual_decay": 1.5}, "residual_decay must be at most 1, got 1.5."),
        ({"island": {"ranks": 0}}, "island.ranks must be at least 1, got 0."),
        ({"log_path": "a\0b"}, 'log_path must not hold a null character, got "a\\u0000b".'),
        ({"timeout_s": float("inf")}, "timeout_s must be a finite number, got Infinity."),
        ({"min_numel": 0}, "min_numel must be at least 1, got 0."),
        ({"verify_every_steps": 0}, "verify_every_steps must be at least 1, got 0."),
        ({"log_path": ""}, 'log_path must not be empty, got "".'),
        ({"density": {"initial": 0}}, "density.initial must be at least 1e-06, got 0."),
        ({"density": {"max": 1.5}}, "density.max must be at most 1, got 1.5."),
        (
            {"performance_target": float("nan")},
            "performance_target must be a finite number, got NaN.",
        ),
        (
            point(rate_mbit=1e-320),
            "throttle.schedule[0].rate_mbit must be at least 0.001, got 1e-320.",
        ),
        (
            point(rate_mbit=1, latency_s=-1),
            "throttle.schedule[0].latency_s must be at least 0, got -1.",
        ),
        (
            point(rate_mbit=1, outage_s=-1),
            "throttle.schedule[0].outage_s must be at least 0, got -1.",
        ),
        (
            point(rate_mbit=1, outage_s=3601),
            "throttle.schedule[0].outage_s must be at most 3600, got 3601.",
        ),
    ],
)
def test_value_out_of_range_names_path_rule_and_value(block: dict[str, Any], fault: str) -> None:
    assert faults_of(block) == [fault]


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ({"enabled": 1}, "enabled must be true or false, got 1."),
        ({"enabled": "true"}, 'enabled must be true or false, got "true".'),
        ({"error_feedback": None}, "error_feedback must be true or false, got null."),
        ({"warmup_steps": "3"}, 'warmup_steps must be a whole number, got "3".'),
        ({"warmup_steps": True}, "warmup_steps must be a whole number, got true."),
        ({"warmup_steps": 3.5}, "warmup_steps must be a whole number, got 3.5."),
        ({"warmup_steps": None}, "warmup_steps must be a whole number, got null."),
        ({"warmup_steps": [3]}, "warmup_steps must be a whole number, got [3]."),
        ({"timeout_s": "60"}, 'timeout_s must be a number, got "60".'),
        (
            {"step_time_budget_s": True},
            "step_time_budget_s must be a number or null, got true.",
        ),
        ({"log_path": 5}, "log_path must be a string, got 5."),
        ({"log_path": True}, "log_path must be a string or null, got true."),
        ({"density": 0.05}, "density must be a JSON object, got 0.05."),
        ({"density": True}, "density must be a JSON object, got true."),
        ({"density": {"min": "x"}}, 'density.min must be a number, got "x".'),
        ({"throttle": "slow"}, 'throttle must be a JSON object or null, got "slow".'),
        ({"throttle": {"schedule": 20}}, "throttle.schedule must be a list, got 20."),
        ({"throttle": {"schedule": [20]}}, "throttle.schedule[0] must be a JSON object, got 20."),
        (
            {"performance_form": "mean"},
            'performance_form must be "edge" or "literal", got "mean".',
        ),
        ({"value_bits": 12}, "value_bits must be 2, 4, 16 or 32, got 12."),
        ({"value_bits": "16"}, 'value_bits must be 2, 4, 16 or 32, got "16".'),
        ({"value_bits": 8}, "value_bits must be 2, 4, 16 or 32, got 8."),
        ({"overlap": "yes"}, 'overlap must be "auto" or false, got "yes".'),
        ({"overlap": 1}, 'overlap must be "auto" or false, got 1.'),
        (
            {"exchange": "two_level"},
            'exchange must be "auto", "all_gather" or "owner_reduce", got "two_level".',
        ),
        ({"island": 2}, "island must be a JSON object, got 2."),
        ({"island": {"ranks": "host"}}, 'island.ranks must be a whole number or null, got "host".'),
    ],
)
def test_wrong_type_is_refused_not_converted(block: dict[str, Any], fault: str) -> None:
    assert faults_of(block) == [fault]


# --- unknown and missing keys ---------------------------------------------------------------------


def test_a_key_of_an_older_release_is_unknown() -> None:
    (fault,) = faults_of({"two_level": "auto"})
    assert fault.startswith("two_level is not a known key. Known keys: clip_to_median, ")


@pytest.mark.parametrize(
    ("block", "path", "known"),
    [
        ({"warmup_step": 3}, "warmup_step", "warmup_steps"),
        ({"windowsize": 3}, "windowsize", "window_size"),
        ({"density": {"maximum": 1}}, "density.maximum", "max"),
        (point(rate_mbit=1, latency=0), "throttle.schedule[0].latency", "latency_s"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(
    block: dict[str, Any], path: str, known: str
) -> None:
    assert faults_of(block) == [f'{path} is not a known key. Did you mean "{known}"?']


def test_key_like_no_other_lists_the_known_ones() -> None:
    fault = "density.ratio is not a known key. Known keys: initial, max, min."
    assert faults_of({"density": {"ratio": 0.1}}) == [fault]


def test_required_key_says_what_it_means() -> None:
    fault = (
        "throttle.schedule[0].rate_mbit must be given. Rate of each rank's link in each direction, "
        "in megabit (10^6 bit) per second."
    )
    assert faults_of(point(step=0)) == [fault]


def test_missing_block_says_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r'Add "gradient_pruning": \{\} for the defaults'):
        load_block({"train_batch_size": 8})


def test_misspelt_block_is_not_a_silent_dense_run() -> None:
    with pytest.raises(ConfigError, match='The key "gradient_prunning" is not read: did you mean'):
        load_block({"gradient_prunning": {}})


@pytest.mark.parametrize("block", [None, [], 5, "on", True])
def test_block_must_be_an_object(block: Any) -> None:
    with pytest.raises(ConfigError, match="gradient_pruning must be a JSON object, got"):
        load_block({BLOCK: block})


# --- rules between fields -------------------------------------------------------------------------


def test_initial_density_outside_its_bounds() -> None:
    fault = "density.initial must lie between density.min (0.001) and density.max (0.25), got 0.5."
    assert faults_of({"density": {"initial": 0.5}}) == [fault]


def test_minimum_density_above_the_maximum() -> None:
    fault = "density.min must be at most density.max (0.25), got 0.5."
    assert faults_of({"density": {"min": 0.5}}) == [fault]


def test_schedule_must_not_be_empty() -> None:
    fault = "throttle.schedule must have at least 1 entry, got []."
    assert faults_of({"throttle": {"schedule": []}}) == [fault]


def test_schedule_begins_at_step_zero_and_rises() -> None:
    points = [{"step": 5, "rate_mbit": 20}, {"step": 5, "rate_mbit": 5}]
    assert faults_of({"throttle": {"schedule": points}}) == [
        "throttle.schedule[0].step must be 0, got 5. Say how fast the link is at the start.",
        "throttle.schedule must have rising steps, got [5, 5].",
    ]


@pytest.mark.parametrize("total_steps", [128, 100, 17])
def test_window_larger_than_the_run_proposes_one_that_fits(total_steps: int) -> None:
    (fault,) = faults_of({}, total_steps)
    assert fault.startswith(f"window_size must be less than the run's {total_steps} steps, got 128")
    proposed = int(fault.rstrip(".").split()[-1])
    assert load({"window_size": proposed}, total_steps).window_size == proposed


def test_run_too_short_for_any_window_asks_for_more_steps() -> None:
    (fault,) = faults_of({"window_size": 4}, total_steps=4)
    assert fault.endswith("train for more steps.")


def test_window_of_all_but_one_step_is_accepted() -> None:
    assert load({"window_size": 128}, total_steps=129).window_size == 128


def test_window_does_not_matter_while_disabled() -> None:
    assert load({"enabled": False}, total_steps=8).enabled is False


# --- the two modes --------------------------------------------------------------------------------


def test_keys_of_the_islands() -> None:
    config = load({"prune": "update", "sync_every": 4, "update_scale": 1.5})
    assert (config.prune, config.sync_every, config.update_scale) == ("update", 4, 1.5)
    assert load({"prune": "update", "update_scale": "auto"}).update_scale is None
    assert load({"prune": "gradient", "island": {"ranks": 2}}).island.ranks == 2


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        (
            {"prune": "gradient", "sync_every": 4},
            'sync_every must be 1 with prune = "gradient", got 4. Leave it out, or set prune to '
            '"update".',
        ),
        (
            {"prune": "gradient", "update_scale": 2.0},
            'update_scale must be null with prune = "gradient", got 2.0. Leave it out, or set '
            'prune to "update".',
        ),
        (
            {"prune": "gradient", "slow_momentum": 1},
            'slow_momentum must be 0.0 with prune = "gradient", got 1.0. Leave it out, or set '
            'prune to "update".',
        ),
        (
            {"prune": "gradient", "warmup": "unpruned"},
            'warmup must be "auto" with prune = "gradient", got "unpruned". Leave it out, or set '
            'prune to "update".',
        ),
        (
            {"prune": "gradient", "shared_device": "cpu"},
            'shared_device must be "auto" with prune = "gradient", got "cpu". Leave it out, or set '
            'prune to "update".',
        ),
        (
            {"residual_decay": 0.9},
            'residual_decay must be 0.95 where the residual is "used", got 0.9. Leave it out, or '
            'set residual to "reset".',
        ),
        ({"slow_momentum": -1}, "slow_momentum must be at least 0, got -1."),
        (
            {"error_feedback": False},
            'error_feedback must be true with prune = "update", got false. An island keeps what it '
            'has not sent. Leave it out, or set prune to "gradient".',
        ),
        ({"prune": "updates"}, 'prune must be "gradient" or "update", got "updates".'),
        ({"sync_every": 0}, "sync_every must be at least 1, got 0."),
        ({"update_scale": 0}, "update_scale must be greater than 0, got 0."),
        (
            {"update_scale": True},
            "update_scale must be a number or null, got true.",
        ),
    ],
)
def test_keys_of_one_mode_are_refused_in_the_other(block: dict[str, Any], fault: str) -> None:
    assert faults_of(block) == [fault]


@pytest.mark.parametrize(
    ("block", "form"),
    [
        ({}, "used"),
        ({"sync_every": 4}, "reset"),
        ({"sync_every": 4, "residual": "used"}, "used"),
        ({"residual": "reset", "residual_decay": 1.0}, "reset"),
        ({"sync_every": 2, "residual": None, "residual_decay": 0.5}, "reset"),
    ],
)
def test_form_of_the_residual_follows_the_interval(block: dict[str, Any], form: str) -> None:
    assert load(block).residual_form == form


@pytest.mark.parametrize(
    ("exchange", "islands", "chosen"),
    [
        ("auto", 8, "all_gather"),
        ("auto", 9, "owner_reduce"),
        ("owner_reduce", 2, "owner_reduce"),
        ("all_gather", 64, "all_gather"),
    ],
)
def test_exchange_follows_the_number_of_islands(exchange: str, islands: int, chosen: str) -> None:
    assert load({"exchange": exchange}).exchange_of(islands) == chosen


def test_overlap_delays_nothing_where_gradients_are_pruned() -> None:
    config = load({"prune": "gradient", "overlap": "auto"})
    assert (config.overlap, config.delay_steps) == ("auto", 0)


def test_window_counts_steps_of_which_islands_tell_one_loss_per_exchange() -> None:
    block = {"prune": "update", "sync_every": 16, "warmup_steps": 8, "window_size": 128}
    assert load(block, total_steps=8 + 16 * 25).window_size == 128
    with pytest.raises(ConfigError, match="less than the run's 32 exchanges in 392 steps"):
        load(block, total_steps=8 + 16 * 24)


@pytest.mark.parametrize(
    ("window_size", "interval", "losses"),
    [
        (128, 1, 128),
        (128, 2, 64),
        (130, 4, 33),
        (128, 8, 32),
        (128, 32, 32),
        (4, 1, 4),
        (10, 5, 10),
    ],
)
def test_window_in_losses_is_never_so_short_that_noise_hides_a_rise(
    window_size: int, interval: int, losses: int
) -> None:
    assert load({"window_size": window_size}).window_losses(interval) == losses


# --- one message ----------------------------------------------------------------------------------


def test_all_faults_come_in_one_message_with_their_full_path() -> None:
    block = {
        "warmup_step": 3,
        "window_size": "big",
        "controller": "magic",
        "density": {"initial": 0.9},
        "throttle": {"schedule": [{"rate_mbit": -1}]},
    }
    with pytest.raises(ConfigError, match="5 faults in the configuration") as caught:
        load(block, total_steps=10)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split()[1] for line in lines) == [
        "gradient_pruning.controller",
        "gradient_pruning.density.initial",
        "gradient_pruning.throttle.schedule[0].rate_mbit",
        "gradient_pruning.warmup_step",
        "gradient_pruning.window_size",
    ]


def test_faulty_field_is_not_reported_twice_by_a_rule_between_fields() -> None:
    assert len(faults_of({"density": {"min": 2, "initial": 0.5, "max": 0.1}})) == 1


@pytest.mark.parametrize("name", sorted(GradientPruningConfig.model_fields))
def test_every_key_is_described_in_short_sentences(name: str) -> None:
    text = GradientPruningConfig.model_fields[name].description or ""
    assert text[:1].isupper()
    assert text.endswith(".")
    assert ";" not in text
    assert all(len(part.split()) <= 25 for part in text.split(". "))


def test_long_value_is_cut() -> None:
    (fault,) = faults_of({"warmup_steps": list(range(1000))})
    assert len(fault) < 150
    assert fault.endswith("....")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    block=st.dictionaries(
        st.sampled_from(sorted(GradientPruningConfig.model_fields)) | st.text(max_size=8),
        json_values,
        max_size=4,
    )
)
def test_any_json_is_either_loaded_or_explained(block: dict[str, Any]) -> None:
    try:
        load(block)
    except ConfigError as exc:
        unexplained = [fault for fault in exc.faults if not fault.startswith(BLOCK)]
    else:
        unexplained = []
    assert unexplained == []


def test_schedule_of_the_target() -> None:
    points = [{"step": 10, "target": 0.2}, {"step": 50, "target": 0}]
    config = load_block({"gradient_pruning": {"performance_target_schedule": points}})
    assert config.performance_target_schedule is not None
    assert [(p.step, p.target) for p in config.performance_target_schedule] == [(10, 0.2), (50, 0)]
    points.reverse()
    with pytest.raises(ConfigError, match=r"schedule must have rising steps, got \[50, 10\]"):
        load_block({"gradient_pruning": {"performance_target_schedule": points}})
    with pytest.raises(ConfigError, match="schedule must have at least 1 entry"):
        load_block({"gradient_pruning": {"performance_target_schedule": []}})


def test_senders_that_nobody_sees_cannot_be_bounded() -> None:
    (fault,) = faults_of({"clip_to_median": 2.0, "exchange": "owner_reduce"})
    assert fault.startswith('clip_to_median must be null with exchange = "owner_reduce", got 2.')
    assert load_block({BLOCK: {"clip_to_median": 2}}).clip_to_median == 2.0
