"""What a density would cost, and the highest one that the budget affords.

The model of one step: computation + (codec(k) + exposed exchange) / interval. An exchange takes
overhead + seconds_per_byte * bytes(k), and hides behind the computation of the steps that it
travels through. What hides takes cores and memory from the computation, so a little of it is paid
where the law sets the budget.

Codec and bytes are straight lines: a payload is a header, the dense segments, and so many bits per
kept element. A codec selects, and then takes so long per kept element. A dense
step has its own bytes and its own, small, work beside the exchange. Its collective moves a byte in
another time than the gather does: that is a factor, which is measured.

The allowance for communication is what the budget leaves. Exchanges and computation scatter, so the
law leaves `MARGIN` standard deviations of the two together. It spends the rest: a lower density
would slow learning without need.

Densities come from a ladder: whole k with five significant bits, 1 to 31, then steps of 3 to 6 %.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.arithmetic import hypot
from ds_gradprune.law.stats import clamp

MARGIN = 2.0
"""Standard deviations of a step's time between the plan and the budget."""

HIDDEN_COST = 0.1
"""A hidden second lengthens a step by so much. With a core per host it was 0.0 to 0.3: 7 ms of the
22 that 278 kB took at 100 Mbit/s, next to nothing for 82 kB at 20 Mbit/s
(results/ethernet_cpu_202611_2hosts_hidden.md)."""

_SPREAD_MOST = 0.15
"""Scatter of the computation counts up to this share of the allowance."""

_LADDER_BITS = 5


