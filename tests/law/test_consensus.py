"""All ranks' signals as one record: stragglers told from the wire, and nothing half known."""

import itertools
import math

import pytest

from ds_gradprune.law.consensus import aggregate
from ds_gradprune.law.signals import RankSignals


def rank(**fields):
    base = {
        "loss": 2.0,
        "nonfinite": False,
        "compute_time_s": 0.5,
        "codec_time_s": 0.02,
        "comm_time_s": 0.1,
        "wire_bytes": 1000,
        "agreement": 7,
    }
    return RankSignals(**(base | fields))


def test_waiting_for_a_straggler_is_not_the_wire() -> None:
    # The second is ready 0.4 s later; the first waits for it, and its exchange lasts as long.
    early, late = rank(comm_time_s=0.5), rank(compute_time_s=0.9, comm_time_s=0.1)
    both = aggregate(3, [early, late], 0.05, 9000)
    assert both.comm_time_s == pytest.approx(0.1, rel=1e-9)
    assert both.skew_time_s == pytest.approx(0.4, rel=1e-9)
    assert both.step_time_s == pytest.approx(1.02, rel=1e-9)
    assert both.compute_time_s == 0.9


def test_what_hid_everywhere_is_no_part_of_the_step() -> None:
    both = aggregate(3, [rank(hidden_time_s=0.08), rank(hidden_time_s=0.06)], 0.05, 9000)
    assert both.comm_time_s == pytest.approx(0.1, rel=1e-9)
    assert both.hidden_time_s == 0.06
    assert both.step_time_s == pytest.approx(0.56, rel=1e-9)


def test_slowest_host_governs() -> None:
    # All are ready together; the second one's link is slow, and it alone is done late.
    both = aggregate(3, [rank(comm_time_s=0.1), rank(comm_time_s=0.4)], 0.05, 9000)
    assert both.comm_time_s == pytest.approx(0.4, rel=1e-9)
    assert both.skew_time_s == 0.0


def test_last_to_arrive_may_find_everything_there() -> None:
    # What the others sent waits in its buffers: its own exchange is short, theirs tell the truth.
    early, late = rank(comm_time_s=0.5), rank(compute_time_s=0.8, comm_time_s=0.05)
    both = aggregate(3, [early, late], 0.05, 9000)
    assert both.comm_time_s == pytest.approx(0.2, rel=1e-9)


def test_what_one_rank_lacks_counts_as_unknown_on_all() -> None:
    whole = aggregate(3, [rank(), rank()], 0.05, 9000)
    assert (whole.timed_density, whole.loss, whole.dense_bytes) == (0.05, 2.0, 9000)
    no_times = aggregate(3, [rank(), rank(compute_time_s=None)], 0.05, 9000)
    assert no_times.timed_density is None
    assert no_times.compute_time_s is None
    assert no_times.step_time_s is None
    assert no_times.skew_time_s is None
    assert no_times.dense_bytes == 0
    assert aggregate(3, [rank(), rank(loss=None)], 0.05, 9000).loss is None
    bad = aggregate(3, [rank(), rank(loss=math.nan)], 0.05, 9000)
    assert bad.loss is None
    assert bad.nonfinite
    assert aggregate(3, [rank(), rank(nonfinite=True)], 0.05, 9000).nonfinite


def test_first_step_has_no_times() -> None:
    first = aggregate(1, [rank(), rank()], None, 0)
    assert first.timed_density is None
    assert first.step_time_s is None


def test_order_of_ranks_changes_nothing() -> None:
    # `sum` would round 0.1 + 0.2 + 0.3 by the order, and by the version of Python.
    ranks = [rank(loss=0.1 + 0.1 * i, compute_time_s=0.5 + 0.1 * i) for i in range(3)]
    records = [aggregate(3, list(order), 0.05, 9000) for order in itertools.permutations(ranks)]
    assert all(record == records[0] for record in records)


def test_mean_of_the_largest_losses_is_finite() -> None:
    assert aggregate(3, [rank(loss=1.7e308)] * 4, 0.05, 9000).loss == 1.7e308


def test_what_travels_behind_the_computation_does_not_lengthen_the_step() -> None:
    exposed = aggregate(3, [rank(compute_time_s=1.0, comm_time_s=0.6)] * 2, 0.05, 9000)
    hidden = aggregate(3, [rank(compute_time_s=1.0, comm_time_s=0.6)] * 2, 0.05, 9000, 0.5)
    assert exposed.step_time_s is not None
    assert hidden.step_time_s == pytest.approx(exposed.step_time_s - 0.5)
    assert hidden.comm_time_s == exposed.comm_time_s
