"""A rank is gone: what torch raises becomes one typed line that says where the run stands."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from ds_gradprune.errors import ConfigError, NonFiniteError, TransportError, TransportTimeout

from .place import Place

_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_NETWORK = re.compile(
    r"gloo|ProcessGroup|NCCL|connection (reset|closed|refused)|broken pipe|timed? ?out|timeout",
    re.IGNORECASE,
)
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ?")
_ADVICE = re.compile(r"\. This (is typically|may have been) caused by .*")
"""Torch guesses at causes behind its first sentence."""

_INTERFACE = re.compile(r"Unable to find address for: (\S+)")

SHOWN_HOSTS = 8


def is_timeout(exc: BaseException) -> bool:
    """Whether torch tells of a wait that was too long, not of a connection that has ended. Pure."""
    return _TIMEOUT.search(str(exc)) is not None


@contextlib.contextmanager
def translated(doing: str, place: Place, timeout_s: float) -> Iterator[None]:
    """Turn what torch raises when a rank is gone into one typed line. Local.

    Args:
        doing: "saving a checkpoint", for the message.
        place: of this process.
        timeout_s: longest wait for another rank.

    Raises:
        TransportError, TransportTimeout: instead of torch's RuntimeError.
        ConfigError: the interface that gloo was given is not there.
    """
    try:
        yield
    except RuntimeError as exc:
        text = str(exc).strip() or type(exc).__name__
        if found := _INTERFACE.search(text):
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME must name an interface of {socket.gethostname()}, got "
                f"{found[1]}. `ip address` lists them."
            ) from exc
        if not (isinstance(exc, dist.DistError) or _NETWORK.search(text)):
            raise
        kind = TransportTimeout if _TIMEOUT.search(text) else TransportError
        reason = _ADVICE.sub("", _SOURCE_LINE.sub("", text.splitlines()[0]))[:200].rstrip(".")
        raise kind(
            f"rank {place.rank} of {place.world_size} on {socket.gethostname()} has lost another "
            f"rank while {doing} (gradient_pruning.timeout_s {timeout_s:g}): {reason}. Look at "
            "what the other ranks wrote first."
        ) from exc


@contextlib.contextmanager
def situated(where: Callable[[], str]) -> Iterator[None]:
    """Add to the error of a lost rank, or of nan, where the run stands. Local.

    Args:
        where: whole sentences, or nothing; asked when it has happened.

    Raises:
        TransportError, TransportTimeout, NonFiniteError: that from inside, with more words.
    """
    try:
        yield
    except (TransportError, NonFiniteError) as exc:
        text, more = str(exc), where()
        if not more:
            raise
        raise type(exc)(f"{text if text.endswith('.') else text + '.'} {more}") from exc


def standing(step: int, hosts: list[str], checkpoints: Path, newest: str | None) -> str:
    """Where a run stands, in whole sentences. Pure.

    Args:
        step: optimizer steps done.
        hosts: of every rank, in rank order; may be cut, or empty.
        checkpoints: the folder.
        newest: the checkpoint in it that a resumed run loads.
    """
    shown = ", ".join(f"rank {rank} on {host}" for rank, host in enumerate(hosts[:SHOWN_HOSTS]))
    more = "" if len(hosts) <= SHOWN_HOSTS else f", {len(hosts) - SHOWN_HOSTS} more"
    ranks = f" ({shown}{more})" if hosts else ""
    if newest is None:
        return f"{step} steps were done{ranks}. There is no checkpoint yet in {checkpoints}."
    return (
        f"{step} steps were done{ranks}. The last checkpoint is {newest} in {checkpoints}; "
        "continue with --resume."
    )
