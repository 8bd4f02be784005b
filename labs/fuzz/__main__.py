"""Damaged input by the thousand: whatever it is, one of our own errors, and memory stays flat.

    python -m labs.fuzz --configs 10000 --hostfiles 2000 --payloads 100000 --returns 20000

The last line of stdout is one JSON document. The exit code is 1 if anything but a value or an
error of ours came out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gradprune.errors import GradPruneError
from labs.fuzz import configs, hostfiles, payloads, returns

SHOWN = 5
PAGE_BYTES = 4096


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = _parser().parse_args(arguments)
    wholes = payloads.whole_payloads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        document = {"seed": flags.seed} | {
            name: many(count, flags.seed, attempt)
            for name, count, attempt in (
                ("configs", flags.configs, lambda rng: configs.attempt(rng, path)),
                ("hostfiles", flags.hostfiles, lambda rng: hostfiles.attempt(rng, path)),
                ("payloads", flags.payloads, lambda rng: payloads.attempt(rng, wholes)),
                ("returns", flags.returns, returns.attempt),
            )
        }
    print(json.dumps(document))
    return int(any(found["untyped"] for found in document.values() if isinstance(found, dict)))


def many(count: int, seed: int, attempt: Callable[[random.Random], None]) -> dict[str, Any]:
    """Make attempts, and count how they end.

    Args:
        count: number of attempts.
        seed: each attempt has a generator of its own, seeded with this and its number.
        attempt: raises what it is refused with.

    Returns:
        `cases`, `accepted`, `refused` (kind of error -> number), `untyped` (number), `examples` of
        those, `slowest_s`, and `grown_bytes` of the resident set since the first tenth.
    """
    refused: Counter[str] = Counter()
    examples: list[str] = []
    accepted = untyped = first_bytes = 0
    slowest_s = 0.0
    for number in range(count):
        if number == count // 10:
            first_bytes = resident_bytes()
        rng = random.Random(f"{seed}/{number}")
        began_s = time.perf_counter()
        try:
            attempt(rng)
            accepted += 1
        except GradPruneError as exc:
            refused[type(exc).__name__] += 1
        except Exception as exc:  # what this command looks for
            untyped += 1
            examples.append(f"case {number}: {type(exc).__name__}: {exc!s:.200}")
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
    return {
        "cases": count,
        "accepted": accepted,
        "refused": dict(refused),
        "untyped": untyped,
        "examples": examples[:SHOWN],
        "slowest_s": round(slowest_s, 3),
        "grown_bytes": resident_bytes() - first_bytes if count else 0,
    }


def resident_bytes() -> int:
    """What of this process lies in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m labs.fuzz", description=__doc__)
    counts = {"configs": 10_000, "hostfiles": 2_000, "payloads": 100_000, "returns": 20_000}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
