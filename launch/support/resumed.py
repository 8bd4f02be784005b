"""Which checkpoint all ranks go on from, where hosts may have disks of their own."""

from __future__ import annotations

from collections.abc import Sequence

from ds_gradprune.errors import CheckpointError

from .peers import Peers
from .run_folder import RunFolder
from .shown import say
from .whole import step_of, tags_in

SHOWN_HOSTS = 8


def resumed_tag(peers: Peers, folder: RunFolder) -> str:
    """The checkpoint that `--resume` loads on every rank. Collective.

    It is the one that `latest` names. Where hosts' files name different ones, or some host lacks
    it, it is the newest that every host has, and rank 0 says so. `latest` is written when all ranks
    have written their files, so the newest that any host names is whole unless a disk was lost.

    Raises:
        CheckpointError: no host has any, or all have others; on all ranks alike.
    """
    told = peers.gather([peers.host, folder.newest(), list(tags_in(folder.checkpoints).values())])
    if all(latest is None for _, latest, _ in told):
        raise CheckpointError(
            f"--resume must find a checkpoint, but {folder.checkpoints} has none. Train without "
            "--resume into a new folder."
        )
    tag, is_said = common_tag([(latest, tags) for _, latest, tags in told])
    if tag is not None and not is_said:
        return tag
    has = "; ".join(dict.fromkeys(f"{host} has {_listed(*of_host)}" for host, *of_host in told))
    if tag is None:
        raise CheckpointError(
            f"--resume must find a checkpoint in {folder.checkpoints} that every host has, but "
            f"{has}. Start the first host and those that have the same: the run goes on with fewer."
        )
    if peers.is_first:
        say(f"note: the run goes on from {tag}, the newest that every host has: {has}")
    return tag


def common_tag(told: Sequence[tuple[str | None, Sequence[str]]]) -> tuple[str | None, bool]:
    """The newest checkpoint that all have, and whether that must be said. Pure.

    Args:
        told: what `latest` names, and all tags that have a folder, of every rank; one at least is
            named.

    Returns:
        None: they have none in common.
    """
    named = {latest for latest, _ in told if latest is not None}
    have = [set(tags) for _, tags in told]
    if len(named) == 1:
        (tag,) = named
        if all(tag in tags for tags in have) or not any(tag in tags for tags in have):
            return tag, False  # or nobody has it: who loads it says so
    last = max((step for tag in named if (step := step_of(tag)) is not None), default=-1)
    steps = {step_of(tag) or 0: tag for tag in set.intersection(*have)}
    best = max((step for step in steps if step <= last), default=None)
    return (None if best is None else steps[best]), True


def _listed(latest: str | None, tags: Sequence[str]) -> str:
    shown = ", ".join(sorted(tags)) or "none"
    return shown if latest in (None, *tags) else f"{shown} (latest names {latest})"
