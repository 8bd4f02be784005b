"""The ranks of an island agree before the islands do: one set of signals for all of them.

Times are the slowest rank's, bytes are what the island's link carries, so their sum, and the loss
is the mean. What one rank does not know, the island does not know. What fails on one rank is raised
on all, so that nobody waits for the one that has left.

Every agreement has an occasion. Ranks that come to different ones would wait for each other inside
DeepSpeed's collectives, for half an hour; here they are told why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import struct
import zlib
from collections.abc import Collection, Iterator

import torch

from ds_gradprune.deepspeed.agree import raise_together
from ds_gradprune.errors import GradPruneError, RankMismatchError, TransportTimeout
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.wire.transport import Transport


class Occasion(enum.IntEnum):
    """Why the ranks of an island meet."""

    SIGNALS = 1
    OUTCOME = 2
    OWN = 3
    SHARED = 4


_WORDS = {
    Occasion.SIGNALS: "ends a step",
    Occasion.OUTCOME: "is in the middle of an exchange",
    Occasion.OWN: "goes on training",
    Occasion.SHARED: "wants the shared weights (state_dict, a save, a forward in evaluation mode)",
}
_FIX = (
    "With several ranks in an island all of them must do this, in the same order. For work of one "
    "rank, enter engine.gradprune.shared_weights() on all ranks and work inside on one."
)


_SIGNALS = 10
"""Numbers of an agreement on signals."""


class InsideIsland:
    """Agreement between the ranks of one island.

    Args:
        transport: over them; its time-out bounds every wait. None: the island has one rank, and
            agrees with itself.
        num_islands: how many islands there are.
    """

    def __init__(self, transport: Transport | None, num_islands: int) -> None:
        self._transport = transport
        self._num_islands = num_islands
        # Rows of all occasions are equally long: sizes that differ would end the process.
        self._width = 1 + max(_SIGNALS, 2 + num_islands)

    def meet(self, occasion: Occasion) -> None:
        """All ranks come here for the same reason.

        Raises:
            RankMismatchError: they do not.
            TransportTimeout: some rank does not come at all.

        Collective: all ranks of the island.
        """
        self._gather(occasion, [])

    def agree(
        self, mine: RankSignals, dense_bytes: int, *, island: int | None = None
    ) -> tuple[RankSignals, int]:
        """What the island says, and what it would send without pruning.

        Args:
            mine: this rank's signals; `wire_bytes` is the island's already.
            dense_bytes: what this rank would send without pruning.
            island: its number, where all its ranks must have one history. If they have not, the
                island says one that no other has, and all ranks of all islands are told.

        Collective: all ranks of the island.
        """
        if self._transport is None:
            return mine, dense_bytes
        # nan stands for what is unknown, so a loss that is nan goes as inf: finite it is not.
        loss = math.inf if mine.loss is not None and math.isnan(mine.loss) else mine.loss
        known = [loss, mine.compute_time_s, mine.codec_time_s, mine.comm_time_s]
        row = [math.nan if value is None else float(value) for value in known]
        row += [
            float(mine.nonfinite),
            float(mine.written),
            float(dense_bytes),
            float(mine.agreement),
            float(mine.stops),
            float(mine.asks),
        ]
        losses, computes, codecs, comms, nonfinite, written, dense, histories, stops, asks = (
            list(column) for column in zip(*self._gather(Occasion.SIGNALS, row), strict=True)
        )
        together = dataclasses.replace(
            mine,
            loss=_or_none(sum(losses) / len(losses)),
            compute_time_s=_or_none(_most(computes)),
            codec_time_s=_most(codecs),
            comm_time_s=_most(comms),
            nonfinite=any(nonfinite),
            written=any(written),
            stops=any(stops),
            asks=all(asks),
            agreement=mine.agreement if island is None else _history(histories, island),
        )
        return together, int(sum(dense))

    def outcome(
        self,
        *,
        error: Exception | None = None,
        bad: Collection[int] = (),
        wire_bytes: int = 0,
    ) -> tuple[list[int], int]:
        """How an exchange has ended on all ranks.

        Args:
            error: what has gone wrong here; None: nothing.
            bad: numbers of islands that this rank has found to be sick.
            wire_bytes: what this rank has sent.

        Returns:
            The islands that some rank has found to be sick, and what the island has sent.

        Raises:
            Exception: `error`; on the other ranks a `GradPruneError` of its kind, with its text.

        Collective: all ranks of the island.
        """
        if self._transport is None:
            if error is not None:
                raise error
            return sorted(bad), wire_bytes
        row = [float(error is not None), float(wire_bytes)]
        row += [float(number in bad) for number in range(self._num_islands)]
        failed, sent, *columns = zip(*self._gather(Occasion.OUTCOME, row), strict=True)
        if any(failed):
            _raise(self._transport, error)
        return [number for number, found in enumerate(columns) if any(found)], int(sum(sent))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank is raised on all. Collective: all ranks of the island."""
        error: Exception | None = None
        try:
            yield
        except Exception as exc:
            error = exc
        self.outcome(error=error)

    def _gather(self, occasion: Occasion, row: list[float]) -> list[list[float]]:
        """Every rank's row; all of them must have come for the same reason."""
        if self._transport is None:
            return [row]
        mine = torch.zeros(self._width, dtype=torch.float64)
        mine[: 1 + len(row)] = torch.tensor([float(occasion), *row], dtype=torch.float64)
        rows = torch.empty(self._transport.world_size, 8 * self._width, dtype=torch.uint8)
        try:
            self._transport.all_gather(mine.view(torch.uint8), rows)
        except TransportTimeout as exc:
            raise TransportTimeout(
                f"rank {self._transport.rank} of an island {_WORDS[occasion]}, and another rank of "
                f"it does not: {exc}. {_FIX}"
            ) from exc
        found: list[list[float]] = rows.view(torch.float64).tolist()
        reasons = [Occasion(int(other[0])) for other in found]
        if len(set(reasons)) > 1:
            told = ", ".join(f"rank {rank} {_WORDS[why]}" for rank, why in enumerate(reasons))
            raise RankMismatchError(
                f"the ranks of an island must do the same; counted inside it, {told}. {_FIX}"
            )
        return [other[1 : 1 + len(row)] for other in found]


def _raise(transport: Transport, error: Exception | None) -> None:
    """Raise on every rank what has failed on some. Collective: all ranks of the island."""
    if error is None or isinstance(error, GradPruneError):
        raise_together(transport, error, whose="rank {rank} of this island")
    told = GradPruneError(f"{type(error).__name__}: {error}")
    with contextlib.suppress(GradPruneError):
        raise_together(transport, told)
    assert error is not None
    raise error


def _history(histories: list[float], island: int) -> int:
    """What all have, or something that only this island has."""
    if len(set(histories)) == 1:
        return int(histories[0])
    return zlib.crc32(struct.pack(f"<{len(histories)}dI", *histories, island))


def _most(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
