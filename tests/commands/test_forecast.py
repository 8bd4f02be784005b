"""What a step takes on a link: arithmetic, and the emulated link it must agree with."""

from __future__ import annotations

import dataclasses

import pytest

from ds_gradprune.commands import forecast
from ds_gradprune.commands.diagnosis import (
    SOFTWARE_SHARE,
    TYPICAL_SHARE,
    Exchange,
    assumed,
    diagnose,
    emulated,
)
from ds_gradprune.commands.exchange_cost import measure_exchange, payload_bytes
from ds_gradprune.commands.forecast import Cost, Job, Link, Setting
from ds_gradprune.law.verdict import PAYS
from ds_gradprune.wire.throttle import RatePoint

JOB = Job(numel=1_000_000, islands=2, ranks=2, compute_s=0.2)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "accumulation", "ranks", "sent"),
    [
        (0, 1, 2, 4e6),
        (0, 8, 2, 4e6),
        (1, 1, 4, 6e6),
        (2, 1, 2, 4e6),
        (2, 4, 2, 10e6),
        (3, 1, 2, 6e6),
        (3, 2, 4, 18e6),
    ],
)
def test_dense_bytes(stage: int, accumulation: int, ranks: int, sent: float) -> None:
    job = Job(1_000_000, 2, ranks, 0.2, stage=stage, accumulation=accumulation)
    assert forecast.dense_bytes(job) == pytest.approx(sent)


def test_exchange_bytes() -> None:
    assert forecast.exchange_bytes(1000, 2) == 1080
    assert forecast.exchange_bytes(1000, 4) == 3 * 1080
    assert forecast.exchange_bytes(1000, 16, owners=True) == pytest.approx(1875 + 15 * 80)


def test_payload_is_the_codecs() -> None:
    numels, pruned = [4096 * 10, 100], [True, False]
    small, large = (payload_bytes(numels, pruned, k, 4) for k in (4, 400))
    assert 64 + 400 // 8 < small < large < 4 * sum(numels)


# --- steps ----------------------------------------------------------------------------------------


def test_dense_step() -> None:
    cost = forecast.dense_cost(JOB, Link.ideal(0.001, 2))
    assert cost.step_s(100.0) == pytest.approx(0.2 + 0.002 + 0.32)


def test_pruned_step_spreads_its_exchange() -> None:
    link = Link.ideal(0.001, 2)
    each = forecast.pruned_cost(JOB, link, 1, codec_s=0.02, wire_bytes=100_000)
    fifth = forecast.pruned_cost(JOB, link, 5, codec_s=0.02, wire_bytes=100_000)
    assert each.step_s(100.0) == pytest.approx(0.2 + 0.02 + 0.002 + 0.008)
    assert fifth.step_s(100.0) - 0.2 == pytest.approx((each.step_s(100.0) - 0.2) / 5)


def test_what_the_plug_in_does_and_the_last_host_count_in_every_step() -> None:
    """Forecasts were 9 ms a step too low: neither was in them."""
    job = dataclasses.replace(JOB, watch_s=0.003, wait_s=0.002)
    dense = [forecast.dense_cost(j, Link()).step_s(1e9) for j in (JOB, job)]
    assert dense[1] - dense[0] == pytest.approx(0.002)
    for interval, more_s in ((1, 0.005), (4, 0.003 + 0.002 / 2)):
        costs = [
            forecast.pruned_cost(j, Link(), interval, codec_s=0.0, wire_bytes=0.0)
            for j in (JOB, job)
        ]
        assert costs[1].step_s(1e9) - costs[0].step_s(1e9) == pytest.approx(more_s)


def test_hosts_wait_for_the_one_that_is_last() -> None:
    assert forecast.wait_s([[0.1, 0.1], [0.2, 0.2]]) == 0.0
    assert forecast.wait_s([[0.1, 0.3], [0.2, 0.2]]) == pytest.approx(0.05)
    # The later of two coins: 3 of 4 times the longer step.
    assert forecast.wait_s([[0.1, 0.3]] * 2) == pytest.approx(0.25 - 0.2)
    assert forecast.wait_s([[0.1, 0.3]] * 2) < forecast.wait_s([[0.1, 0.3]] * 4)


def test_break_even_is_where_both_take_as_long() -> None:
    dense, pruned = Cost(0.2, 0.0, 4e6), Cost(0.25, 0.01, 1e5)
    edge = forecast.break_even_mbit(dense, pruned)
    assert edge is not None
    assert pruned.step_s(edge) == pytest.approx(dense.step_s(edge))
    assert pruned.step_s(0.9 * edge) < dense.step_s(0.9 * edge)


def test_break_even_may_be_nowhere_or_everywhere() -> None:
    dense = Cost(0.2, 0.0, 4e6)
    assert forecast.break_even_mbit(dense, Cost(0.3, 0.0, 5e6)) == 0.0
    assert forecast.break_even_mbit(dense, Cost(0.2, 0.0, 1e6)) is None


@pytest.mark.parametrize("hidden_s", [0.0, 0.005, 0.03, 0.2])
def test_break_even_with_a_hidden_exchange(hidden_s: float) -> None:
    dense, pruned = Cost(0.2, 0.0, 4e6), Cost(0.23, 0.01, 1e6, hidden_s)
    edge = forecast.break_even_mbit(dense, pruned)
    assert edge is not None
    assert pruned.step_s(edge) == pytest.approx(dense.step_s(edge))


