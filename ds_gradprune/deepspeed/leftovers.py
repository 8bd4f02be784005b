"""What DeepSpeed leaves behind on a host: the files of its all-reduce in shared memory.

Where all ranks are on one host, its CPU backend (0.19.8, csrc/cpu/comm/shm.cpp) makes a file of 69
MB per rank in /dev/shm and never removes it. `findings/deepspeed_keeps_shared_memory.sh` shows it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")


def unlink_buffer(rank: int) -> None:
    """Remove the name of this rank's file; who has opened it keeps it until it ends. Local.

    Call it when all ranks are known to have opened the files of all.

    Args:
        rank: its rank in the whole run.
    """
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    file = FOLDER / "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place, str(rank)])
    with suppress(OSError):  # an unusual host; nothing depends on it
        file.unlink()
