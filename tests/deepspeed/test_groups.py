"""Which ranks form an island, from what their launcher says."""

from __future__ import annotations

import json

import pytest

from ds_gradprune.errors import UnsupportedError

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("default")

from ds_gradprune.deepspeed import seats as launched  # noqa: E402
from ds_gradprune.deepspeed.crowd import crowd  # noqa: E402
from ds_gradprune.deepspeed.seats import Seat, ranks_per_island  # noqa: E402


def seats(*hosts: int, told: int | None = None) -> list[Seat]:
    """Hosts a, b, c, ... with so many ranks each."""
    return [
        Seat(local_rank, told or count, "abc"[number])
        for number, count in enumerate(hosts)
        for local_rank in range(count)
    ]


def test_a_host_is_an_island() -> None:
    assert ranks_per_island(seats(2, 2), None) == 2
    assert ranks_per_island(seats(1, 1, 1), None) == 1


def test_on_a_single_host_every_rank_is_an_island() -> None:
    assert ranks_per_island(seats(4), None) == 1
    assert ranks_per_island(seats(4), 4) == 4


def test_hosts_of_one_name_are_two_hosts() -> None:
    assert ranks_per_island([Seat(0, None, "a"), Seat(0, None, "a")], None) == 1


def test_given_ranks_win_over_hosts() -> None:
    assert ranks_per_island(seats(3, 1), 2) == 2
    scattered = [Seat(0, 2, "a"), Seat(0, 2, "b"), Seat(1, 2, "a"), Seat(1, 2, "b")]
    assert ranks_per_island(scattered, 1) == 1


def test_islands_that_share_a_hosts_link_are_warned_of() -> None:
    """Two ranks of each host crossed the network, and not one word said so."""
    assert crowd(seats(2, 2), 2) is None
    assert crowd(seats(4), 1) is None
    assert crowd(seats(1, 1), 1) is None
    text = crowd(seats(2, 2), 1)
    assert text is not None
    assert text.startswith("the 2 ranks of a host form 2 islands, and each sends its own exchange")
    assert "3 islands" in (crowd(seats(3, 3), 1) or "")


def test_given_ranks_must_divide_all() -> None:
    with pytest.raises(UnsupportedError, match=r"island\.ranks must divide .* got 3 for 4 ranks"):
        ranks_per_island(seats(4), 3)


def test_unequal_hosts_are_listed() -> None:
    with pytest.raises(UnsupportedError, match=r"got a \(2 ranks\), b \(1 rank\)\. Start equally"):
        ranks_per_island(seats(2, 1), None)


def test_scattered_ranks_are_refused() -> None:
    scattered = [Seat(0, 2, "a"), Seat(0, 2, "b"), Seat(1, 2, "a"), Seat(1, 2, "b")]
    with pytest.raises(UnsupportedError, match="rank 3 on b has local rank 1"):
        ranks_per_island(scattered, None)
    with pytest.raises(UnsupportedError, match="rank 0 on a has local rank 1"):
        ranks_per_island([Seat(1, 2, "a"), Seat(0, 2, "a")], None)


def test_the_launchers_count_must_fit() -> None:
    with pytest.raises(UnsupportedError, match="says that a has 4 ranks, but local ranks say a"):
        ranks_per_island(seats(2, 2, told=4), None)


@pytest.mark.parametrize("name", launched._LOCAL_SIZES)
def test_every_launchers_count_is_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in launched._LOCAL_SIZES:
        monkeypatch.delenv(other, raising=False)
    for other in launched._LOCAL_RANKS:
        monkeypatch.delenv(other, raising=False)
    with pytest.raises(UnsupportedError, match="must hold LOCAL_RANK"):
        Seat.here()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Seat.here().local_size is None
    monkeypatch.setenv(name, "8")
    assert (Seat.here().local_rank, Seat.here().local_size) == (1, 8)
    for wrong in ("", "x", "-1", "9" * 5000):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(UnsupportedError, match=f"{name} must be a whole number, got "):
            Seat.here()


def test_any_hosts_name_has_room() -> None:
    text = json.dumps([10**6, 10**6, "\u00e9" * launched._HOST_CHARS])
    assert len(text) <= launched._SEAT_BYTES
