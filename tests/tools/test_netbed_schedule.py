"""Rates, schedules and refusals of the bed: pure."""

from __future__ import annotations

import itertools
import os
import statistics

import pytest

from ds_gradprune.errors import ConfigError, GradPruneError, MissingDependencyError
from tools.netbed import (
    Bed,
    Event,
    merge,
    outages,
    parse_rate,
    random_walk,
    requirements,
    square_wave,
    steps,
)
from tools.netbed import __main__ as command_line
from tools.netbed.rates import FRAME_BYTES, burst_bytes, piece_frames
from tools.netbed.schedule import Player, parse_schedule

# ---- rates and schedules: pure --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [
        ("20mbit", 20e6),
        ("1gbit", 1e9),
        ("512kbit", 512e3),
        ("2.5mbit", 2.5e6),
        (3e6, 3e6),
        ("none", None),
        (None, None),
    ],
)
def test_rate_is_parsed(text, rate_bps):
    assert parse_rate(text) == rate_bps


@pytest.mark.parametrize("text", ["", "fast", "20", "20 mb", "-1mbit", "0mbit", "1kbit", "1e3mbit"])
def test_bad_rate_is_refused(text):
    with pytest.raises(ConfigError, match=r"rate must be none, or a number with kbit"):
        parse_rate(text)


def test_a_pause_lends_at_most_a_millisecond_or_four_frames():
    assert burst_bytes(1e9) == 125_000
    assert burst_bytes(20e6) == 4 * FRAME_BYTES
    assert [piece_frames(rate) for rate in (20e6, 1e8, 1e9, None)] == [4, 8, 43, 43]


def test_square_wave_alternates():
    wave = list(itertools.islice(square_wave("100mbit", "20mbit", 10.0), 3))
    assert [(event.at_s, event.rate_bps) for event in wave] == [(0, 100e6), (5, 20e6), (10, 100e6)]


def test_random_walk_stays_in_its_bounds_and_repeats_with_its_seed():
    def walk(seed):
        events = itertools.islice(random_walk("5mbit", "100mbit", 2.0, seed), 500)
        return [(event.at_s, event.rate_bps) for event in events]

    rates = [rate for _, rate in walk(7)]
    assert walk(7) == walk(7) != walk(8)
    assert all(5e6 * (1 - 1e-9) <= rate <= 100e6 * (1 + 1e-9) for rate in rates)
    # A reflected walk spends equal time in equal intervals of the logarithm; the middle of 5 and
    # 100 is 22.4. 500 steps that decorrelate in about 40 leave a spread of a factor 2 at most.
    assert 11e6 < statistics.median(rates) < 45e6
    assert max(rates) > 50e6
    assert min(rates) < 10e6


def test_merge_keeps_the_order_of_time():
    events = merge(steps([(0, "20mbit"), (4, "5mbit")]), outages([(3, 2)], host=1))
    assert [(event.at_s, event.action, event.host) for event in events] == [
        (0, "rate", None),
        (3, "down", 1),
        (4, "rate", None),
        (5, "up", 1),
    ]


def test_schedule_is_parsed():
    assert list(parse_schedule("steps:0=100mbit,10=none,host=1,direction=send")) == [
        Event(0, "rate", 100e6, 1, "send"),
        Event(10, "rate", None, 1, "send"),
    ]
    assert list(parse_schedule("outage:at=30,for=2")) == outages([(30, 2)])
    wave = parse_schedule("square:high=100mbit,low=20mbit,period=10")
    assert next(iter(wave)) == Event(0, "rate", 100e6)
    walk = parse_schedule("walk:low=5mbit,high=100mbit,every=2,seed=7")
    assert next(iter(walk)) == next(random_walk("5mbit", "100mbit", 2, 7))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "steps",
        "steps:now=100mbit",
        "square:high=100mbit,low=20mbit",
        "square:high=1mbit,low=2mbit,period=1,pitch=3",
        "walk:low=5mbit,high=100mbit,every=2",
        "outage:at=3",
        "sine:period=2",
    ],
)
def test_bad_schedule_is_refused(text):
    with pytest.raises(ConfigError, match=r"--schedule must be steps:, square:, walk: or outage:"):
        parse_schedule(text)


def test_bad_values_in_a_schedule_are_refused():
    with pytest.raises(ConfigError, match=r"times must be >= 0 and in order, got \[4.0, 2.0\]"):
        parse_schedule("steps:4=1mbit,2=2mbit")
    with pytest.raises(ConfigError, match=r"period must be above 0 seconds, got 0.0"):
        parse_schedule("square:high=2mbit,low=1mbit,period=0")
    with pytest.raises(ConfigError, match=r"low must be a rate below high"):
        parse_schedule("walk:low=5mbit,high=5mbit,every=1,seed=0")
    with pytest.raises(ConfigError, match=r"rate must be none"):
        parse_schedule("steps:0=fast")


class Notebook:
    """Links that only write down what was asked of them."""

    def __init__(self, broken=False):
        self.broken = broken
        self.calls = []

    def set_rate(self, rate, host=None, direction="both"):
        if self.broken:
            raise GradPruneError("the link is broken")
        self.calls.append(("rate", rate, host, direction))

    def set_link(self, *, up, host=None):
        self.calls.append(("link", up, host))


def test_player_applies_every_event():
    links = Notebook()
    player = Player(links, merge(steps([(0, "20mbit")], 1, "send"), outages([(0.01, 0.01)])))
    player.wait(30)
    assert links.calls == [("rate", 20e6, 1, "send"), ("link", False, None), ("link", True, None)]
    assert [played.event.at_s for played in player.played] == [0, 0.01, 0.02]
    assert all(played.late_s >= 0 for played in player.played)
    assert player.played[-1].time_s - player.played[0].time_s > 0


def test_player_stops_in_an_endless_schedule():
    with Player(Notebook(), square_wave("2mbit", "1mbit", 7200.0)) as player:
        pass
    assert len(player.played) <= 1


def test_player_hands_over_what_ended_it():
    player = Player(Notebook(broken=True), steps([(0, "20mbit")]))
    with pytest.raises(GradPruneError, match="the link is broken"):
        player.wait(30)


# ---- refusals ------------------------------------------------------------------------------


def test_one_sentence_names_everything_that_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(requirements, "find_command", lambda name: None if "s" in name else name)
    with pytest.raises(
        MissingDependencyError, match=r"^The test bed needs root, unshare, .*pdsh: "
    ) as e:
        requirements.check()
    assert str(e.value).endswith(
        "start it with sudo; apt-get install openssh-client openssh-server pdsh util-linux."
    )


def test_nothing_missing_is_no_sentence(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "find_command", lambda name: name)
    assert requirements.missing() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 1}, "hosts must be 2 to 8, got 1"),
        ({"hosts": 9}, "hosts must be 2 to 8, got 9"),
        ({"slots": 0}, "slots must be 1 or more, got 0"),
        ({"rate": "fast"}, "rate must be none"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Bed(**arguments)


def test_command_line_tells_a_fault_in_one_line(capsys):
    assert command_line.main(["--rate", "fast", "--", "true"]) == 2
    assert capsys.readouterr().err.startswith("error: rate must be none")
