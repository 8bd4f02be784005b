"""Adaptive gradient pruning for DeepSpeed over slow, unstable Ethernet.

Three ways in, all reading the `gradient_pruning` block of the engine's own configuration::

    engine, optimizer, loader, scheduler = ds_gradprune.initialize(model=..., config=...)
    ds_gradprune.register()        # for code that calls deepspeed.initialize itself
    handle = ds_gradprune.attach(engine)      # for pruned gradients: islands begin earlier

Importing this package loads neither deepspeed nor mpi4py; calling one of these does.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ds_gradprune.errors import MissingDependencyError

__version__ = "0.2.0"

__all__ = ["attach", "detach", "initialize", "register", "unregister", "watch"]

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.attach import AnyHandle


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, pruned as the block says; see `deepspeed.initialize.initialize`.

    Collective: all ranks.
    """
    result: tuple[Any, Any, Any, Any] = _room("initialize").initialize(*args, **kwargs)
    return result


def register() -> None:
    """Make `deepspeed.initialize` itself prune, for code that calls it. Local."""
    _room("initialize").register()


def unregister() -> None:
    """Undo `register`. Local."""
    _room("initialize").unregister()


def attach(engine: Any) -> AnyHandle:
    """Prune what a DeepSpeed engine exchanges; see `deepspeed.attach.attach`.

    Collective: all ranks.
    """
    handle: AnyHandle = _room("attach").attach(engine)
    return handle


def detach(engine: Any) -> None:
    """Give a DeepSpeed engine back everything that `attach` hooked. Local."""
    handle = getattr(engine, "gradprune", None)
    if handle is not None:
        handle.detach()


def watch(engine: Any) -> AbstractContextManager[None]:
    """Let no wait of a script last for ever, from a thread; see `deepspeed.waits.watch`.

    Collective: all ranks.
    """
    watched: AbstractContextManager[None] = _room("waits").watch(engine)
    return watched


def _room(name: str) -> Any:
    """Import a module that needs deepspeed, at the moment it is needed."""
    try:
        return importlib.import_module(f"ds_gradprune.deepspeed.{name}")
    except ModuleNotFoundError as exc:
        if exc.name != "deepspeed":
            raise
        raise MissingDependencyError(
            'deepspeed is not installed. Run: pip install "ds_gradprune[deepspeed]"'
        ) from exc
