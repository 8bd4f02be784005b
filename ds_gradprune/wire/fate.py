"""The ranks of an island are lost together: what one of them has found holds for all.

Same-index ranks of all islands form a crew (`crew`), and each crew finds out for itself who is
gone. It marks an island that it goes on without in the store, where all other crews look::

    out/island/life     this island takes part no more; a life is that of its processes

So the crew of index 0 leaves out an island whose rank 1 is gone, too. Its rank 0, whatever it waits
for, ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.bounded import Bounded


class LeftOut(TransportError):
    """The others go on without this island."""


def store_of(store: Any, shard: int) -> Any:
    """Where the crew of one index keeps its keys: the first one beside what all crews share."""
    return dist.PrefixStore(f"shard_{shard}", store) if shard else store  # type: ignore[attr-defined]


class Fate:
    """What the crews of a run tell each other. With one rank per island there is one crew.

    Args:
        store: that all ranks of all islands share.
        shard: index of this rank inside its island.
        num_shards: ranks of an island.
    """

    def __init__(self, store: Bounded, shard: int = 0, num_shards: int = 1) -> None:
        self._store = store
        self._shard = shard
        self._others = [other for other in range(num_shards) if other != shard]

    def is_out(self, island: int, life: str) -> bool:
        """Whether some crew goes on without an island. Local."""
        return bool(self._others) and self._store.check([_mark(island, life)])

    def put_out(self, island: int, life: str) -> None:
        """Tell the other crews that one goes on without an island. Local."""
        if self._others:
            self._store.set(_mark(island, life), "")

    def give_up(self, island: int, life: str) -> None:
        """The own island is lost: tell the other islands, if the store still answers. Local."""
        with contextlib.suppress(TransportError):
            self.put_out(island, life)

    def has_turn(self) -> Callable[[str], bool] | None:
        """Whether the first rank of an island asks to be let in; None: this one is that. Local."""
        return (lambda text: self._store.text("ask") == text) if self._shard else None

    def vigil(self, island: int, life: str, limit_s: float) -> Callable[[], None]:
        """What a rank asks again and again while it waits for the others of its island.

        Args:
            island: its own.
            life: likewise.
            limit_s: so long another rank may show no life.

        Returns:
            Raises LeftOut or TransportTimeout where the wait is in vain. Local.
        """
        seen: dict[int, tuple[str, float]] = {}

        def look() -> None:
            if self.is_out(island, life):
                raise left_out(island)
            for shard in self._others:
                signs, now_s = self._signs(shard, island, life), time.monotonic()
                if shard not in seen or seen[shard][0] != signs:
                    seen[shard] = (signs, now_s)
                elif now_s - seen[shard][1] > limit_s:
                    raise TransportTimeout(
                        f"rank {shard} of island {island} has shown no life for {limit_s:g} s "
                        "(gradient_pruning.timeout_s), so this island cannot go on. Its process is "
                        "frozen, or its host is gone. Start all ranks of the island again."
                    )

        return look

    def _signs(self, shard: int, island: int, life: str) -> str:
        """Signs of life of a rank: it takes part, or asks to be let in. Local."""
        before = f"shard_{shard}/" if shard else ""
        asks = self._store.text(f"{before}asks/{life}") if life else ""
        return f"{self._store.text(f'{before}beat/{island}')} {asks}"


def left_out(island: int, by: str = "the other islands") -> LeftOut:
    """The error of an island that the others have gone on without. Pure."""
    return LeftOut(
        f"{by} have gone on without island {island}, which did not answer within "
        "gradient_pruning.timeout_s. Its progress since its last exchange is lost. Start it again "
        "with the same command."
    )


def too_few(least: int, islands: Collection[int]) -> TransportTimeout:
    """The error where fewer islands are left than a run needs. Pure."""
    listed = ", ".join(map(str, sorted(islands)))
    return TransportTimeout(
        f"gradient_pruning.min_islands {least} must be alive to go on, but only "
        f"island{'' if len(islands) == 1 else 's'} {listed} answered. Start the others again, and "
        "resume from the last checkpoint."
    )


def _mark(island: int, life: str) -> str:
    return f"out/{island}/{life}"