def test_a_hidden_exchange_costs_what_is_left_of_it() -> None:
    link = Link()
    hidden = forecast.pruned_cost(JOB, link, 4, codec_s=0.02, wire_bytes=1_250_000, delay_steps=1)
    assert hidden.step_s(1000.0) == pytest.approx(0.2 + 0.005)
    assert hidden.step_s(10.0) == pytest.approx(0.2 + (0.02 + 1.0 - 0.2) / 4)


def test_frames_take_their_share() -> None:
    assert forecast.payload_mbit(100.0) == pytest.approx(94.15, abs=0.01)


# --- advice ---------------------------------------------------------------------------------------


def test_the_densest_near_the_fastest_is_recommended() -> None:
    dense = Cost(0.2, 0.0, 4e6)
    pruned = {
        Setting(0.001): Cost(0.2, 0.0, 1e4),
        Setting(0.05): Cost(0.21, 0.0, 1e5),
        Setting(0.5): Cost(0.2, 0.0, 2e6),
    }
    assert forecast.recommend(dense, pruned, 100.0) == Setting(0.05)
    assert forecast.recommend(dense, pruned, 1.0) == Setting(0.001)


def test_a_shorter_interval_wins_among_equal_bytes() -> None:
    pruned = {Setting(0.05, 10): Cost(0.2, 0.0, 1e4), Setting(0.005, 1): Cost(0.2, 0.0, 1e4)}
    assert forecast.recommend(Cost(0.2, 0.0, 4e6), pruned, 10.0) == Setting(0.005, 1)


def test_nothing_is_recommended_where_nothing_pays() -> None:
    dense = Cost(1.0, 0.0, 1e6)
    barely = Cost(PAYS * dense.step_s(1000.0) + 0.001, 0.0, 0.0)
    assert forecast.recommend(dense, {Setting(0.01): barely}, 1000.0) is None
    assert forecast.recommend(dense, {Setting(0.01): barely}, 10.0) == Setting(0.01)


def test_diagnosis_is_about_the_measured_link() -> None:
    from ds_gradprune.commands.diagnosis import Column

    exchanges = {Setting(0.01): Exchange(0.01, 2e4)}
    fast = Column("measured", 50_000.0, Link(), is_measured=True)
    found = diagnose(JOB, [fast, *emulated([10.0], 0.0, 2)], exchanges, 0.001)
    assert [o.recommended for o in found.outlooks] == [None, Setting(0.01)]
    assert not found.pays
    assert found.block(200) == {"gradient_pruning": {"enabled": False}}


def test_json_holds_what_scripts_were_promised() -> None:
    exchanges = {Setting(0.01): Exchange(0.01, 2e4), Setting(0.05, 5): Exchange(0.02, 1e5)}
    found = diagnose(JOB, emulated([10.0, 100_000.0], 0.001, 2), exchanges, 0.001)
    document = found.as_json()
    assert {"link_mbit", "latency_ms", "dense_step_s", "break_even_mbit"} <= set(document)
    assert set(document["pruned_step_s"]) == {"1 % every step", "5 % every 5 steps"}
    assert document["recommended"] in document["pruned_step_s"]
    assert document["latency_ms"] == 1.0
    assert found.pays


def test_block_names_only_what_differs_from_the_defaults() -> None:
    exchanges = {Setting(0.05, 5): Exchange(0.01, 2e4)}
    found = diagnose(JOB, emulated([10.0], 0.0, 2), exchanges, 0.0)
    block = {"warmup_steps": 50, "sync_every": 5, "density": {"initial": 0.05}}
    assert found.block(50) == {"gradient_pruning": block}
    assert "warmup_steps" not in found.block(200)["gradient_pruning"]


def test_other_links_are_as_good_as_the_software() -> None:
    limited = Link(0.001, 0.002, gather_share=0.5, reduce_share=0.95)
    slower, faster = assumed([10.0, 10_000.0], limited, 1000.0)
    assert slower.link.gather_share == TYPICAL_SHARE
    assert faster.link.gather_share == pytest.approx(0.5 * 1000 / forecast.payload_mbit(10_000))
    assert faster.link.reduce_share == TYPICAL_SHARE
    assert limited.gather_share < SOFTWARE_SHARE < limited.reduce_share


# --- the emulated link ----------------------------------------------------------------------------


@pytest.mark.parametrize("islands", [2, 4])
def test_forecast_is_what_the_emulated_link_takes(islands: int) -> None:
    numels, pruned, k = [300 * 1000, 2000, 5000], [True, False, True], 41
    late_s, rate_mbit = 0.05, 8.0
    column = emulated([rate_mbit / forecast.FRAME_SHARE], late_s, islands)[0]
    points = [RatePoint(1, rate_mbit * 125e3, column.link.gather_call_s)]
    found = measure_exchange(
        numels, pruned, k=k, islands=islands, value_bits=4, decay=None, points=points
    )
    wire_bytes = forecast.exchange_bytes(payload_bytes(numels, pruned, k, 4), islands)
    job = Job(sum(numels), islands, islands, compute_s=0.0)
    cost = forecast.pruned_cost(job, column.link, 1, codec_s=0.0, wire_bytes=wire_bytes)
    # The announcement travels while the payload is selected: up to a call of it is hidden.
    forecast_s = cost.step_s(column.rate_mbit)
    assert forecast_s - column.link.gather_call_s - 0.001 <= found.emulated_s[0] <= forecast_s
    assert found.codec_s > 0.0


@pytest.mark.parametrize("decay", [None, 0.95])
def test_an_exchange_is_measured_with_and_without_a_buffer(decay: float | None) -> None:
    found = measure_exchange([50_000], [True], k=5, islands=3, value_bits=2, decay=decay)
    assert found.codec_s > 0.0
    assert found.emulated_s == ()
