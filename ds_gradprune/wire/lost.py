"""A rank is gone: what torch raises becomes one typed line."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import torch.distributed as dist

from ds_gradprune.errors import ConfigError, TransportError, TransportTimeout

_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_NETWORK = re.compile(
    r"gloo|ProcessGroup|NCCL|connection (reset|closed|refused)|broken pipe|timed? ?out|timeout",
    re.IGNORECASE,
)
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ?")
_ADVICE = re.compile(r"\. This (is typically|may have been) caused by .*")
"""Torch guesses at causes behind its first sentence."""

_INTERFACE = re.compile(r"Unable to find address for: (\S+)")
_OWN_NAME = re.compile(r"connectFullMesh.*Connection refused, remote=\[(127\.0\.1\.1)\]", re.DOTALL)
"""Debian's address for a host's own name: one host has told it to another."""
_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def is_timeout(exc: BaseException) -> bool:
    """Whether torch tells of a wait that was too long, not of a connection that has ended. Pure."""
    return _TIMEOUT.search(str(exc)) is not None


def reason_of(exc: BaseException) -> str:
    """The first line of what torch tells, in 200 characters. Pure."""
    return (str(exc).strip().splitlines() or ["no reason given"])[0][:200]


@contextlib.contextmanager
def translated(doing: str, rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """Turn what torch raises when a rank is gone into one typed line. Local.

    Args:
        doing: "saving a checkpoint", for the message.
        rank: of this process.
        world_size: number of ranks.
        timeout_s: longest wait for another rank.

    Raises:
        TransportError, TransportTimeout: instead of torch's RuntimeError; or the port is in use.
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
        if _IN_USE.search(text):
            raise TransportError(
                f"rank {rank} must be able to listen on the port of MASTER_PORT on "
                f"{socket.gethostname()}, but it is in use. End what uses it, or take another port."
            ) from exc
        if not (isinstance(exc, dist.DistError) or _NETWORK.search(text)):
            raise
        kind = TransportTimeout if _TIMEOUT.search(text) else TransportError
        reason = _ADVICE.sub("", _SOURCE_LINE.sub("", text.splitlines()[0]))[:200].rstrip(".")
        advice = "Look at what the other ranks wrote first."
        if found := _OWN_NAME.search(text):
            advice = (
                f"Another host has told {found[1]} as its address, which its own name means there: "
                "set GLOO_SOCKET_IFNAME on all hosts."
            )
        raise kind(
            f"rank {rank} of {world_size} on {socket.gethostname()} has lost another rank while "
            f"{doing} (gradient_pruning.timeout_s {timeout_s:g}): {reason}. {advice}"
        ) from exc
