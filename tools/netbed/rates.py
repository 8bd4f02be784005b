"""What a link carries per second, and the queueing discipline that holds it to that."""

from __future__ import annotations

import re

from ds_gradprune.errors import ConfigError

UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}

LEAST_BPS = 100_000
"""Below it the smallest bucket would hold seconds of traffic."""

UNSHAPED_BPS = 100 * 10**9
"""No machine reaches it through these links. A limit that never binds, instead of no limit, keeps
one kind of queue, whose counters go on when the rate changes."""

FRAME_BYTES = 1514
"""Ethernet header and the usual payload."""

BURST_S = 0.001
"""A link that rested lends at most so many seconds of its rate: what an exchange gets for nothing.
Half of it is too little, because at 1 Gbit/s the kernel's pieces of 64 KiB would not fit and timers
come late on a busy machine; the 64 KiB often seen would lend 26 ms at 20 Mbit/s."""

LEAST_FRAMES = 4
"""Of the smallest bucket: it lends 2.4 ms at 20 Mbit/s."""

MOST_FRAMES = 64 * 1024 // FRAME_BYTES
"""Of the largest piece that the kernel makes."""

LATENCY_MS = 200
"""What would wait longer in the queue than this is dropped, as in a switch with finite memory."""

_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")


def parse_rate(rate: str | float | None) -> float | None:
    """Bits per second from "20mbit", "1gbit", "512kbit", a number of bits, "none" or None.

    Bits of whole Ethernet frames, headers included, as `tc` counts them; mega is 10^6.

    Returns:
        Bits per second, or None for a link that is not shaped.

    Raises:
        ConfigError: none of the above, or below 100 kbit/s.
    """
    if rate is None or rate == "none":
        return None
    if isinstance(rate, str):
        match = _RATE.fullmatch(rate.strip().lower())
        rate_bps = float(match[1]) * UNITS[match[2]] if match else 0.0
    else:
        rate_bps = float(rate)
    if not LEAST_BPS <= rate_bps <= UNSHAPED_BPS:
        raise ConfigError(
            "rate must be none, or a number with kbit, mbit or gbit from 100kbit to 100gbit, "
            f"got {rate!r}. Write for example 20mbit."
        )
    return rate_bps


def burst_bytes(rate_bps: float | None) -> int:
    """Size of the token bucket: what may pass at once after a pause, bytes."""
    return max(LEAST_FRAMES * FRAME_BYTES, round((rate_bps or UNSHAPED_BPS) / 8 * BURST_S))


def piece_frames(rate_bps: float | None) -> int:
    """So many frames of a connection that is made at the rate pass at once.

    A connection keeps the size of its pieces, and the kernel cuts larger ones into frames. One by
    one these wake the sender's queue and the receiver, on the cores that compute. On a virtual
    machine with two cores 650 kB in every 0.3 s at 100 Mbit/s took 7.7 % off a computation so,
    and 350 kB at 20 Mbit/s 4.4 %. In pieces that fill the bucket it is 1 to 3 %.
    """
    return min(MOST_FRAMES, burst_bytes(rate_bps) // FRAME_BYTES)


def piece_arguments(rate_bps: float | None) -> list[str]:
    """The words after `ip link set dev X`."""
    frames = piece_frames(rate_bps)
    return ["gso_max_size", str(frames * FRAME_BYTES), "gso_max_segs", str(frames)]


def shape_arguments(rate_bps: float | None) -> list[str]:
    """The words after `tc qdisc replace dev X root`."""
    return [
        "tbf",
        *("rate", f"{round(rate_bps or UNSHAPED_BPS)}bit"),
        *("burst", f"{burst_bytes(rate_bps)}b"),
        *("latency", f"{LATENCY_MS}ms"),
    ]
