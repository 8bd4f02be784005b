"""Names of checkpoints: a tag is a folder below the checkpoint folder. All functions are local."""

from __future__ import annotations

import os

from ds_gradprune.errors import CheckpointError


def latest_tag(folder: str, file: str = "latest") -> str | None:
    """The tag that DeepSpeed's `latest` file names; None if there is no such file.

    Args:
        folder: of the checkpoints.
        file: its name; `latest_universal` names one that DeepSpeed's ds_to_universal.py has made.

    Raises:
        CheckpointError: the file cannot be read, or names no folder inside `folder`.
    """
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8") as opened:
            return check_tag(opened.read(4096).strip(), path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as exc:
        raise CheckpointError(f"{path} must be a text file with a tag's name, got: {exc}.") from exc


def check_tag(tag: str, source: str) -> str:
    """The tag itself: nothing outside the checkpoint folder is read or written.

    Args:
        tag: a name, with slashes perhaps.
        source: who says so, for the message.

    Raises:
        CheckpointError: it leads out of the folder, or cannot be a name.
    """
    parts = tag.replace("\\", "/").split("/")
    is_name = tag.isprintable() and not os.path.isabs(tag) and not {"", ".", ".."} & set(parts)
    if not is_name:
        raise CheckpointError(
            f"{source} must name a folder inside the checkpoint folder, got {tag[:80]!r}. Write "
            "the name of a tag that exists into it."
        )
    return tag
