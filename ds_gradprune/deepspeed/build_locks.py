"""Locks of compilations that were killed: whoever needs that op next waits for ever, silently.

DeepSpeed compiles its ops through torch, whose lock is a file that is there while somebody compiles
(`torch.utils.file_baton`). The one that compiles keeps it open, so a lock that no process of this
machine has open was left behind, or belongs to another host on the same disk, which finishes soon.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils import cpp_extension

from ds_gradprune.errors import UnsupportedError

logger = logging.getLogger(__name__)

SHM_OP = "deepspeed_shm_comm"
"""DeepSpeed loads it whenever it opens its communication on CPUs; only inference calls it."""

LONGEST_BUILD_S = 900.0
"""Where processes cannot be looked at: no compilation is longer. Clocks may jump."""


_told: set[Path] = set()


def stale_locks(
    folder: Path | None = None, processes: Path = Path("/proc"), *, unused: str | None = SHM_OP
) -> list[Path]:
    """The locks in torch's folder of extensions that nobody holds, in order.

    Args:
        folder: of the extensions; None: the one that torch uses here.
        processes: where the system lists its processes.
        unused: an op that is not going to be loaded; its lock blocks nobody.
    """
    root = folder or Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    )
    # One folder per op; by default one per Python and accelerator around them.
    locks = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})
    locks = [lock for lock in locks if lock.parent.name != unused]
    return [lock for lock in locks if _is_stale(lock, processes)]


def warning(locks: list[Path]) -> str:
    """What to tell the user about stale locks; one line."""
    listed = " ".join(str(lock) for lock in locks)
    return (
        f"warning: no process holds {listed}, so a compilation was killed there. A run that needs "
        f"that op waits for it for ever: rm {listed}"
    )


def warn_of_locks(tell: Callable[[str], object] = logger.warning) -> None:
    """Tell which compilations were killed: an engine may need one of those ops. Local.

    Each lock is told once, by the first rank of a host.

    Args:
        tell: shows one line.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    locks = [lock for lock in stale_locks() if lock not in _told]
    if locks:
        _told.update(locks)
        tell(warning(locks))


def refuse_stale_shm_lock() -> None:
    """DeepSpeed is about to load its shared-memory op: it would wait for this lock for ever.

    Raises:
        UnsupportedError: names the lock and how to remove it.
    """
    locks = [lock for lock in stale_locks(unused=None) if lock.parent.name == SHM_OP]
    if locks:
        raise UnsupportedError(warning(locks).removeprefix("warning: "))


def _is_stale(lock: Path, processes: Path) -> bool:
    try:
        if not processes.is_dir():
            return time.time() - lock.stat().st_mtime > LONGEST_BUILD_S
        held = {os.stat(file)[1:3] for file in _open_files(processes, lock.name)}
        # A process of another user cannot be looked at; its locks would not be in this folder.
        return os.stat(lock)[1:3] not in held
    except FileNotFoundError:  # its holder has just finished
        return False


def _open_files(processes: Path, name: str) -> Iterator[Path]:
    """Files called `name` that processes have open."""
    for process in processes.glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor).endswith(f"/{name}"):
                    yield descriptor
        except OSError:  # it has ended, or belongs to somebody else
            continue
