"""Islands that leave and come back: equal bits among those that are there, and no progress lost.

Longer than 300 lines: an island that trains and counts stands beside what is asked of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import TransportError, UnsupportedError
from ds_gradprune.train.catch_up import catch_up
from ds_gradprune.train.islands import Islands, Prepared
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.members import Epoch, LeftOut, Members
from ds_gradprune.wire.owner_reduce import OwnerReduce
from ds_gradprune.wire.transport import Transport, Work
from tests.helpers.ranks import VirtualClock
from tests.helpers.shards import random_shards

pytestmark = pytest.mark.timeout(60)

TIMEOUT_S, ANSWER_S = 0.3, 1.0
EVERY = 3
"""Islands are let in after every so many steps."""


class Hubs:
    """A loopback for every epoch."""

    def __init__(self, wrap: Callable[[Transport, int, int], Transport] | None = None) -> None:
        self._hubs: dict[int, LoopbackHub] = {}
        self._lock = threading.Lock()
        self._wrap = wrap

    def opener(self, island: int) -> Callable[[Epoch], Transport]:
        def opens(epoch: Epoch) -> Transport:
            with self._lock:
                hub = self._hubs.setdefault(
                    epoch.number, LoopbackHub(len(epoch.islands), TIMEOUT_S)
                )
            transport: Transport = hub.transport(epoch.islands.index(island))
            return transport if self._wrap is None else self._wrap(transport, island, epoch.number)

        return opens


class LastWords(Transport):
    """Island 1 finds its exchange broken though all others have got everything.

    That is what it looks like when a peer dies while its bytes are on their way.
    """

    def __init__(self, inner: Transport, step: int) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner = inner
        self._calls_left = 2 * step  # an announcement and a message per step

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        work = self._inner.start_all_gather(payload, out)
        self._calls_left -= 1
        if not self._calls_left:
            work.wait()
            raise TransportError("a peer has closed the connection")
        return work

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        return self._inner.start_all_to_all(send, out)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        return self._inner.start_all_reduce(tensor)

    def close(self) -> None:
        self._inner.close()


class Island:
    """Trains noise, exchanges with whoever is there, and counts what the weights should be.

    Attributes:
        crcs: step -> hash of the shared weights after it.
        moved: what all exchanges that this island was told of should have moved them by.
    """

    def __init__(self, members: Members, store: Any, slow: float, residual: str) -> None:
        self.store = store
        block = {"warmup": "unpruned", "warmup_steps": 0, "ramp_steps": 0, "window_size": 4}
        pinned = {"initial": 0.05, "min": 0.05, "max": 0.05}
        given = block | {"density": pinned, "residual": residual, "residual_decay": 1.0}
        config = GradientPruningConfig.model_validate(given)
        self.members = members
        self.loop = Loop(config, VirtualClock().now_s)
        self.shards = random_shards()
        assert members.transport is not None
        self.islands = Islands(
            SharedWeights(self.shards, 8192),
            AllGather(members.transport),
            self.loop.stopwatch,
            value_bits=4,
            scale=update_scale(members.transport.world_size, None),
            rule=make_rule(slow, 1),
            kept=KeptResidual(1.0) if residual == "reset" else None,
        )
        self.learned = torch.zeros(self.numel, dtype=torch.float64)
        self.crcs: dict[int, int] = {}
        self.given: dict[int, torch.Tensor] = {}
        self.factors: dict[int, float] = {}

    @property
    def numel(self) -> int:
        return sum(t.numel() for t in self.shards.tensors.values())

    @property
    def own(self) -> torch.Tensor:
        return torch.cat([t.view(-1) for t in self.shards.tensors.values()]).double()

    @property
    def residual(self) -> torch.Tensor:
        """(numel,) float64: learned, and not given."""
        left = self.own - self.islands.weights.stores[0].double()
        if self.islands.kept is not None and self.islands.kept.state_dict():
            left += self.islands.kept.state_dict()[0].double()
        return left

    def learn(self) -> None:
        before, seed = self.own, 100 * self.loop.exchange_step + self.members.island
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.shards.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
        self.learned += self.own - before

    def exchange(self) -> None:
        """Until it is done with whoever is there."""
        while True:
            prepared: Prepared | None = None
            try:
                prepared = self._try()
                return
            except TransportError as exc:
                failed = getattr(exc, "prepared", prepared)
                epoch = self.members.regroup(self.loop.step)
                self.join(epoch, failed)
                if self.loop.step >= self.step_wanted:
                    return  # the others had applied it, with what this island gave

    def _try(self) -> Prepared:
        loop, islands = self.loop, self.islands
        self.step_wanted = loop.exchange_step
        loop.begin_exchange()
        signals = loop.signals(1.0)
        k = kept_per_chunk(loop.decision.density)
        prepared = islands.prepare(k, step=loop.last_exchange, signals=signals)
        try:
            header = codec.encode_signals(
                step=loop.exchange_step, rank=islands.channel.rank, k=k, signals=signals
            )
            announcement = islands.channel.announce(header, prepared.sizes)
            prepared.write()
            ranks = [header.signals for header in announcement.headers()]
            prepared.start()
            assert prepared.deliver() == []
        except TransportError as exc:
            exc.prepared = prepared  # type: ignore[attr-defined]
            raise
        prepared.commit()
        self.factors[loop.exchange_step] = islands.factor
        loop.finish_exchange(ranks, wire_bytes=1, dense_bytes=2)
        loop.end_step()
        self.crcs[loop.step] = islands.weights.crc()
        return prepared

    def join(self, epoch: Epoch, failed: Prepared | None = None) -> None:
        assert self.members.transport is not None
        scale = update_scale(len(epoch.islands), None)
        catch_up(self.islands, self.loop, self.members.transport, epoch, scale, failed)
        self.crcs[self.loop.step] = self.islands.weights.crc()

    def run(self, last: int, away: tuple[int, int] = (-1, 0)) -> None:
        """Train to the last step.

        Args:
            last: that step.
            away: an island that is not there at a step. The others take no step after the sixth
                before it has asked in.
        """
        absent = away[0]
        while self.loop.step < last:
            step = self.loop.exchange_step
            assert self.members.epoch is not None
            if step == 6 and absent >= 0 and absent not in self.members.epoch.islands:
                self.store.wait([f"wish/{absent}"])
            if away == (self.members.island, step):
                away = (-1, 0)
                self.come_back()
                continue
            self.learn()
            if step % EVERY == 0:
                self.members.plan(step)
            before = self.learned - self.residual
            self.exchange()
            self.given[step] = self.learned - self.residual - before
            if step % EVERY == 0 and (wishes := self.members.invited(step)):
                self.join(self.members.regroup(self.loop.step, wishes))

    def come_back(self) -> None:
        """It was away: learns on alone, finds itself left out, and asks in."""
        self.learn()
        self.store.wait(["1/members"])
        with pytest.raises(LeftOut, match="go on without island"):
            self.members.regroup(self.loop.step)
        self.join(self.members.ask_in(20.0))


def on_islands(
    count: int,
    work: Callable[[Island], Any],
    wrap: Callable[[Transport, int, int], Transport] | None = None,
    **options: Any,
) -> list[Any]:
    store, hubs = dist.HashStore(), Hubs(wrap)  # type: ignore[attr-defined]
    results: list[Any] = [None] * count

    def main(number: int) -> None:
        members = Members(store, number, hubs.opener(number), ANSWER_S)
        try:
            members.begin(range(count))
            island = Island(members, store, **options)
            work(island)
            results[number] = island
        except BaseException as exc:
            results[number] = exc

    threads = [threading.Thread(target=main, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, AssertionError):
            raise result
    return results


def assert_conserved(islands: list[Island], start: torch.Tensor) -> None:
    """The shared weights moved by what was given, each exchange with the factor of its epoch."""
    moved = torch.zeros_like(start)
    for island in islands:
        for step, given in island.given.items():
            factors = [i.factors[step] for i in islands if step in i.factors]
            moved += factors[0] * given if factors else 0.0
    shared = islands[0].islands.weights.stores[0].double()
    # At most 14 exchanges round weights below 8 five times: 2^-22 each.
    assert torch.allclose(shared - start, moved, rtol=0.0, atol=70 * 2.0**-22)
    for island in islands:
        total = sum(island.given.values()) + island.residual
        assert torch.allclose(total, island.learned, rtol=0.0, atol=70 * 2.0**-22)


FORMS = [("used", 0.0), ("reset", 0.0)]


@pytest.mark.parametrize(("residual", "slow"), FORMS)
def test_an_island_that_is_away_is_left_out_and_its_progress_counts_when_it_is_back(
    residual: str, slow: float
) -> None:
    islands = on_islands(3, lambda i: i.run(12, away=(2, 4)), residual=residual, slow=slow)
    assert all(isinstance(island, Island) for island in islands), islands
    start = SharedWeights(random_shards()).stores[0].double()
    for step in range(1, 13):
        assert len({i.crcs[step] for i in islands if step in i.crcs}) == 1, step
    assert 5 not in islands[2].crcs  # it was away
    assert islands[2].crcs[12] == islands[0].crcs[12]
    assert [len(i.members.epoch.islands) for i in islands] == [3, 3, 3]
    assert islands[0].members.epoch.number == 2
    assert_conserved(islands, start)


def test_slow_momentum_is_taken_over_with_the_weights() -> None:
    # The first one is away, from which others would take over.
    islands = on_islands(3, lambda i: i.run(9, away=(0, 3)), residual="used", slow=0.5)
    assert all(isinstance(island, Island) for island in islands), islands
    assert len({i.crcs[9] for i in islands}) == 1


@pytest.mark.parametrize(("residual", "slow"), FORMS)
def test_an_exchange_that_some_could_apply_counts_once(residual: str, slow: float) -> None:
    """Island 1 sees its peer's connection break after its own payload has reached all."""

    def wrap(transport: Transport, island: int, epoch: int) -> Transport:
        return LastWords(transport, step=4) if (island, epoch) == (1, 0) else transport

    islands = on_islands(3, lambda island: island.run(8), wrap, residual=residual, slow=slow)
    assert all(isinstance(island, Island) for island in islands), islands
    start = SharedWeights(random_shards()).stores[0].double()
    for step in range(1, 9):
        assert len({i.crcs[step] for i in islands if step in i.crcs}) == 1, step
    assert islands[0].members.epoch.number == 1
    assert_conserved(islands, start)


