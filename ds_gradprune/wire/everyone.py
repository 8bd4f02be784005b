"""All ranks that are left, where ranks may be lost: what they tell each other beside exchanges.

A gather goes over two levels. The ranks of an island hand each other their rows, and each of them
brings those of its island to its crew. So all ranks get the rows of the same islands, and of whole
islands only.

The calls of a crew have one order. An exchange under way makes calls in a thread of its own, so it
is landed before anything else is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.door import Candidate
from ds_gradprune.wire.transport import Transport, Work, check_all_gather

_ASK_BYTES = 64
"""Room for a candidate as JSON."""

_SUMS = "ranks that may be lost tell each other rows: nobody knows whose sum it is"


@dataclass(frozen=True)
class Admitted:
    """An island that has asked to be let in.

    Attributes:
        island: its number.
        here: it takes part in the calls of this rank's crew.
        everywhere: in those of all crews; else it is put out again.
    """

    island: int
    here: bool
    everywhere: bool


class Everyone(Transport):
    """One rank's end of a run whose islands may be lost.

    Args:
        crew: of the ranks of its index.
        inner: over the ranks of its island; None: there is one.

    Attributes:
        crew: see there.
        rank: among all ranks that the run began with.
        island: of this rank.
        before: called before every call here; it lands what is under way.
    """

    def __init__(self, crew: CrewTransport, inner: Transport | None = None) -> None:
        self.island = crew.rank
        self._shard, self._shards = (0, 1) if inner is None else (inner.rank, inner.world_size)
        self.rank = self.island * self._shards + self._shard
        self.before: Callable[[], object] = lambda: None
        self.crew = crew
        self._inner = inner

    @property
    def islands(self) -> tuple[int, ...]:
        """Those that are left, rising; equal on all ranks."""
        return self.crew.islands

    @property
    def took_part(self) -> tuple[int, ...]:
        """Their ranks."""
        return self._ranks_of(self.islands)

    @property
    def world_size(self) -> int:  # type: ignore[override] # it changes
        """Number of ranks that are left."""
        return len(self.islands) * self._shards

    @property
    def place(self) -> int:
        """See `Transport.place`; -1 before this island has been let in."""
        if self.island not in self.islands:
            return -1
        return self.islands.index(self.island) * self._shards + self._shard

    @property
    def sees_one_ask(self) -> bool:
        """This rank sees an island that asks to be let in. Local."""
        return self.crew.members.door.candidate is not None

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`; `Work.took_part` says whose rows there are. Collective.

        Args:
            payload: see there.
            out: the first rows are filled, in the order of `took_part`.
        """
        self.before()
        if self._inner is None:
            return self.crew.start_all_gather(payload, out)
        check_all_gather(payload, out, len(out))
        block = torch.empty(self._shards, payload.numel(), dtype=torch.uint8)
        self._inner.all_gather(payload, block)
        rows = torch.empty(self.crew.world_size, block.numel(), dtype=torch.uint8)
        call = self.crew.start_common_gather(block.view(-1), rows)
        return _Told(call, rows, out, self._ranks_of)

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """Not here. Raises TransportError."""
        raise TransportError(_SUMS)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """Not here. Raises TransportError."""
        raise TransportError(_SUMS)

    def roll(self) -> tuple[int, ...]:
        """The islands that are there; a barrier. Collective."""
        self.before()
        return self.crew.roll()

    def let_in(self) -> Admitted | None:
        """Let in the island that asks, if all its ranks are found alive.

        Returns:
            Its number, and whether it has come in on all indices; None: no crew has it.

        Collective: all ranks, which call `roll` when they have told it all.
        """
        self.before()
        candidate = self._one_for_all(self.crew.who_asks())
        if candidate is None:
            return None
        came = self.crew.admit(candidate)
        everywhere = self._all(came)
        if not everywhere:
            self.crew.members.refuse(candidate)
        return Admitted(candidate.island, here=came, everywhere=everywhere)

    def _one_for_all(self, candidate: Candidate | None) -> Candidate | None:
        """Who asks on all indices. Collective: the island."""
        if self._inner is None:
            return candidate
        text = "" if candidate is None else candidate.as_json()
        mine = torch.zeros(_ASK_BYTES, dtype=torch.uint8)
        mine[: len(text)] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        rows = torch.empty(self._shards, _ASK_BYTES, dtype=torch.uint8)
        self._inner.all_gather(mine, rows)
        return candidate if bool((rows == mine).all()) else None

    def _all(self, well: bool) -> bool:
        """Whether all ranks of the island say so. Collective: the island."""
        if self._inner is None:
            return well
        rows = torch.empty(self._shards, 1, dtype=torch.uint8)
        self._inner.all_gather(torch.tensor([well], dtype=torch.uint8), rows)
        return bool(rows.all())

    def leave(self) -> None:
        """See `CrewTransport.leave`. Collective."""
        self.before()
        self.crew.leave()

    def give_up(self) -> None:
        """This island cannot go on: the others need not wait for it. Local."""
        self.crew.members.give_up()

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self.crew.close()

    def _ranks_of(self, islands: tuple[int, ...]) -> tuple[int, ...]:
        shards = self._shards
        return tuple(island * shards + shard for island in islands for shard in range(shards))


class _Told(Work):
    """A gather of `Everyone` with several ranks per island."""

    def __init__(
        self,
        call: Work,
        rows: torch.Tensor,
        out: torch.Tensor,
        ranks_of: Callable[[tuple[int, ...]], tuple[int, ...]],
    ) -> None:
        self._call = call
        self._rows = rows
        self._out = out
        self._ranks_of = ranks_of

    def wait(self) -> None:
        """See `Work.wait`. Collective."""
        if self.took_part is not None:
            return
        self._call.wait()
        assert self._call.took_part is not None
        ranks = self._ranks_of(self._call.took_part)
        rows = self._rows[: len(self._call.took_part)]
        self._out[: len(ranks)].copy_(rows.view(len(ranks), self._out.shape[1]))
        self.took_part = ranks

    def done(self) -> bool:
        """See `Work.done`."""
        return self.took_part is not None
