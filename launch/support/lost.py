"""A rank is gone: the error says where the run stands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_gradprune.errors import NonFiniteError, TransportError

SHOWN_HOSTS = 8


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
