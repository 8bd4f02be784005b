"""Update mode: what an island has gained over the shared weights is pruned and exchanged.

A round, from the exchange that ends it::

    prepare   select what moved most in own - shared, and encode it       nothing has changed
    start     the payloads travel
    deliver   wait, and check everything that has arrived                 nothing has changed
    commit    every delivery moves the shared weights by factor * value, in rank order; the own
              weights keep their residual, own - shared - sent             cannot fail

So a failure, wherever it happens, leaves own and shared weights as they were. Between start and
commit the island may go on training: `own` is read again at the commit. Its weights are ahead of
the exchange meanwhile (`pruned`), which is taken back, to a rounding, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.dense import DenseExchange
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.message import Memory, Source, Stamp
from ds_gradprune.train.outer import OuterRule
from ds_gradprune.train.pruned import PrunedExchange
from ds_gradprune.train.scale import scale_at
from ds_gradprune.train.shared_weights import Bound, SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.traffic import ring_all_reduce_bytes


class Prepared(Protocol):
    """One exchange of all buckets, from its preparation to its commit.

    Attributes:
        sizes: bytes of every payload; equal on all islands. Empty: they need not be compared.
    """

    sizes: Sequence[int]

    def write(self) -> None:
        """Select and encode; nothing but scratch memory changes. Local.

        The own weights go ahead of an exchange that hides, see `pruned`, until `commit` or `abort`.
        """

    def start(self) -> None:
        """Let the payloads travel. Collective: all islands."""

    def wait(self) -> None:
        """Return when everything has arrived; may be called in another thread. Collective."""

    def deliver(self) -> list[int]:
        """Wait and check everything; raises, or returns the islands with inf or nan. Collective."""

    def commit(self) -> None:
        """Apply everything; nothing in it can fail. Local."""

    def abort(self) -> None:
        """Apply nothing: some rank could not deliver. Local."""


class Islands:
    """The algorithm of update mode on one rank.

    Args:
        weights: own and shared weights.
        channel: between the same-index ranks of all islands.
        stopwatch: waiting counts as "wire" there.
        value_bits: bits of a value on the wire.
        scale: factor on the islands' mean update.
        scale_of: the same for any number of islands, where they may be lost; None: it stays.
        sparse_scale: that factor is at least so large where little is sent, and falls to 1 where
            all is, see `scale.scale_at`; None: `scale` holds everywhere.
        rule: what moves the shared weights besides.
        kept: where progress waits that was not sent; None: in the own weights, and used at once.
        clip: an island's update counts at most for so many times the median norm; None: as it is.
        unpruned_bits: bits of a value in an exchange of an unpruned warm-up; None: `value_bits`.

    Attributes:
        weights: see there.
        channel: see there.
        stopwatch: see there.
        value_bits: see there.
        unpruned_bits: see there.
        scale_of: see there.
        sparse_scale: see there.
        rule: see there.
        kept: see there.
        clip: see there.
        memory: scratch memory, kept.
        have_parted: the islands have stepped alone, so their own weights differ. A fact of the
            run, kept in its checkpoints, not derived from the configuration.
    """

    def __init__(
        self,
        weights: SharedWeights,
        channel: Channel,
        stopwatch: Stopwatch,
        *,
        value_bits: int,
        scale: float,
        rule: OuterRule,
        kept: KeptResidual | None = None,
        clip: float | None = None,
        sparse_scale: float | None = None,
        scale_of: Callable[[int], float] | None = None,
        unpruned_bits: int | None = None,
    ) -> None:
        self.weights = weights
        self.clip = clip
        self.rule = rule
        self.kept = kept
        self.have_parted = False
        self.scale_of = scale_of or (lambda _: scale)
        self.sparse_scale = sparse_scale
        self.channel = channel
        self.stopwatch = stopwatch
        self.value_bits = value_bits
        self.unpruned_bits = unpruned_bits or value_bits
        self.memory = Memory()

    @property
    def factor(self) -> float:
        """Weight of one island's update in the move of the shared weights, by `scale` alone."""
        islands = self.channel.world_size
        return self.scale_of(islands) / islands

    def factor_at(self, k: int, islands: int | None = None) -> float:
        """The same where `k` elements per chunk are kept.

        Args:
            k: see there.
            islands: so many have taken part; None: as many as in the exchange before.
        """
        count = self.channel.world_size if islands is None else islands
        scale = self.scale_of(count)
        return scale_at(k / CHUNK_NUMEL, scale, self.sparse_scale, count) / count

    def dense_bytes(self) -> int:
        """What this rank would send in an exchange without pruning."""
        return ring_all_reduce_bytes(4 * self.weights.numel, self.channel.world_size)

    def prepare(
        self,
        k: int,
        *,
        step: int,
        signals: RankSignals,
        hides: bool = False,
        unscaled: bool = False,
    ) -> Prepared:
        """Prepare to send the progress of this island; changes nothing. Local.

        Args:
            k: kept elements per chunk.
            step: optimizer step that the exchange follows.
            signals: this rank's measurements, for the headers.
            hides: the island trains on between `write` and `commit`. With a residual that is kept
                aside its weights are copied meanwhile, 4 bytes per parameter.
            unscaled: the shared weights take the islands' mean update, each value in
                `unpruned_bits`. `scale` makes up for what is not sent.
        """
        stamp = Stamp(step, self.channel.rank, k, signals)
        return PrunedExchange(self, stamp, hides=hides, unscaled=unscaled)

    def source(self, bound: Bound) -> Source:
        """What is selected from in a bucket: own - shared, and what is kept of it."""
        if self.kept is None:
            return Source(bound.layout, bound.own, bound.beside(), -1.0)
        kept = self.kept.of(bound, self.weights.stores[bound.store])
        return Source(bound.layout, bound.own, bound.beside(), -1.0, kept, self.kept.decay)

    def prepare_dense(self, nonfinite: Sequence[int]) -> Prepared:
        """Prepare to send the whole progress as it is. Local.

        Args:
            nonfinite: the islands whose weights hold inf or nan, agreed on.
        """
        return DenseExchange(self, nonfinite)


def refuse(nonfinite: Sequence[int], step: int) -> None:
    """End an exchange in which some island's weights are not finite.

    Raises:
        NonFiniteError: `nonfinite` names an island.
    """
    if nonfinite:
        raise NonFiniteError(
            f"the weights of island {', '.join(map(str, nonfinite))} hold inf or nan after step "
            f"{step}; the shared weights are still those of the exchange before. Resume from the "
            "last checkpoint with a lower learning rate or with gradient_clipping."
        )
