"""A finished run and its replies as one JSON document, on one line: the end of the quickstart.

python -m launch.support.summary RUN FILE ...      (files that hold a reply each)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

RESULT_KEYS = (
    "steps",
    "val_loss",
    "val_loss_start",
    "wire_bytes",
    "dense_bytes",
    "density_min",
    "density_max",
)


def main(arguments: Sequence[str]) -> int:
    """Print the document; returns the exit code."""
    run, *files = map(Path, arguments)
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        replies = [file.read_text(encoding="utf-8").strip() for file in files]
        document = {key: result[key] for key in RESULT_KEYS} | {"replies": replies}
    except (OSError, ValueError, KeyError) as exc:
        print(f"error: {run} must be a finished run of launch/train.py: {exc}.", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
