"""Does everything work on a GPU? One document of what was found, in minutes.

Two ranks share one device and are two islands: every ZeRO stage, fp32 and bf16, all ways of
exchanging, checkpoints, pruned gradients, each beside plain DeepSpeed where numbers must be equal;
selection, moves and codecs against the CPU bit for bit; then 124M parameters from nothing and
SmolLM2's shape, with seconds by part, bytes a parameter and an emulated link.

    python -m labs.gpu_check --out FILE.json [--tiny] [--minutes 5] [--parts NAME ...]

The document is written anew after every case, so a run that is cut leaves what it has found. A
check that fails is told in it, and ends the run with code 1. `--tiny` makes the marked cases of all
parts at a tiny size. `labs/gpu_kit.sh` gathers what a machine without a package index lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from labs.gpu.launch import ROOT, Settings, run
from labs.gpu.parts import PARTS
from labs.gpu.table import rows


class Document:
    """What was found so far, in a file.

    Args:
        path: of the file.
        head: what is known before any part.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        self.content: dict[str, Any] = head | {"seconds": 0.0, "failed": [], "parts": {}}
        self._write()

    def add(self, name: str, found: dict[str, Any]) -> None:
        """A part is over."""
        self.note(name, found)
        print(f"{name}: {'ok' if found['ok'] else 'FAILED'}, {found['seconds']:.1f} s", flush=True)

    def note(self, name: str, found: dict[str, Any]) -> None:
        """What a part has found so far."""
        with self._lock:
            parts = self.content["parts"] | {name: found}
            self.content["parts"] = {n: parts[n] for n in PARTS if n in parts}
            self.content["failed"] = [
                n for n, part in parts.items() if not part["ok"] and not part["optional"]
            ]
            self._write()

    def _write(self) -> None:
        self.content["seconds"] = time.monotonic() - self._began_s
        draft = self._path.with_name(self._path.name + ".new")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self._path)


def chosen(options: argparse.Namespace) -> dict[str, list[str]]:
    """Part -> its cases."""
    names = options.parts or list(PARTS)
    plan = {}
    for name in names:
        part = PARTS[name]
        cases = [n for n, case in part.cases.items() if case.is_tiny or not options.tiny]
        needs_device = part.command or part.backend == "nccl"
        if cases or (part.command and not options.tiny):
            if options.device == "cuda" or not needs_device:
                plan[name] = cases
    return plan


def check(options: argparse.Namespace, document: Document, folder: Path) -> None:
    """All parts: side by side where none measures time, then one after the other."""
    ends_s = time.monotonic() + 60.0 * options.minutes
    settings = Settings(folder, options.device, options.tiny, ends_s)

    def do(name: str, cases: list[str]) -> None:
        try:
            found = run(
                name, PARTS[name], cases, settings, lambda found: document.note(name, found)
            )
        except Exception as exc:  # a fault of the check itself must not hide the other parts
            found = {"ok": False, "optional": False, "seconds": 0.0, "fault": repr(exc)}
        document.add(name, found)

    plan = chosen(options)
    for name, cases in plan.items():
        if name == "machine":  # first: it builds the kernels that all others need
            do(name, cases)
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, cases in plan.items():
            if not PARTS[name].alone:
                pool.submit(do, name, cases)
    for name, cases in plan.items():
        if PARTS[name].alone and name != "machine":
            do(name, cases)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the document")
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="the marked cases, tiny")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="NAME", default=[])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--jobs", type=int, help="parts side by side (half of the cores)")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.jobs = options.jobs or max(1, (os.cpu_count() or 1) // 2)
    return options


def main() -> None:
    """Check, write the document, print a table."""
    options = parse(sys.argv[1:])
    head = {
        "document": "gpu_check",
        "command": " ".join(["python -m labs.gpu_check", *sys.argv[1:]]),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "device": options.device,
        "tiny": options.tiny,
    }
    document = Document(options.out, head)
    with tempfile.TemporaryDirectory() as folder:
        check(options, document, Path(folder))
    print("\n".join(rows(document.content)))
    raise SystemExit(bool(document.content["failed"]))


def _commit() -> str | None:
    """None where this is no repository."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
