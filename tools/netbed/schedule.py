"""What happens to the links and when: steps, waves, walks, outages, and the thread that plays them.

A schedule is an iterable of events in order of time, finite or not. Times count from `play`.
"""

from __future__ import annotations

import heapq
import math
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ds_gradprune.errors import ConfigError
from tools.netbed.host import Direction
from tools.netbed.rates import parse_rate

WALK_STEP = math.log(2) / 2
"""Standard deviation of one step of the random walk, in the logarithm of the rate: a factor of
1.41 up or down is as likely as not to be exceeded in one of three steps."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change of the links.

    Attributes:
        at_s: when, seconds after the start; >= 0.
        action: "rate", "down" (the cable is pulled) or "up".
        rate_bps: of "rate": bits per second; None: unshaped.
        host: index of the host; None: all.
        direction: of "rate": "send", "receive" or "both".
    """

    at_s: float
    action: str
    rate_bps: float | None = None
    host: int | None = None
    direction: Direction = "both"


@dataclass(frozen=True, slots=True)
class Played:
    """An event that has happened.

    Attributes:
        time_s: seconds since the epoch when the change was in force.
        late_s: how much later than planned that was.
    """

    event: Event
    time_s: float
    late_s: float


class Links(Protocol):
    """What a schedule is played on; `Bed` is one."""

    def set_rate(
        self, rate: str | float | None, host: int | None = None, direction: Direction = "both"
    ) -> None:
        """Shape one host's link, or all."""
        ...

    def set_link(self, *, up: bool, host: int | None = None) -> None:
        """Plug in or pull one host's cable, or all."""
        ...


def steps(
    points: Sequence[tuple[float, str | float | None]],
    host: int | None = None,
    direction: Direction = "both",
) -> list[Event]:
    """Rates that hold from given times on.

    Args:
        points: (seconds, rate), in order of time.
        host: index of the host; None: all.
        direction: which way.
    """
    _check_order([at_s for at_s, _ in points])
    return [Event(at_s, "rate", parse_rate(rate), host, direction) for at_s, rate in points]


def square_wave(
    high: str | float | None,
    low: str | float | None,
    period_s: float,
    host: int | None = None,
    direction: Direction = "both",
) -> Iterator[Event]:
    """Half a period at `high`, half at `low`, for ever."""
    _check_positive("period", period_s)
    rates = (parse_rate(high), parse_rate(low))
    return (
        Event(number * period_s / 2, "rate", rates[number % 2], host, direction)
        for number in _count()
    )


def random_walk(
    low: str | float,
    high: str | float,
    every_s: float,
    seed: int,
    host: int | None = None,
    direction: Direction = "both",
) -> Iterator[Event]:
    """The rate's logarithm walks between two bounds and is reflected by them, for ever.

    Args:
        low: the lower bound.
        high: the upper bound.
        every_s: seconds between steps.
        seed: the same seed gives the same walk.
        host: index of the host; None: all.
        direction: which way.
    """
    _check_positive("every", every_s)
    low_bps, high_bps = parse_rate(low), parse_rate(high)
    if low_bps is None or high_bps is None or low_bps >= high_bps:
        raise ConfigError(f"low must be a rate below high, got {low!r} and {high!r}.")
    return _walk(math.log(low_bps), math.log(high_bps), every_s, seed, host, direction)


def outages(times: Sequence[tuple[float, float]], host: int | None = None) -> list[Event]:
    """Pulled cables.

    Args:
        times: (seconds at which the cable is pulled, seconds for which it stays out), in order and
            not overlapping.
        host: index of the host; None: all.
    """
    events = []
    for at_s, for_s in times:
        _check_positive("for", for_s)
        events += [Event(at_s, "down", host=host), Event(at_s + for_s, "up", host=host)]
    _check_order([event.at_s for event in events])
    return events


def merge(*schedules: Iterable[Event]) -> Iterator[Event]:
    """Several schedules at once, in order of time."""
    return heapq.merge(*schedules, key=lambda event: event.at_s)


