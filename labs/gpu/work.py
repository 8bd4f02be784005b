"""One process of a part: runs its cases and writes a line of JSON after each.

    python -m labs.gpu.work PART FOLDER [--tiny] CASE...

The first case that fails ends the process, because its peers wait for it: `labs.gpu_check` starts
the rest anew.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from labs.gpu.parts import PARTS

CASE_LIMIT_S = 110.0
"""A case that hangs shows where."""


def main(part_name: str, folder: str, *rest: str) -> None:
    """Run the cases."""
    part, rank = PARTS[part_name], int(os.environ["RANK"])
    tiny = rest[0] == "--tiny"
    given = {"{folder}": folder, "{tiny}": tiny, "{size}": 2**24 if tiny else 2**30}
    path = Path(folder) / f"{part_name}.{rank}.jsonl"
    began_s = time.monotonic()
    if part.backend is not None:
        from labs.gpu.engines import start

        start(part.backend)
    for name in rest[tiny:]:
        case = part.cases[name]
        faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
        line: dict[str, Any] = {"case": name}
        try:
            module, function = case.function.split(":")
            arguments = {
                key: given.get(value, value) if isinstance(value, str) else value
                for key, value in case.arguments.items()
            }
            line["found"] = getattr(importlib.import_module(module), function)(**arguments)
        except Exception:
            line["fault"] = traceback.format_exc()
        line["seconds"] = time.monotonic() - began_s
        began_s = time.monotonic()
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if "fault" in line:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int("fault" in line))  # threads of gloo may outlive the interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
