"""How long DeepSpeed's own waits may last: as long as ours, `timeout_s`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

from ds_gradprune.wire.lost import translated
from ds_gradprune.wire.silence import LATE_S, Pulse, deadline, limit, limited
from ds_gradprune.wire.stand_in import backend


@contextlib.contextmanager
def bounded(doing: str, timeout_s: float) -> Iterator[None]:
    """No wait for another rank that begins inside is longer, and what is lost has a name. Local.

    DeepSpeed's barriers and broadcasts are in the group of all ranks, whose time-out is 30 minutes
    or what the user gave it. It gets that back.

    Args:
        doing: "saving a checkpoint", for the message.
        timeout_s: seconds. A shorter time-out of the user's is kept.

    Raises:
        TransportError, TransportTimeout: instead of torch's RuntimeError.
    """
    with told(doing, timeout_s), limited(timeout_s, dist.group.WORLD):
        yield


@contextlib.contextmanager
def told(doing: str, timeout_s: float) -> Iterator[None]:
    """What is lost inside has a name; see `bounded`. Local."""
    if not dist.is_initialized():
        yield
        return
    with translated(doing, dist.get_rank(), dist.get_world_size(), timeout_s):
        yield


def everyone(timeout_s: float | None) -> Any:
    """The group of all ranks that DeepSpeed makes for itself, made before it does.

    Args:
        timeout_s: longest wait in it, from now on; None: torch's own.

    Collective: all ranks.
    """
    with asking(timeout_s):
        group = groups._clone_world_group()
    if timeout_s is not None:
        limit(timeout_s, group)
    return group


def new_group(ranks: list[int], timeout_s: float | None, **options: Any) -> Any:
    """A process group with a deadline; None: torch's own time-out. Collective: all ranks."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    with asking(timeout_s):
        over = backend(options.pop("backend", None), ranks)
        return dist.new_group(ranks, timeout=timeout, backend=over, **options)


@contextlib.contextmanager
def asking(timeout_s: float | None) -> Iterator[None]:
    """Questions to rank 0's store, which have no time-out in torch. Local.

    Where rank 0 is frozen or cut off the process ends, because nothing else ends the wait.
    """
    if timeout_s is None:
        yield
        return
    with deadline(timeout_s + LATE_S, "making process groups"):
        yield


@contextlib.contextmanager
def watch(engine: Any) -> Iterator[None]:
    """Let no wait inside last for ever, whatever it waits for: a thread shows life to all ranks.

    For a script of one's own: `with ds_gradprune.watch(engine):` around everything from the first
    step to the last save.

    Collectives of the script in the group of all ranks have the block's `timeout_s`. A rank that
    shows no life for so long ends the others, with a line that names it and exit code 2, where they
    wait for what has no time-out. An engine that exchanges nothing is not watched.

    Args:
        engine: what `initialize` returned first.

    Raises:
        TransportError, TransportTimeout: instead of torch's RuntimeError, where a rank is gone.

    Collective: all ranks.
    """
    handle = engine.gradprune
    if handle.idle or handle.crew is not None:  # islands that may be lost know of each other
        yield
        return
    timeout_s: float = handle.config.timeout_s
    group = new_group(list(range(dist.get_world_size())), timeout_s, backend="gloo")
    pulse = Pulse(
        group,
        timeout_s,
        doing=lambda: "training",
        standing=lambda: f"{engine.global_steps} steps were done.",
    )
    with bounded("training", timeout_s), pulse:
        yield
