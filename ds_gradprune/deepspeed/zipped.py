"""The checksums inside a file of torch.save, which torch.load does not look at. Needs no torch.

Such a file is a zip archive with a crc32 per member: one flipped bit becomes a weight of 1e38.
"""

from __future__ import annotations

import os
import zipfile


def zip_fault(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with an archive, every byte of it read; None: nothing. Local.

    Args:
        path: of the archive. What is no archive is damaged, too.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    # What zipfile raises on damaged headers: its own error, and what the numbers in them trip.
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as exc:
        return f"{path} is damaged: {exc}"
    return None if member is None else f"{path} is damaged: the checksum of {member} is wrong"
