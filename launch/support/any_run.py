"""What the runs of both training scripts do alike: their folder, their lines, their end."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from ds_gradprune.config import BLOCK
from ds_gradprune.deepspeed.build_locks import warn_of_locks

from .lost import standing
from .peers import Peers
from .shown import Messages, say
from .start import check_ds_config, quiet_deepspeed, skip_shm_op

logger = logging.getLogger("ds_gradprune")

WORSE = 1.01
"""Last over least validation loss, from which on a run has gone on too long."""


class AnyRun(ABC):
    """One run from its data to its result.

    Args:
        settings: flags, configuration and folder of either script.
        peers: all ranks.

    Attributes:
        steps_done: optimizer steps so far.
    """

    def __init__(self, settings: Any, peers: Peers) -> None:
        self.flags, self.folder, self.peers = settings.flags, settings.folder, peers
        self.steps_done = 0
        self.messages = Messages(self.flags.steps)
        logger.handlers = [self.messages] if peers.rank == 0 else [logging.NullHandler()]
        logger.propagate = False
        logging.getLogger("ds_gradprune.decisions").setLevel(logging.INFO)

    @abstractmethod
    def train(self) -> None:
        """Train, save, and write model and result. Collective."""

    def claim(self, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
        """Claim the folder, or take it over. Collective.

        Only rank 0's is asked: others may not share the disk. A rank that comes back is in it.

        Args:
            identity: what a resumed run must have in common with the first one.
            notes: more that it wants to know.

        Returns:
            Identity and notes of the first one.
        """
        if self.peers.joins:
            if self.peers.rank == 0:
                self.folder.hold_again()
            return {**identity, **notes}
        if self.peers.place.local_rank == 0 and self.peers.rank and not self.flags.resume:
            self.folder.share()

        def work() -> dict[str, Any]:
            if self.peers.rank == 0 and self.flags.resume:
                return dict(self.folder.resume(identity))
            if self.peers.rank == 0:
                self.folder.claim(identity, notes)
            return {**identity, **notes}

        return dict(self.peers.gather(self.peers.together(work))[0])

    def standing(self) -> str:
        """How far the run has come, for the error that ends it. Local."""
        folder = self.folder
        return standing(self.steps_done, self.peers.hosts, folder.checkpoints, folder.newest())

    def on_first(self, work: Callable[[], None]) -> None:
        """Do `work` on the first rank; if it fails, it has failed on all. Collective."""
        self.peers.together(work if self.peers.is_first else lambda: None)

    def say(self, text: str) -> None:
        """Show one line, once for all ranks."""
        if self.peers.is_first:
            say(text)

    def say_if_plain(self, is_enabled: bool) -> None:
        """Say that nothing is pruned, where it is so."""
        if not is_enabled:
            self.say(f"{BLOCK}.enabled is false: plain DeepSpeed")

    def say_end(self, val_losses: list[tuple[int, float]], *, stopped: bool) -> None:
        """Say how the run has ended, and what can be done with it."""
        step, loss = min(val_losses, key=lambda pair: pair[1])
        last_step, last = val_losses[-1]
        if step < last_step and last > WORSE * loss:
            self.say(
                f"note: the validation loss was lowest after step {step}, {loss:.4f}, and is "
                f"{last:.4f} now: more steps on this text make the model worse"
            )
        if stopped:
            resumes = self.folder.newest() is not None
            more = "continue with --resume" if resumes else "no checkpoint was asked for"
            self.say(f"Stopped after step {self.steps_done}; {more}.")
        self.say(
            f"The model is in {self.folder.model}. Look at the run, or talk to it:\n"
            f"  ds-gradprune plot {self.folder.path}\n"
            f"  ds-gradprune serve --model {self.folder.path}"
        )


def totals_of(handle: Any) -> dict[str, Any]:
    """What was sent, for result.json.

    Args:
        handle: `engine.gradprune`; None: nothing is pruned.
    """
    totals = None if handle is None else handle.totals
    return {
        "wire_bytes": totals.wire_bytes if totals else 0,
        "dense_bytes": totals.dense_bytes if totals else 0,
        "density_min": totals.density_min if totals else None,
        "density_max": totals.density_max if totals else None,
    }


def bring_up(settings: Any, peers: Peers) -> Any:
    """Start DeepSpeed; returns its own reading of the configuration. Collective."""
    if peers.place.local_rank == 0:
        warn_of_locks(say)
    import deepspeed

    quiet_deepspeed()
    skip_shm_op()
    deepspeed.init_distributed()
    return peers.together(lambda: check_ds_config(settings.ds_config))


def train_in(settings: Any, peers: Peers, begin: Callable[[], AnyRun]) -> None:
    """Begin a run and train; one that cannot begin leaves nothing. Collective.

    Args:
        settings: see `AnyRun`.
        peers: all ranks.
        begin: makes the run, which claims the folder.
    """
    try:
        try:
            run = begin()
        except BaseException:
            settings.folder.discard()
            raise
        with peers.during("training"):
            run.train()
    finally:
        settings.folder.release()