class Prices(NamedTuple):
    """What things cost now.

    Attributes:
        compute_s: forward, backward, optimizer of the slowest rank, median.
        spread_s: standard deviation of it; 0.0 where the budget is relative to it.
        codec_s: of a pruned step, whatever k.
        codec_per_k_s: on top, for every kept element per chunk.
        dense_codec_s: of a dense step.
        overhead_s: of an exchange, whatever its size.
        seconds_per_byte: of a pruned exchange, on top of it.
        noise: standard deviation of the logarithm of an exchange's time.
        fixed_bytes: of a pruned exchange, whatever k.
        bytes_per_k: on top, for every kept element per chunk.
        dense_bytes: of a dense exchange.
        dense_factor: seconds per byte of a dense exchange over those of a pruned one.
        hide_s: of a pruned exchange, so long it may travel while the computation goes on.
        interval: optimizer steps that share an exchange.
        hidden_cost: a second of an exchange that hides lengthens its steps by so much.
    """

    compute_s: float
    spread_s: float
    codec_s: float
    codec_per_k_s: float
    dense_codec_s: float
    overhead_s: float
    seconds_per_byte: float
    noise: float
    fixed_bytes: float
    bytes_per_k: float
    dense_bytes: float
    dense_factor: float
    hide_s: float = 0.0
    interval: int = 1
    hidden_cost: float = 0.0

    def comm_s(self, k: int) -> float:
        """Of an exchange with k kept elements per chunk; CHUNK_NUMEL: dense."""
        if k == CHUNK_NUMEL:
            return self.overhead_s + self.seconds_per_byte * self.dense_factor * self.dense_bytes
        return self.overhead_s + self.seconds_per_byte * (self.fixed_bytes + self.bytes_per_k * k)

    def local_s(self, k: int) -> float:
        """Of a typical step, without its exchange."""
        if k == CHUNK_NUMEL:
            return self.compute_s + self.dense_codec_s / self.interval
        interval = self.interval
        return self.compute_s + self.codec_s / interval + self.codec_per_k_s * k / interval

    def exposed_s(self, k: int) -> float:
        """What an exchange is waited for: all of it, less what hides behind the computation."""
        hidden_s = 0.0 if k == CHUNK_NUMEL else self.hide_s
        return max(0.0, self.comm_s(k) - hidden_s)

    def step_s(self, k: int) -> float:
        """Of a typical step: `local_s` and `exposed_s` in one, since the law asks often."""
        interval = self.interval
        if k == CHUNK_NUMEL:
            comm_s = self.overhead_s + self.seconds_per_byte * self.dense_factor * self.dense_bytes
            return self.compute_s + self.dense_codec_s / interval + comm_s / interval
        comm_s = self.overhead_s + self.seconds_per_byte * (self.fixed_bytes + self.bytes_per_k * k)
        local_s = self.compute_s + self.codec_s / interval + self.codec_per_k_s * k / interval
        cost = self.hidden_cost
        least_s, paid_s = cost * comm_s, comm_s - (1.0 - cost) * self.hide_s
        return local_s + (paid_s if paid_s > least_s else least_s) / interval

    def at(self, interval: int, delay_steps: int) -> Prices:
        """The same at another interval, of which an exchange travels through some steps."""
        return self._replace(interval=interval, hide_s=delay_steps * self.compute_s)

    @property
    def rate_text(self) -> str:
        """The link's rate for a user, in parentheses and with a blank before it."""
        return f" ({8e-6 / self.seconds_per_byte:.3g} Mbit/s)"

    def hides(self, k: int) -> bool:
        """A pruned exchange with k hides behind the computation as a whole."""
        return self.hide_s > 0.0 and self.comm_s(k) <= self.hide_s

    def lines(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """A step's seconds as (fixed, per kept element): where exchanges hide, and where not."""
        local_s, comm_s, cost = self.local_s(0), self.comm_s(0), self.hidden_cost
        wire_s = self.seconds_per_byte * self.bytes_per_k
        hidden_s = local_s + cost * comm_s / self.interval
        exposed_s = local_s + (comm_s - (1.0 - cost) * self.hide_s) / self.interval
        hidden = (hidden_s, (self.codec_per_k_s + cost * wire_s) / self.interval)
        return hidden, (exposed_s, (self.codec_per_k_s + wire_s) / self.interval)

    def margin_s(self, k: int) -> float:
        """What `fits` wants above `step_s` where only the exchange scatters, and a hair."""
        exposes = self.exposed_s(k) > 0.0
        return MARGIN * self.noise * self.comm_s(k) * exposes / self.interval + 1e-6 * self.step_s(
            k
        )

    def fits(self, k: int, budget_s: float, margin: float = MARGIN) -> bool:
        """A step with k stays within the budget, `margin` standard deviations included."""
        comm_s = self.comm_s(k) if self.exposed_s(k) > 0.0 else 0.0
        step_s = self.step_s(k)
        if step_s > budget_s:
            return False
        spread_s = min(self.spread_s, _SPREAD_MOST * (budget_s - self.compute_s))
        return step_s + margin * hypot(self.noise * comm_s / self.interval, spread_s) <= budget_s

    def affordable_k(self, budget_s: float, k_min: int, k_max: int) -> int:
        """The highest k that fits, on the ladder; k_min if none does."""
        spread_s = clamp(_SPREAD_MOST * (budget_s - self.compute_s), 0.0, self.spread_s)
        # b * comm + MARGIN * hypot(noise * comm, spread) = allowance, solved for comm; what the
        # codec takes per kept element is counted with what its bytes take.
        least_s = self.overhead_s + self.seconds_per_byte * self.fixed_bytes
        wire_per_k_s = self.seconds_per_byte * self.bytes_per_k
        codec_share = self.codec_per_k_s / wire_per_k_s
        interval = self.interval
        room_s = interval * budget_s - interval * self.compute_s - self.codec_s
        allowance_s = room_s + (1.0 - self.hidden_cost) * self.hide_s + codec_share * least_s
        scatter, scatter_s = MARGIN * self.noise, MARGIN * (spread_s * interval)
        b = 1.0 + codec_share
        a = b * b - scatter * scatter
        all_s = b * allowance_s
        square = all_s * all_s - a * (allowance_s * allowance_s - scatter_s * scatter_s)
        comm_s = (all_s - (math.sqrt(square) if square > 0.0 else 0.0)) / a
        k = (comm_s - least_s) / wire_per_k_s
        if self.hide_s > 0.0:
            k = min(k, self._hidden_k(room_s - scatter_s, least_s))
        return clamp(ladder(int(clamp(k, 1.0, CHUNK_NUMEL - 1.0))), k_min, k_max)

    def _hidden_k(self, room_s: float, least_s: float) -> float:
        """The highest k that local work and hidden wire of an interval leave room for."""
        wire_s = self.seconds_per_byte * self.bytes_per_k
        per_k_s = self.codec_per_k_s + self.hidden_cost * wire_s
        left_s = room_s - self.hidden_cost * least_s
        if per_k_s == 0.0:
            return CHUNK_NUMEL * (left_s >= 0.0)
        return left_s / per_k_s


def ladder(k: int, bits: int = _LADDER_BITS) -> int:
    """The highest k' <= k that has so many significant bits."""
    shift = k.bit_length() - bits
    return (k >> shift) << shift if shift > 0 else k


def line_through(sizes: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Bytes of an exchange as a line in k.

    Args:
        sizes: (k, bytes) of the newest pruned exchange, then of one with another k. With one alone
            all bytes count as growing with k.

    Returns:
        Fixed bytes, >= 0, and bytes per k, > 0.
    """
    k, wire_bytes = sizes[0]
    most = wire_bytes / k
    if len(sizes) == 1:
        return 0.0, most
    other_k, other_bytes = sizes[1]
    # A payload cannot cost less than nothing, nor grow faster than in proportion.
    slope = clamp((wire_bytes - other_bytes) / (k - other_k), 1e-3 * most, most)
    return wire_bytes - slope * k, slope
