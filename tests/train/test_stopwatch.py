"""The parts of an interval sum to the wall clock."""

from __future__ import annotations

from ds_gradprune.train.stopwatch import Stopwatch, Times
from tests.helpers.ranks import VirtualClock


def test_parts_sum_to_the_wall_clock_whatever_happens_between() -> None:
    clock = VirtualClock(tick_s=0.0)
    watch = Stopwatch(clock.now_s)
    watch.start()
    clock.sleep(3)  # forward
    with watch.phase("codec"):
        clock.sleep(1)
        with watch.phase("wire"):
            clock.sleep(5)
        clock.sleep(2)
    clock.sleep(4)  # what the framework does between our hooks
    times, is_whole = watch.lap()
    assert (times.compute_s, times.codec_s, times.wire_s) == (7, 3, 5)
    assert times.wall_s == 15
    assert is_whole


def test_pauses_between_steps_do_not_count() -> None:
    clock = VirtualClock(tick_s=0.0)
    watch = Stopwatch(clock.now_s)
    for _ in range(3):
        watch.start()
        watch.start()
        clock.sleep(1)
        watch.pause()
        clock.sleep(100)
    watch.start()
    clock.sleep(1)
    assert watch.lap() == (Times(compute_s=4), True)


def test_an_exchange_whose_step_was_not_seen_has_its_own_time_only() -> None:
    clock = VirtualClock(tick_s=0.0)
    watch = Stopwatch(clock.now_s)
    with watch.phase("wire"):
        clock.sleep(5)
    times, is_whole = watch.lap()
    assert times.wire_s == 5
    assert not is_whole


def test_an_interval_goes_on_from_its_state() -> None:
    clock = VirtualClock(tick_s=0.0)
    watch = Stopwatch(clock.now_s)
    watch.start()
    clock.sleep(2)
    watch.pause()
    again = Stopwatch(clock.now_s)
    again.load_state_dict(watch.state_dict())
    again.start()
    clock.sleep(3)
    assert again.lap()[0].compute_s == 5


def test_hidden_time_is_told_and_not_added() -> None:
    clock = VirtualClock(tick_s=0.0)
    watch = Stopwatch(clock.now_s)
    watch.start()
    watch.add_hidden(9.0)
    clock.sleep(1)
    times, _ = watch.lap()
    assert (times.wall_s, times.hidden_s) == (1, 9)
