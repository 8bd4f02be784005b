"""A store of torch.distributed that answers in time, or is told to be gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.lost import reason_of
from ds_gradprune.wire.silence import asked

STORE_S = 5.0
"""So long the store may take for an answer; torch's own client would wait for ever."""


class Bounded:
    """A store of torch.distributed whose every answer comes within `STORE_S`, or an error of ours.

    Args:
        store: see there; its client may wait for ever for a host that is frozen or cut off.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        """The value of a key that is there."""
        return str(self._ask(lambda: self._store.get(key)).decode(errors="replace"))

    def text(self, key: str) -> str:
        """The value of a key, or nothing."""
        return self.get(key) if self.check([key]) else ""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._ask(lambda: self._store.check(keys)))

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        """Set a key that has the expected value, or is not there; what it has now."""
        found = self._ask(lambda: self._store.compare_set(key, expected, desired))
        return str(found.decode(errors="replace"))

    def add(self, key: str, amount: int) -> int:
        """Count."""
        return int(self._ask(lambda: self._store.add(key, amount)))

    def keys(self) -> list[str]:
        """All keys, with the prefixes of every store inside this one."""
        return [str(key) for key in self._ask(lambda: self._store.list_keys())]

    def _ask(self, question: Callable[[], Any]) -> Any:
        answer = asked(STORE_S, question)
        if answer is None:
            raise TransportTimeout(
                f"the store on rank 0's host must say within {STORE_S:g} s who is alive, but does "
                "not answer: its host is frozen, or a link is down. Resume from the last "
                "checkpoint."
            )
        exc = answer.exception()
        if exc is not None:
            raise TransportError(
                f"the store on rank 0's host cannot be asked who is alive: {reason_of(exc)}. Its "
                "host, its process or its link is gone; resume from the last checkpoint."
            ) from exc
        return answer.result()
