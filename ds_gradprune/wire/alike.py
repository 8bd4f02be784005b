"""The ranks of an island go on with the same islands, though each has a crew of its own.

An island whose rank 1 dies may still have taken part in the call of index 0. So after a call on
which all ranks of an island decide, they meet inside and go on with those that have taken part on
every index. Each crew gives all islands the same, so all islands come to the same.

What only moves a shard needs no such agreement: its mean is that of those its own crew has heard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.fate import too_few
from ds_gradprune.wire.transport import Transport, Work

_TEXT_BYTES = 600
"""So much of an error reaches the other ranks of the island."""

_WELL, _FAILED, _TIMED_OUT = range(3)


class Alike:
    """One rank's end of the agreement inside its island.

    Args:
        inner: over the ranks of the island; bounds every wait. None: there is one, and it agrees
            with itself.
        num_islands: that the run began with.
        least: with fewer islands the run ends.
    """

    def __init__(self, inner: Transport | None, num_islands: int, least: int) -> None:
        self.inner = inner
        self._num_islands = num_islands
        self._least = least

    def agree(
        self, took_part: Sequence[int], error: TransportError | None = None
    ) -> tuple[int, ...]:
        """The islands that have taken part in the calls of all indices, rising.

        Args:
            took_part: in that of this rank.
            error: why it has none; None: it has one.

        Raises:
            TransportError, TransportTimeout: `error`, on all ranks of the island; or a rank of it
                is gone; or fewer islands than `least` are left.

        Collective: all ranks of the island.
        """
        if self.inner is None:
            if error is not None:
                raise error
            return tuple(took_part)
        rows = self._gather(took_part, error)
        if error is not None:
            raise error
        for rank, row in enumerate(rows):
            if int(row[0]) != _WELL:
                kind = TransportTimeout if int(row[0]) == _TIMED_OUT else TransportError
                text = row[1 + self._num_islands :].numpy().tobytes().rstrip(b"\0")
                raise kind(f"rank {rank} of this island: {text.decode('utf-8', 'replace')}")
        everywhere = rows[:, 1 : 1 + self._num_islands].bool().all(dim=0)
        islands = tuple(everywhere.nonzero().flatten().tolist())
        if len(islands) < self._least:
            raise too_few(self._least, islands)
        return islands

    def _gather(self, took_part: Sequence[int], error: TransportError | None) -> torch.Tensor:
        assert self.inner is not None
        mine = torch.zeros(1 + self._num_islands + _TEXT_BYTES, dtype=torch.uint8)
        for island in took_part:
            mine[1 + island] = 1
        if error is not None:
            mine[0] = _TIMED_OUT if isinstance(error, TransportTimeout) else _FAILED
            text = bytearray(str(error).encode()[:_TEXT_BYTES])
            start = 1 + self._num_islands
            mine[start : start + len(text)] = torch.frombuffer(text, dtype=torch.uint8)
        rows = torch.empty(self.inner.world_size, mine.numel(), dtype=torch.uint8)
        self.inner.all_gather(mine, rows)
        return rows


class AlikeCall(Work):
    """A crew's gather whose rows are those of the islands that took part on all indices.

    Args:
        call: under way.
        rows: where its rows come.
        alike: of the island.
        note: takes the islands that were agreed on.
    """

    def __init__(
        self,
        call: Work,
        rows: torch.Tensor,
        alike: Alike,
        note: Callable[[tuple[int, ...]], object],
    ) -> None:
        self._call = call
        self._rows = rows
        self._alike = alike
        self._note = note
        self._failure: TransportError | None = None

    def wait(self) -> None:
        """See `Work.wait`. Collective: all ranks of the island as well."""
        if self._failure is not None:
            raise self._failure
        if self.took_part is not None:
            return
        failure: TransportError | None = None
        try:
            self._call.wait()
        except TransportError as exc:
            failure = exc
        heard = self._call.took_part or ()
        try:
            islands = self._alike.agree(heard, failure)
        except TransportError as exc:
            self._failure = exc
            raise
        if islands != heard:
            places = [heard.index(island) for island in islands]
            self._rows[: len(places)] = self._rows[places]
        self._note(islands)
        self.took_part = islands

    def done(self) -> bool:
        """See `Work.done`; before a wait nobody knows."""
        return self.took_part is not None or self._failure is not None
