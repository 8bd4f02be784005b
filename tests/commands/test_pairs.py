"""Links between agents: here two on one host, over its loopback."""

from __future__ import annotations

import os

import pytest

from ds_gradprune.commands import pairs
from ds_gradprune.commands.hostfile import HostLine
from ds_gradprune.commands.hosts import Hosts
from ds_gradprune.errors import TransportError

TWO = [HostLine("localhost"), HostLine("127.0.0.1")]


def test_latency_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SECONDS", 0.05)
    told: list[str] = []
    with Hosts(TWO, os.environ) as hosts:
        (pair,) = pairs.measure(hosts, told.append)
    assert (pair.here, pair.there) == ("localhost", "127.0.0.1")
    assert 0.0 < pair.latency_s < 1.0
    assert min(pair.to_mbit, pair.from_mbit, pair.many_mbit, pair.both_mbit) > 1.0
    assert told == ["link localhost - 127.0.0.1, about 0 s"]


def test_a_host_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SECONDS", 0.05)
    with Hosts(TWO, os.environ) as hosts:
        port = hosts.agents[1].ask("free_port")
        with pytest.raises(TransportError, match=r"localhost: .*refused"):
            pairs._run(hosts.agents[0], hosts.agents[1], ("127.0.0.1", port))


@pytest.mark.slow
@pytest.mark.distributed
def test_collectives_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "LARGE_S", 0.01)
    environ = {name: value for name, value in os.environ.items() if "GLOO" not in name}
    with Hosts(TWO, environ) as hosts:
        link = pairs.collectives(hosts, 100.0)
    assert link.gather_call_s > 0.0
    assert link.reduce_call_s > 0.0
    assert min(link.gather_share, link.reduce_share) > 0.0