def parse_schedule(text: str) -> Iterable[Event]:
    """A schedule from a flag: a kind, a colon, `name=value` pairs with commas between.

    ::

        steps:0=100mbit,10=20mbit              from second 0 at 100, from second 10 at 20 Mbit/s
        square:high=100mbit,low=20mbit,period=10
        walk:low=5mbit,high=100mbit,every=2,seed=7
        outage:at=30,for=2

    Each takes `host=0` (one host only); all but outage take `direction=send` or `receive`.

    Raises:
        ConfigError: it is none of these.
    """
    kind, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    try:
        host = int(given.pop("host")) if "host" in given else None
        direction: Direction = given.pop("direction", "both")  # type: ignore[assignment] # checked
        if kind == "steps" and given:
            return steps([(float(at), rate) for at, rate in given.items()], host, direction)
        if kind == "square":
            period_s = float(given.pop("period"))
            return square_wave(**given, period_s=period_s, host=host, direction=direction)
        if kind == "walk":
            every_s, seed = float(given.pop("every")), int(given.pop("seed"))
            return random_walk(**given, every_s=every_s, seed=seed, host=host, direction=direction)
        if kind == "outage" and set(given) == {"at", "for"}:
            return outages([(float(given["at"]), float(given["for"]))], host)
    except (KeyError, TypeError) as exc:
        raise ConfigError(_advice(text)) from exc
    except ValueError as exc:
        raise (exc if isinstance(exc, ConfigError) else ConfigError(_advice(text))) from exc
    raise ConfigError(_advice(text))


class Player:
    """A thread that plays a schedule until it is over or `stop` is called.

    A context manager: leaving it stops.

    Args:
        links: what the events change.
        schedule: events in order of time.

    Attributes:
        played: what has happened so far.
    """

    def __init__(self, links: Links, schedule: Iterable[Event]) -> None:
        self.played: list[Played] = []
        self._links = links
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(iter(schedule),), name="netbed-schedule", daemon=True
        )
        self._start_s = time.monotonic()
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the schedule is over.

        Raises:
            Exception: what ended it early.
        """
        self._thread.join(timeout_s)
        self._tell()

    def stop(self) -> None:
        """Play no further event; the links stay as they are.

        Raises:
            Exception: what ended it before.
        """
        self._stop.set()
        self._thread.join()
        self._tell()

    def __enter__(self) -> Player:
        """Nothing: it plays since it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _run(self, schedule: Iterator[Event]) -> None:
        try:
            for event in schedule:
                if self._stop.wait(max(0.0, self._start_s + event.at_s - time.monotonic())):
                    return
                self._apply(event)
                late_s = time.monotonic() - self._start_s - event.at_s
                self.played.append(Played(event, time.time(), late_s))
        # Whatever it was belongs to the thread that waits or stops.
        except Exception as exc:
            self._error = exc

    def _apply(self, event: Event) -> None:
        if event.action == "rate":
            self._links.set_rate(event.rate_bps, event.host, event.direction)
        else:
            self._links.set_link(up=event.action == "up", host=event.host)

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _walk(
    low: float, high: float, every_s: float, seed: int, host: int | None, direction: Direction
) -> Iterator[Event]:
    chance, width = random.Random(seed), high - low
    place = chance.uniform(low, high)
    for number in _count():
        yield Event(number * every_s, "rate", math.exp(place), host, direction)
        # Reflection at both bounds: fold the line onto the interval.
        turn = (place + chance.gauss(0.0, WALK_STEP) - low) % (2 * width)
        place = low + min(turn, 2 * width - turn)


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be above 0 seconds, got {value!r}.")


def _check_order(times: Sequence[float]) -> None:
    if any(at_s < 0 for at_s in times) or list(times) != sorted(times):
        raise ConfigError(f"times must be >= 0 and in order, got {list(times)!r}.")


def _advice(text: str) -> str:
    return (
        f"--schedule must be steps:, square:, walk: or outage: with name=value pairs, got {text!r}."
        " For example square:high=100mbit,low=20mbit,period=10."
    )
