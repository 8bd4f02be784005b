"""Exchanges that travel in a thread of their own."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.train.flight import Flight
from ds_gradprune.wire.loopback import LoopbackTransport
from tests.helpers.ranks import VirtualClock, run_ranks
from tests.helpers.shards import random_shards
from tests.train.test_islands import SIGNALS, make, train

STEPS = 60


def test_a_flight_gives_back_what_its_work_returned_and_how_long_it_took() -> None:
    clock = VirtualClock(tick_s=0.0)

    def work() -> int:
        clock.sleep(3)
        return 7

    flight = Flight(work, clock.now_s)
    assert flight.land() == 7
    assert flight.done()
    assert flight.lasted_s == 3


def test_an_error_in_flight_is_raised_where_it_lands() -> None:
    def work() -> None:
        raise TransportError("the link is gone")

    flight = Flight(work, VirtualClock().now_s)
    for _ in range(2):
        with pytest.raises(TransportError, match="the link is gone"):
            flight.land()


def crcs_with_delays(every: int, delay: int, decay: float | None, seed: int) -> list[list[int]]:
    """Two islands train on while exchanges travel; every wait of the transport is held up."""
    turn = random.Random(seed)
    pause = threading.Event()

    def hold_up(_operation: str, _rank: int, _call: int) -> None:
        pause.wait(turn.random() * 2e-3)

    def main(transport: LoopbackTransport) -> list[int]:
        shards = random_shards()
        islands = make(transport, shards, decay=decay)
        clock = VirtualClock()
        under_way: Any = None
        begun = 0
        crcs: list[int] = []

        def land() -> None:
            prepared, flight = under_way
            flight.land()
            assert not prepared.deliver()
            prepared.commit()
            crcs.append(islands.weights.crc())

        for step in range(1, STEPS + 1):
            train(shards, transport.rank, step)
            if under_way is not None and step == begun + delay:
                land()
                under_way = None
            if step % every == 0:
                begun = step
                prepared = islands.prepare(200, step=step, signals=SIGNALS, hides=True)
                prepared.write()
                prepared.start()
                under_way = (prepared, Flight(prepared.wait, clock.now_s))
        if under_way is not None:
            land()
        return crcs

    return run_ranks(2, main, delay=hold_up)


@pytest.mark.parametrize(("every", "delay"), [(1, 1), (4, 1), (4, 4), (10, 2)])
@pytest.mark.parametrize("decay", [None, 0.95])
def test_shared_weights_are_equal_whatever_the_network_does(
    every: int, delay: int, decay: float | None
) -> None:
    one, other = crcs_with_delays(every, delay, decay, seed=1)
    assert one == other
    assert len(set(one)) == STEPS // every
    assert crcs_with_delays(every, delay, decay, seed=2)[0] == one


def test_what_was_learned_in_flight_stays() -> None:
    def main(transport: LoopbackTransport) -> bool:
        shards = random_shards()
        islands = make(transport, shards, decay=1.0)
        train(shards, transport.rank, 1)
        prepared = islands.prepare(200, step=1, signals=SIGNALS, hides=True)
        prepared.write()
        prepared.start()
        before = [t.clone() for t in shards.tensors.values()]
        train(shards, transport.rank, 2)
        learned = [a - b for a, b in zip(shards.tensors.values(), before, strict=True)]
        assert not prepared.deliver()
        prepared.commit()
        # Own weights begin the round as the shared ones, and keep what came since.
        flat = torch.cat([t.view(-1) for t in shards.tensors.values()])
        wanted = islands.weights.stores[0] + torch.cat([t.view(-1) for t in learned])
        return torch.allclose(flat, wanted, rtol=0.0, atol=2.0**-20)

    assert run_ranks(2, main) == [True, True]
