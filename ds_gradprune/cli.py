"""The command `ds-gradprune`: finds the subcommand, and tells its faults in one line.

A subcommand is imported when it is called, so `ds-gradprune --help` loads neither torch nor
matplotlib.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import ds_gradprune
from ds_gradprune.errors import GradPruneError

COMMANDS = {
    "doctor": "measure hosts, links and a model: does pruning pay here, and with which settings",
    "plot": "draw one or several runs as a PNG: loss, density, link rate, where the time goes",
    "report": "what a run decided and why, as text or as one HTML file",
    "train": "train a text generator over pruned updates or gradients",
    "finetune": "continue a model on your own text",
    "supervise": "start a training command on several hosts, and again when one is lost",
    "reply": "ask a trained model",
    "serve": "serve a trained model over HTTP",
}
"""Name -> what it is for."""

OWN = ("doctor", "plot", "report")
"""Commands of this package; the others belong to the example beside it."""

ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes beside those of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    DeepSpeed's launcher puts `--local_rank=N` before everything else. It is handed on.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    handed = [word for word in words[:1] if word.startswith("--local_rank")]
    words = words[len(handed) :]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else ERROR
    if words[0] == "--version":
        print(f"ds_gradprune {ds_gradprune.__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"error: {name!r} is not a command. {usage()}", file=sys.stderr)
        return ERROR
    try:
        if name in OWN:
            code: int = importlib.import_module(f"ds_gradprune.commands.{name}").main(rest)
        else:
            dispatch = importlib.import_module("ds_gradprune.commands.dispatch")
            code = dispatch.run(name, [*rest, *handed])
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # its reader has seen enough; nothing may be written at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    return code


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ds-gradprune COMMAND ...",
            "",
            *lines,
            "",
            "ds-gradprune COMMAND --help says more; --version prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