def test_below_the_least_number_the_run_ends_typed() -> None:
    store, hubs = dist.HashStore(), Hubs()  # type: ignore[attr-defined]
    members = Members(store, 0, hubs.opener(0), 0.1, least=2)
    members.begin([0, 1])
    with pytest.raises(TransportError, match=r"min_islands 2 must answer within 0\.1 s"):
        members.regroup(3)


def test_nobody_lets_an_island_in_where_nobody_is_left() -> None:
    store, hubs = dist.HashStore(), Hubs()  # type: ignore[attr-defined]
    members = Members(store, 5, hubs.opener(5), 0.1)
    with pytest.raises(TransportError, match=r"island 5 must be let in within 0\.2 s"):
        members.ask_in(0.2)


def test_islands_that_exchange_by_owners_stay_together() -> None:
    hub = LoopbackHub(1)
    channel = OwnerReduce(hub.transport(0))
    shards = random_shards()
    clock = VirtualClock().now_s
    loop = Loop(GradientPruningConfig(), clock)
    weights = SharedWeights(shards)
    islands = Islands(
        weights, channel, loop.stopwatch, value_bits=4, scale=1.0, rule=make_rule(0.0, 1)
    )
    with pytest.raises(UnsupportedError, match="exchange with all_gather"):
        catch_up(islands, loop, hub.transport(0), Epoch(1, (0,), {0: 1}), 1.0)
