"""Shadows methods of one engine, or of its optimizer, and gives them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_gradprune.errors import UnsupportedError


class Hooks:
    """What we have put in the place of an object's methods, all on the instance.

    Args:
        engine: the DeepSpeed engine, or a part of it.
        name: what messages call it.
    """

    def __init__(self, engine: Any, name: str = "engine") -> None:
        self._engine = engine
        self._name = name
        self._replaced: dict[str, tuple[Any, Any]] = {}
        self._handles: list[Any] = []

    def replace(self, name: str, hook: Callable[..., Any]) -> None:
        """Shadow a method; `hook` gets the original first."""
        original = getattr(self._engine, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        self._replaced[name] = (replacement, self._engine.__dict__.get(name))
        self._engine.__dict__[name] = replacement

    def keep(self, handle: Any) -> None:
        """Remember what `register_*_hook` of a module returned."""
        self._handles.append(handle)

    def check(self) -> None:
        """Raise unless everything can be given back.

        Raises:
            UnsupportedError: somebody has shadowed a method after us.
        """
        for name, (ours, _) in self._replaced.items():
            if self._engine.__dict__.get(name) is not ours:
                raise UnsupportedError(
                    f"{self._name}.{name} was replaced after attach; undo that first, then detach"
                )

    def remove(self) -> None:
        """Give everything back."""
        for name, (_, before) in self._replaced.items():
            if before is None:
                del self._engine.__dict__[name]
            else:
                self._engine.__dict__[name] = before
        for handle in self._handles:
            handle.remove()
        self._replaced, self._handles = {}, []
