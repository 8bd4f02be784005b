"""Islands of which one is lost: equal bits, the scale of those that are left, nothing else lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.parcel import Parcel, opened
from ds_gradprune.train.scale import scale_at, sparse_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.carry import hand_over, receive
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.members import Members
from tests.helpers.crew_ranks import PACE, TIMEOUT_S, Hubs, on_crew
from tests.helpers.ranks import VirtualClock
from tests.helpers.shards import random_shards

pytestmark = pytest.mark.timeout(60)

STEPS, LOST, LAST = 8, 1, 4
"""Island 1 makes four steps."""


class Island:
    """Trains noise, exchanges with whoever is left, and counts.

    Attributes:
        crcs: of the shared weights after each step.
        given: what left this island in each step, (numel,) float64.
        counts: how many took part in each step.
        since: steps that others had made before its first.
    """

    since = 0

    def __init__(self, crew: CrewTransport, density: float, residual: str) -> None:
        pinned = {"initial": density, "min": density, "max": density}
        block = {"warmup_steps": 0, "ramp_steps": 0, "window_size": 4, "density": pinned}
        self.loop = Loop(GradientPruningConfig.model_validate(block), VirtualClock().now_s)
        self.crew = crew
        self.shards = random_shards()
        self.islands = Islands(
            SharedWeights(self.shards, 8192),
            AllGather(crew),
            self.loop.stopwatch,
            value_bits=4,
            scale=update_scale(3, None),
            scale_of=lambda islands: update_scale(islands, None),
            sparse_scale=sparse_scale(None, residual),  # type: ignore[arg-type]
            rule=make_rule(0.0, 1),
            kept=KeptResidual(1.0) if residual == "reset" else None,
        )
        self.learned = torch.zeros_like(self.own)
        self.crcs: list[int] = []
        self.given: list[torch.Tensor] = []
        self.counts: list[int] = []

    @property
    def own(self) -> torch.Tensor:
        return torch.cat([t.view(-1) for t in self.shards.tensors.values()]).double()

    @property
    def residual(self) -> torch.Tensor:
        left = self.own - self.islands.weights.stores[0].double()
        if self.islands.kept is not None and self.islands.kept.state_dict():
            left += self.islands.kept.state_dict()[0].double()
        return left

    def state(self) -> Parcel:
        shared = self.islands.weights.stores[0]
        return Parcel({"loop": self.loop.state_dict(), "shared": shared})

    def take(self, state: Any) -> None:
        """As one that was handed the others' state: it has learned nothing yet."""
        self.loop.take(self.loop.read(state["loop"]))
        start = 0
        for tensor in self.shards.tensors.values():
            part = state["shared"][start : start + tensor.numel()]
            tensor.copy_(part.view(tensor.shape))
            start += tensor.numel()
        self.islands.weights.capture()
        self.since = self.loop.step

    def step(self) -> None:
        before = self.own
        seed = 100 * self.loop.exchange_step + self.crew.rank
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.shards.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
        self.learned += self.own - before
        owed = self.learned - self.residual
        self._exchange()
        self.given.append(self.learned - self.residual - owed)
        self.crcs.append(self.islands.weights.crc())
        self.counts.append(self.crew.world_size)

    def _exchange(self) -> None:
        loop, islands = self.loop, self.islands
        loop.begin_exchange()
        signals, k = loop.signals(1.0), kept_per_chunk(loop.decision.density)
        header = codec.encode_signals(
            step=loop.exchange_step, rank=self.crew.rank, k=k, signals=signals
        )
        if k == 4096:
            announcement = islands.channel.announce(header)
            prepared = islands.prepare_dense([])
        else:
            prepared = islands.prepare(k, step=loop.last_exchange, signals=signals)
            announcement = islands.channel.announce(header, prepared.sizes)
            prepared.write()
        ranks = [header.signals for header in announcement.headers()]
        prepared.start()
        assert prepared.deliver() == []
        prepared.commit()
        report = loop.finish_exchange(
            ranks, wire_bytes=1, dense_bytes=2, senders=self.crew.world_size
        )
        assert report.senders == len(ranks)
        loop.end_step()


