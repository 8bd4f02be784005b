"""Exchanges that travel in a thread of their own."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.train.flight import Flight
from ds_gradprune.train.islands import Islands
from ds_gradprune.wire.loopback import LoopbackTransport
from tests.helpers.ranks import VirtualClock, run_ranks
from tests.helpers.shards import PlainShards, random_shards
from tests.train.test_islands import SIGNALS, exchange, make, train

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


def hidden(islands: Islands, shards: PlainShards, step: int, *, lands: bool = True) -> torch.Tensor:
    """An exchange that hides behind nothing; how far the own weights went ahead of it."""
    before = own_of(shards)
    prepared = islands.prepare(200, step=step, signals=SIGNALS, hides=True)
    prepared.write()
    ahead = own_of(shards) - before
    prepared.start()
    assert not prepared.deliver()
    if lands:
        prepared.commit()
    else:
        prepared.abort()
    return ahead


def own_of(shards: PlainShards) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in shards.tensors.values()])


def test_own_weights_are_where_the_landing_brings_what_all_agree_on() -> None:
    def main(transport: LoopbackTransport) -> None:
        shards = random_shards()
        islands = make(transport, shards)
        train(shards, 0, 1)  # the same on all islands
        learned = own_of(shards) - islands.weights.stores[0]
        ahead = hidden(islands, shards, 1)
        moved = islands.weights.stores[0]
        is_sent = ahead != 0.0
        assert 0.04 < is_sent.float().mean() < 0.9
        # Sums of weights below 4, so that a rounding is at most 2 ** -22.
        atol = 4 * 2.0**-22
        torch.testing.assert_close(
            ahead[is_sent], (3**0.5 - 1) * learned[is_sent], rtol=0.0, atol=atol
        )
        torch.testing.assert_close(own_of(shards)[is_sent], moved[is_sent], rtol=0.0, atol=atol)

    run_ranks(3, main)


@pytest.mark.parametrize("decay", [None, 0.95])
def test_an_exchange_lands_as_one_that_was_waited_for(decay: float | None) -> None:
    def run(hides: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        def main(transport: LoopbackTransport) -> tuple[torch.Tensor, torch.Tensor]:
            shards = random_shards()
            islands = make(transport, shards, decay=decay)
            for step in range(1, 6):
                train(shards, transport.rank, step)
                if hides:
                    hidden(islands, shards, step)
                else:
                    exchange(islands, step)
            return own_of(shards), islands.weights.stores[0].clone()

        return run_ranks(2, main)

    for (own, shared), (own_waited, shared_waited) in zip(run(True), run(False), strict=True):
        # Ahead and back: two roundings of weights below 4 at each of five exchanges.
        torch.testing.assert_close(own, own_waited, rtol=0.0, atol=10 * 2.0**-22)
        torch.testing.assert_close(shared, shared_waited, rtol=0.0, atol=10 * 2.0**-22)


def test_an_exchange_that_fails_takes_back_what_went_ahead() -> None:
    def main(transport: LoopbackTransport) -> None:
        shards = random_shards()
        islands = make(transport, shards)
        train(shards, transport.rank, 1)
        before, shared = own_of(shards), islands.weights.stores[0].clone()
        ahead = hidden(islands, shards, 1, lands=False)
        assert ahead.abs().max() > 1e-3
        torch.testing.assert_close(own_of(shards), before, rtol=0.0, atol=2.0**-21)
        assert torch.equal(islands.weights.stores[0], shared)

    run_ranks(2, main)


def test_nothing_goes_ahead_of_a_mean() -> None:
    def main(transport: LoopbackTransport) -> None:
        shards = random_shards()
        islands = make(transport, shards)
        train(shards, transport.rank, 1)
        before = own_of(shards)
        prepared = islands.prepare(4096, step=1, signals=SIGNALS, hides=True, unscaled=True)
        prepared.write()
        assert torch.equal(own_of(shards), before)
        prepared.start()
        assert not prepared.deliver()
        prepared.commit()

    run_ranks(2, main)
