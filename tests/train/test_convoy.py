"""Messages that leave one after the other in a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.train.convoy import Convoy
from ds_gradprune.train.gradients import GradientPruning
from ds_gradprune.train.load import Load, Sent
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Pending
from ds_gradprune.wire.loopback import LoopbackTransport
from tests.helpers.ranks import VirtualClock, run_ranks
from tests.train.test_gradients import FIRST, SIGNALS, gradient, make


class Told(Pending):
    """A pending exchange that writes down what is asked of it."""

    def __init__(self, name: str, told: list[str], fails: bool = False) -> None:
        self._name, self._told, self._fails = name, told, fails

    def proceed(self) -> None:
        self._told.append(f"proceed {self._name}")

    def wait(self) -> None:
        if self._fails:
            raise TransportError("the link is gone")
        self._told.append(f"wait {self._name}")

    def num_senders(self, bucket: int) -> int:
        raise NotImplementedError

    def done(self) -> bool:
        return f"wait {self._name}" in self._told

    def payloads(self, bucket: int) -> list[torch.Tensor]:
        raise NotImplementedError

    def sent(self, bucket: int) -> list[torch.Tensor]:
        raise NotImplementedError

    def finish(self, *, applied: bool) -> None:
        raise NotImplementedError


def convoy() -> Convoy:
    clock = VirtualClock()
    return Convoy(Stopwatch(clock.now_s), clock.now_s)


def test_collectives_follow_from_the_order_of_the_departures() -> None:
    told: list[str] = []

    def departure(name: str) -> Callable[[], Pending]:
        def depart() -> Pending:
            told.append(f"start {name}")
            return Told(name, told)

        return depart

    under_way = convoy()
    for name in "abc":
        under_way.add(departure(name))
    under_way.close(lambda: told.append("last word"))
    under_way.land()
    assert told == [
        *("start a", "start b", "proceed a", "start c", "proceed b", "last word", "proceed c"),
        *("wait a", "wait b", "wait c"),
    ]


def test_a_round_without_departures_lands() -> None:
    told: list[str] = []
    under_way = convoy()
    under_way.close(lambda: told.append("last word"))
    under_way.land()
    assert told == ["last word"]
    assert under_way.busy_s() == 0.0


@pytest.mark.parametrize("fails_at_start", [True, False])
def test_what_goes_wrong_in_the_thread_is_raised_where_it_lands(fails_at_start: bool) -> None:
    def depart() -> Pending:
        if fails_at_start:
            raise TransportError("the link is gone")
        return Told("a", [], fails=True)

    under_way = convoy()
    under_way.add(depart)
    under_way.close()
    with pytest.raises(TransportError, match="the link is gone"):
        under_way.land()


def test_what_travels_during_the_computation_counts_as_hidden() -> None:
    clock = VirtualClock(tick_s=0.0)
    stopwatch = Stopwatch(clock.now_s)
    stopwatch.start()
    travels, computed = threading.Event(), threading.Event()

    class Slow(Told):
        def proceed(self) -> None:  # it has begun, and its begin was noted
            travels.set()

        def wait(self) -> None:
            computed.wait()
            super().wait()

    under_way = Convoy(stopwatch, clock.now_s)
    under_way.add(lambda: Slow("a", []))
    under_way.close()
    travels.wait()
    clock.sleep(5.0)
    computed.set()
    under_way.land()
    times, _ = stopwatch.lap()
    assert under_way.busy_s() == 5.0
    assert (times.compute_s, times.wire_s, times.hidden_s) == (5.0, 0.0, 5.0)


@pytest.mark.parametrize(("owners", "clip"), [(False, None), (False, 0.5), (True, None)])
def test_buckets_that_leave_one_by_one_give_the_bits_of_one_message(
    owners: bool, clip: float | None
) -> None:
    """In whatever order they leave."""

    def work(transport: LoopbackTransport) -> list[Any]:
        pruning: GradientPruning = make(transport, value_bits=4, owners=owners)
        pruning._clip = clip
        found = []
        for step in range(1, 5):
            vector = gradient(transport.rank, step, 0)
            pruning.begin()
            if step % 2:
                pruning.reduce(vector, FIRST, 100, step=step, signals=SIGNALS)
            else:
                pruning.land(vector, FIRST, one_by_one(pruning, vector, step))
            pruning.commit(applied=True)
            found += [vector.tolist(), pruning.residuals.norm()]
        return found

    def together(transport: LoopbackTransport) -> list[Any]:
        pruning: GradientPruning = make(transport, value_bits=4, owners=owners)
        pruning._clip = clip
        found = []
        for step in range(1, 5):
            vector = gradient(transport.rank, step, 0)
            pruning.begin()
            pruning.reduce(vector, FIRST, 100, step=step, signals=SIGNALS)
            pruning.commit(applied=True)
            found += [vector.tolist(), pruning.residuals.norm()]
        return found

    assert run_ranks(2, work) == run_ranks(2, together)


def one_by_one(pruning: GradientPruning, vector: torch.Tensor, step: int) -> list[Load]:
    """The buckets of a vector, the last one first."""
    under_way, loads = convoy(), []

    def depart(load: Load) -> Pending:
        load.write()
        return load.start()

    buckets = pruning.buckets(FIRST)
    assert len(buckets) == 2
    for place, number in enumerate(reversed(range(len(buckets)))):
        here = vector[buckets[number].start : buckets[number].stop].clone()
        what = Sent(100, step, SIGNALS)
        load = pruning.load(here, FIRST, what, only=(number, 0), place=place)
        loads.append(load)
        under_way.add(lambda load=load: depart(load))  # type: ignore[misc]
    under_way.close()
    under_way.land()
    return loads


def test_messages_that_are_given_up_touch_no_residual() -> None:
    def work(transport: LoopbackTransport) -> bool:
        pruning: GradientPruning = make(transport, owners=True)
        pruning.begin()
        pruning.reduce(gradient(transport.rank, 1, 0), FIRST, 100, step=1, signals=SIGNALS)
        pruning.commit(applied=True)
        before = str(pruning.residuals.state_dict()), str(pruning.channel.state_dict())
        vector = gradient(transport.rank, 2, 0)
        pruning.begin()
        pruning.give_up(one_by_one(pruning, vector, 2))
        after = str(pruning.residuals.state_dict()), str(pruning.channel.state_dict())
        pruning.begin()
        pruning.reduce(vector, FIRST, 100, step=2, signals=SIGNALS)
        return before == after

    assert run_ranks(2, work) == [True, True]