@pytest.mark.parametrize("residual", ["used", "reset"])
@pytest.mark.parametrize("density", [0.02, 0.2, 1.0])
def test_the_others_move_by_their_own_mean(density: float, residual: str) -> None:
    def work(crew: CrewTransport) -> Any:
        island = Island(crew, density, residual)
        for _ in range(LAST if crew.rank == LOST else STEPS):
            island.step()
        return island

    islands = on_crew(3, work)
    assert all(isinstance(island, Island) for island in islands), islands
    assert islands[0].counts == islands[2].counts == [3] * LAST + [2] * (STEPS - LAST)
    assert islands[0].crcs == islands[2].crcs
    assert islands[1].crcs == islands[0].crcs[:LAST]
    assert_counted(islands, density, residual)


def assert_counted(islands: list[Island], density: float, residual: str) -> None:
    """The shared weights have moved by what islands gave, and islands owe the rest."""
    moved = torch.zeros_like(islands[0].own)
    for step in range(STEPS):
        count = islands[0].counts[step]
        given = [i.given[step - i.since] for i in islands if 0 <= step - i.since < len(i.given)]
        assert len(given) == count
        scale = scale_at(
            kept_per_chunk(density) / 4096,
            count**0.5,
            sparse_scale(None, residual),  # type: ignore[arg-type]
            count,
        )
        moved += scale / count * sum(given)
    start = SharedWeights(random_shards()).stores[0].double()
    shared = islands[0].islands.weights.stores[0].double()
    # Eight exchanges round weights below 8 at most five times each: 2^-22 each.
    assert torch.allclose(shared - start, moved, rtol=0.0, atol=40 * 2.0**-22)
    for island in islands:
        total = sum(island.given) + island.residual
        assert torch.allclose(total, island.learned, rtol=0.0, atol=40 * 2.0**-22)


BACK = 6
"""The others let island 1 in before their seventh step."""


@pytest.mark.parametrize(("density", "residual"), [(0.2, "used"), (0.02, "reset")])
def test_what_one_that_comes_back_learns_counts_from_then_on(density: float, residual: str) -> None:
    store, hubs, found = dist.HashStore(), Hubs(), dict[str, Any]()  # type: ignore[attr-defined]

    def members(island: int) -> Members:
        return Members(store, island, hubs.opener(island), TIMEOUT_S, 1, PACE)

    def stays(number: int) -> Island:
        mine = members(number)
        mine.begin(range(3))
        island = Island(CrewTransport(mine), density, residual)
        for step in range(LAST if number == LOST else STEPS):
            if step == BACK:
                while not asks(island.crew):
                    time.sleep(0.01)
                assert island.crew.let_in() == LOST
                assert hand_over(island.crew, LOST, island.state)
            island.step()
        mine.close()
        return island

    def returns(number: int) -> Island:
        crew = CrewTransport(members(number))
        crew.join()
        island = Island(crew, density, residual)
        island.take(opened(*receive(crew, 2**24)))
        while island.loop.step < STEPS:
            island.step()
        return island

    def start(name: str, work: Callable[[int], Island], number: int) -> threading.Thread:
        def run() -> None:
            try:
                found[name] = work(number)
            except BaseException as exc:
                found[name] = exc

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [start(str(number), stays, number) for number in range(3)]
    threads[LOST].join()
    threads.append(start("back", returns, LOST))
    for thread in threads:
        thread.join()
    islands = [found[name] for name in ("0", "1", "2", "back")]
    assert all(isinstance(island, Island) for island in islands), islands
    first, _, second, back = islands
    assert first.counts == second.counts == [3] * LAST + [2] * (BACK - LAST) + [3] * (STEPS - BACK)
    assert first.crcs == second.crcs
    assert back.crcs == first.crcs[BACK:]
    assert_counted(islands, density, residual)


def asks(crew: CrewTransport) -> bool:
    """Whether some island sees one that asks; headers tell it in a run."""
    total = torch.tensor([float(crew.members.door.candidate is not None)])
    crew.all_reduce(total)
    return bool(total)
